"""The final folder: made of the last checkpoint's files, proven, and only then given its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts import fingerprint, publish
from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import link_or_copy, write_file
from luthier.artifacts.manifest import Digest, Manifest, digest_file, stretches
from luthier.artifacts.run_folder import FAILED_PROOF
from luthier.artifacts.tensorfile import Place
from luthier.errors import ArtifactError
from luthier.export.proof.prove import Answers, Probe, Proof, compare, largest_difference, plain_answers


def make_final(
    run: Path,
    checkpoint: Path,
    expected: Answers,
    probe: Probe,
    *,
    facts: Mapping[str, Any],
    card: Callable[[Path, str], str],
    base: Path | None = None,
) -> tuple[Path, Proof]:
    """Assemble ``run/final`` from a checkpoint, prove it against the live model's answers, publish it.

    Args:
        expected: the live model's logits on the probe.
        facts: what the manifest says beside the bytes (base, parents, versions).
        card: writes the model card, given the hidden folder (with ``proof.json`` in it) and its kind.
        base: the base model's folder, to measure what full fine-tuning changed.

    Raises:
        ArtifactError: the proof failed. The checkpoints are kept, no ``final`` is published, and
            ``run/proof-failed.json`` says what differed.
    """
    source = manifests.read(checkpoint)
    kind = "adapter" if (checkpoint / "adapter").is_dir() else "model"
    target = run / "final"
    partial = target.parent / f"{publish.MARK}{target.name}"
    if partial.exists():
        shutil.rmtree(partial)
    names = {name: name.removeprefix(f"{kind}/") for name in source.files if name.startswith(f"{kind}/")}
    for name, short in names.items():
        _place(checkpoint / name, partial / short)
    found = plain_answers(partial, probe)
    before = None if kind == "adapter" or base is None else _answers_before(base, probe)
    proof = compare(expected, found, device=probe.device, before=before)
    (run / FAILED_PROOF).unlink(missing_ok=True)
    if proof.verdict == "failed":
        (run / FAILED_PROOF).write_bytes(proof.to_bytes())
        shutil.rmtree(partial)
        raise ArtifactError(
            f"the proof failed: {proof.says} No final folder was published.",
            code="proof-failed",
            where=str(run / FAILED_PROOF),
            remedy=f"The checkpoints are kept; {checkpoint} holds what was trained.",
        )
    if probe.quantisation is not None:
        proof = _with_distance(proof, expected, partial, probe)
    write_file(partial / "proof.json", proof.to_bytes())
    write_file(partial / "README.md", card(partial, kind).encode())
    manifest = _manifest(partial, kind, source, names, facts)
    if target.exists():  # a run that was continued: the old result goes when the new one is proven
        publish.remove(target)
    publish.finish(partial, target, manifest)
    return target, proof


def _with_distance(proof: Proof, expected: Answers, partial: Path, probe: Probe) -> Proof:
    """The proof, with how far the logits are from those on the unquantised base: that is what opening it so would cost."""
    try:
        other = plain_answers(partial, replace(probe, quantisation=None), tokenizer=False)
    except ArtifactError:  # it does not fit into memory there; that costs no proof
        return proof
    distance = largest_difference(expected.logits, other.logits)
    says = f"{proof.says} On the base without quantisation the same adapter's logits differ by up to {distance:.3g}."
    return replace(proof, unquantised=distance, says=says)


def _place(source: Path, target: Path) -> None:
    """Weights share their bytes with the checkpoint; small files are copies, so that editing one leaves the other whole."""
    if source.suffix == ".safetensors":
        link_or_copy(source, target)
    else:
        write_file(target, source.read_bytes())


def _answers_before(base: Path, probe: Probe) -> list[torch.Tensor] | None:
    """The base's logits; None where it can't answer (it lacks the tokens that were added). That costs no proof."""
    try:
        return plain_answers(base, probe).logits
    except ArtifactError:
        return None


def _manifest(
    partial: Path, kind: str, source: Manifest, names: Mapping[str, str], facts: Mapping[str, Any]
) -> Manifest:
    """The final folder's manifest; its files must still have the digests they were saved with.

    Raises:
        ArtifactError: one reads back differently.
    """
    digests = [Digest(names[d.file], d.offset, d.length, d.blake3) for d in source.digests if d.file in names]
    files = {short: source.files[name] for name, short in names.items()}
    for short in files:
        wanted = [digest for digest in digests if digest.file == short]
        for digest, found in zip(wanted, digest_file(partial / short, short, [(d.offset, d.length) for d in wanted]), strict=True):  # fmt: skip
            if digest != found:
                raise ArtifactError(
                    f"{short} reads back differently from what was saved (bytes {digest.offset} to {digest.offset + digest.length}).",
                    code="bytes-changed",
                    where=str(partial.parent),
                    remedy="Check the disk; older checkpoints are kept, and `luthier verify` says which of them are whole.",
                )
    for name in ("proof.json", "README.md"):
        size = (partial / name).stat().st_size
        files[name] = size
        digests = [digest for digest in digests if digest.file != name]
        digests += digest_file(partial / name, name, stretches(size))
    places = tuple(Place(p.spec, names[p.file], p.offset) for p in source.tensors if p.file in names)
    own = fingerprint.of_tensors(places, digests)
    return Manifest(kind, files, tuple(digests), places, {**facts, "fingerprint": own, "step": source.facts["step"]})
