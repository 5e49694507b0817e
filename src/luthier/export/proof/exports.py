"""Proofs of exports: what was written is opened by plain libraries and compared with what it was made from.

A copy must give equal bits. A merge cannot: base plus adapter and their sum are computed in another order, and the sum
is rounded to the dtype of the files. How much that may move the logits is measured and not assumed: the prober
disturbs the adapted weights of base + adapter at random by one rounding of that dtype, in fp32, and the bound is four
times what that moves. Both models answer in fp32, so nothing else stands between them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from luthier.artifacts.tensorfile import read_header
from luthier.artifacts.weight_facts import main_float
from luthier.errors import ArtifactError
from luthier.export.proof.prove import (
    MARGIN,
    TEXTS,
    Answers,
    Probe,
    Proof,
    compare,
    largest_difference,
    plain_answers,
    within,
)
from luthier.export.proof.slices import prove_slices
from luthier.models.room import free_bytes, parameters_in

ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}


def prove_merge(base: Path, adapter: Path) -> Callable[[Path], bytes]:
    """A proof that a merged folder computes what base and adapter compute together."""

    def prove(folder: Path) -> bytes:
        if not _fits(folder):
            return checked(prove_slices(folder, base, adapter), folder)
        dtype = _main_dtype(folder)
        probe = _probe(folder, "float32")
        found = plain_answers(folder, probe, tokenizer=False)
        expected = plain_answers(adapter, probe, base=str(base), rounding=ROUNDING[dtype], tokenizer=False)
        return checked(within(expected, found, dtype=dtype, device="cpu"), folder)

    return prove


def prove_quantised_merge(live: Path, adapter: Path, onto: str, other: Path | None) -> Callable[[Path], bytes]:
    """A proof of a merge where the adapter was trained on a quantised base.

    Args:
        live: the quantised base, which with the adapter on it is what was trained.
        onto: ``trained`` or ``original``, the values merged into.
        other: the base of the values not merged into, which is then merged for a moment to be measured beside.
    """

    def prove(folder: Path) -> bytes:
        if not _fits(folder):
            return _not_opened()
        from luthier.export.merged.merge import merge_folders

        dtype = _main_dtype(folder)
        probe = _probe(folder, "float32")
        expected = plain_answers(adapter, probe, base=str(live), tokenizer=False)
        found = plain_answers(folder, probe, rounding=ROUNDING[dtype], tokenizer=False)
        beside = None
        if other is not None:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".luthier-beside-") as scratch:
                words = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
                merged = merge_folders(other, adapter, Path(scratch) / "other", dtype=words.get(dtype))
                beside = largest_difference(expected.logits, plain_answers(merged, probe, tokenizer=False).logits)
        return checked(onto_quantised(expected, found, onto, beside, dtype=dtype), folder)

    return prove


def onto_quantised(expected: Answers, found: Answers, onto: str, beside: float | None, *, dtype: str) -> Proof:
    """Compare a merged model with the live one on its quantised base, and say which values are nearer to it.

    Rounding the merged weights has a measured bound (see `within`). What the quantised layers' own kernels round on the way has
    none, so a difference above the first is not taken for a failure unless it is as large as all that the adapter does.
    """
    rounded = largest_difference(found.logits, found.rounded)
    bound = 4 * rounded + 1e-5 * max(float(tensor.abs().max()) for tensor in expected.logits)
    difference = largest_difference(expected.logits, found.logits)
    effect = largest_difference(expected.logits, expected.plain)
    compared = (
        f"logits of {len(expected.logits)} prompts with the adapter on its quantised base in peft, both in fp32; cpu"
    )
    names = {"trained": "the values that the adapter saw", "original": "the original weights"}
    says = f"merged onto {names[onto]}: {difference:.3g} from the live model"
    if beside is not None:
        rest = next(key for key in names if key != onto)
        nearer = names[onto] if difference <= beside else names[rest]
        says += f"; merged onto {names[rest]} it would be {beside:.3g}, so {nearer} are nearer"
    says += f"; the adapter moves these logits by up to {effect:.3g}, rounding to {dtype} by up to {bound:.3g}"
    if onto == "trained" and not difference <= max(bound, effect):
        return Proof("failed", False, difference, bound, effect, compared, f"{says}.", (f"{says}.",))
    if difference <= bound and effect >= MARGIN * bound:
        return Proof("passed", True, difference, bound, effect, compared, f"{says}.")
    why = (
        "what quantising lost is between them"
        if onto == "original"
        else "what quantised layers round on the way is not known"
    )
    return Proof("inconclusive", False, difference, bound, effect, compared, f"{says}; {why}.")


def prove_dequantised(source: Path) -> Callable[[Path], bytes]:
    """A measurement of a dequantised copy against its quantised source, both opened in fp32.

    Quantised layers compute with the very values that were written, but their kernels round on the way, and how much that moves
    logits has no bound.
    """

    def prove(folder: Path) -> bytes:
        if not _fits(folder):
            return _not_opened()
        dtype = _main_dtype(folder)
        probe = _probe(source, "float32")
        expected = plain_answers(source, probe, tokenizer=False)
        found = plain_answers(folder, probe, rounding=ROUNDING[dtype], tokenizer=False)
        difference = largest_difference(expected.logits, found.logits)
        bound = 4 * largest_difference(found.logits, found.rounded) + 1e-5 * max(
            float(x.abs().max()) for x in expected.logits
        )
        compared = f"logits of {len(expected.logits)} prompts with the quantised folder, both in fp32; cpu"
        told = f"{difference:.3g} from the quantised model (rounding to {dtype} explains up to {bound:.3g})"
        if difference <= bound:
            return Proof(
                "passed", True, difference, bound, None, compared, f"opened by plain libraries, {told}."
            ).to_bytes()
        says = f"{told}; what quantised layers round on the way is not known."
        return Proof("inconclusive", False, difference, bound, None, compared, says).to_bytes()

    return prove


def prove_quantised(source: Path, form: str, kept: Sequence[str], dtype: str) -> Callable[[Path], bytes]:
    """A proof that a quantised folder is what its library makes of the source: plain transformers quantises that as it opens.

    fp8 has no such way there, and quantises activations as it computes; its folder is opened and its distance said. How far
    quantising moved the logits is measured and said of every form.
    """

    def prove(folder: Path) -> bytes:
        if not _fits(source):
            return _not_opened()
        if form == "fp8" and find_spec("compressed_tensors") is None:
            says = "compressed-tensors is not installed here, so the folder was not opened; its bytes are digested in luthier.json."
            return Proof("inconclusive", False, 0.0, 0.0, None, "nothing", says).to_bytes()
        probe = _probe(source, dtype)
        found = plain_answers(folder, probe, tokenizer=False)
        before = plain_answers(source, probe, tokenizer=False)
        moved = largest_difference(before.logits, found.logits)
        scale = max(float(tensor.abs().max()) for tensor in before.logits)
        says = f"Quantising to {form} moves the logits by up to {moved:.3g} (they reach {scale:.3g})."
        if form == "fp8":
            compared = f"logits of {len(found.logits)} prompts with the source, both in {dtype}; cpu"
            opened = f"opened by plain transformers with compressed-tensors. {says}"
            verdict = Proof(
                "passed" if moved < scale else "failed", moved < scale, moved, scale, None, compared, opened
            )
            return checked(verdict, folder)
        asked = replace(probe, quantisation={"precision": form, "skip": list(kept)})
        proof = compare(plain_answers(source, asked, tokenizer=False), found, device="cpu")
        return checked(replace(proof, says=f"{proof.says} {says}", unquantised=moved), folder)

    return prove


def prove_copy(source: Path, word: str | None) -> Callable[[Path], bytes]:
    """A proof that a copy, re-sharded or cast, gives the logits of its source opened in the same dtype."""

    def prove(folder: Path) -> bytes:
        if not _fits(folder):
            return checked(prove_slices(folder, source, None), folder)
        names = {"BF16": "bfloat16", "F16": "float16"}
        probe = _probe(source, names.get(word or _main_dtype(folder), "float32"))
        asked = (source / "tokenizer_config.json").is_file()
        try:
            expected = plain_answers(source, probe, tokenizer=asked)
        except ArtifactError as error:
            return Proof("inconclusive", False, 0.0, 0.0, None, "nothing", f"the source does not open: {error.message}").to_bytes()  # fmt: skip
        return checked(compare(expected, plain_answers(folder, probe, tokenizer=asked), device="cpu"), folder)

    return prove


def checked(proof: Proof, folder: Path) -> bytes:
    """The proof as a file.

    Raises:
        ArtifactError: it failed.
    """
    if proof.verdict == "failed":
        raise ArtifactError(
            f"the proof failed: {proof.says} Nothing was published.",
            code="proof-failed",
            where=str(folder.parent),
            remedy="The sources are as they were. Please report it with this text.",
        )
    return proof.to_bytes()


def _probe(folder: Path, dtype: str) -> Probe:
    return Probe(_ids(folder), dtype, "cpu", None, torch.get_num_threads(), False)


def _ids(folder: Path) -> list[list[int]]:
    """Token ids of a few texts where a tokenizer is there, else ids spread over the vocabulary."""
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        return [ids for text in TEXTS if (ids := tokenizer.encode(text).ids[:48])]
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    vocabulary = int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 256)
    return [[(7 * place + 3) % vocabulary for place in range(32)]]


def _main_dtype(folder: Path) -> str:
    return main_float(place.spec for path in folder.glob("*.safetensors") for place in read_header(path)[0].values())


def _fits(folder: Path) -> bool:
    """Whether plain transformers can hold the model in fp32 beside what else is in memory."""
    free = free_bytes("cpu")
    return free is None or parameters_in(folder.glob("*.safetensors")) * 4 * 2 < free


def _not_opened() -> bytes:
    says = "the model does not fit into this machine's memory, so it was not opened; its bytes are digested in luthier.json."
    return Proof("inconclusive", False, 0.0, 0.0, None, "nothing", says).to_bytes()
