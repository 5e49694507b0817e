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
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from luthier.artifacts.tensorfile import read_header
from luthier.artifacts.weight_facts import main_float
from luthier.errors import ArtifactError
from luthier.export import exported_folder as folders
from luthier.export.merged.as_trained import Quantised
from luthier.export.proof.prove import (
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


def prove_merge(
    base: Path, adapters: Sequence[Path], weights: Sequence[float] | None = None, *, combined: str | None = None
) -> Callable[[Path], bytes]:
    """A proof that a merged folder computes what base and adapters compute together, each with its weight.

    Args:
        combined: how the adapters' changes were made one, where that is no sum; no plain library does that to whole changes.
    """

    def prove(folder: Path) -> bytes:
        if combined is not None:
            says = f"no plain library computes {combined} of whole changes, so there is nothing to compare the logits with."
            return Proof("inconclusive", False, 0.0, 0.0, None, "nothing", says).to_bytes()
        alone = len(adapters) == 1 and weights is None
        if not _fits(folder):
            return checked(prove_slices(folder, base, adapters[0]), folder) if alone else _not_opened()
        dtype = main_dtype(folder)
        probe = _probe(folder, "float32")
        found = plain_answers(folder, probe, tokenizer=False)
        together = None if alone else list(zip(adapters, weights or [1.0] * len(adapters), strict=True))
        expected = plain_answers(adapters[0], probe, base=str(base), rounding=ROUNDING[dtype], tokenizer=False, together=together)  # fmt: skip
        proof = within(expected, found, dtype=dtype, device="cpu")
        if together:
            told = ", ".join(f"{weight:g} × {adapter.name}" for adapter, weight in together)
            proof = replace(proof, compared=f"{proof.compared}; adapters active together: {told}")
        return checked(proof, folder)

    return prove


@dataclass(frozen=True)
class Values:
    """Weights that an adapter may be merged into: those of a folder, or what quantising it in training made of them."""

    folder: Path
    quantised: Quantised | None = None


def prove_quantised_merge(adapter: Path, onto: str, seen: Values, original: Path | None) -> Callable[[Path], bytes]:
    """A proof of a merge where the adapter was trained on a quantised base.

    Args:
        onto: ``trained`` or ``original``, the values merged into.
        seen: the quantised base, which with the adapter on it is what was trained.
        original: the 16-bit base, if it is there; the values not merged into are merged for a moment to be measured beside.
    """

    def prove(folder: Path) -> bytes:
        if not _fits(folder):
            return _not_opened()
        from luthier.export.merged.merge import merge_folders

        dtype = main_dtype(folder)
        probe, rounding = _probe(folder, "float32"), ROUNDING[dtype]
        asked = replace(probe, quantisation=seen.quantised.asked() if seen.quantised else None, dequantise=True)
        found = plain_answers(folder, probe, tokenizer=False)
        live = plain_answers(adapter, asked, base=str(seen.folder), rounding=rounding, tokenizer=False)
        expected = live
        if onto == "original":
            expected = plain_answers(adapter, probe, base=str(original), rounding=rounding, tokenizer=False)
        other = Values(original) if onto == "trained" and original is not None else seen if onto == "original" else None
        beside = None
        if other is not None:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".luthier-beside-") as scratch:
                words = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
                merged = merge_folders(other.folder, adapter, Path(scratch) / "other", dtype=words.get(dtype), quantised=other.quantised)  # fmt: skip
                beside = plain_answers(merged, probe, tokenizer=False).logits
        return checked(onto_quantised(expected, found, live, onto, beside, dtype=dtype), folder)

    return prove


def onto_quantised(
    expected: Answers, found: Answers, live: Answers, onto: str, beside: list[torch.Tensor] | None, *, dtype: str
) -> Proof:
    """Compare a merged model with the adapter on the values that it was merged into, and say which values are nearer to the live model.

    The verdict is `within`'s: both sides compute with the same values in fp32, so only the rounding of the merged weights is
    between them. The live model is measured beside, as its quantised layers' own kernels answer, which round activations (LLM.int8())
    or weights to their compute dtype.

    Args:
        live: the adapter on its quantised base; its logits are those of the dequantised values in fp32, `kernels` the kernels'.
        beside: the logits of a merge into the other values.
    """
    proof = within(expected, found, dtype=dtype, device="cpu")
    names = {"trained": "the values that the adapter saw", "original": "the original weights"}
    values = "dequantised by transformers" if live.kernels else "with its weights rounded to e4m3"
    compared = f"{proof.compared}; its base {values}" if onto == "trained" else proof.compared
    answers = live.kernels or live.logits
    distance = largest_difference(answers, found.logits)
    says = f"merged onto {names[onto]}: {proof.says} It is {distance:.3g} from the live model, "
    if live.kernels:
        rounds = largest_difference(live.kernels, live.logits)
        says += f"whose quantised layers' kernels answer {rounds:.3g} from its dequantised weights in fp32"
    else:
        says += "opened with its dequantised weights, since no plain library multiplies in fp8"
    if beside is not None:
        rest = next(key for key in names if key != onto)
        other = largest_difference(answers, beside)
        nearer = names[onto] if distance <= other else names[rest]
        says += f"; merged onto {names[rest]} it would be {other:.3g} from it, so {nearer} are nearer"
    return replace(proof, says=f"{says}.", compared=compared, unquantised=distance if onto == "original" else None)


def prove_dequantised(source: Path, word: str | None) -> Callable[[Path], bytes]:
    """A proof of a dequantised copy against its quantised source, whose weights transformers dequantises: equal bits in the same dtype.

    How far the quantised layers' own kernels are from that is measured and said.
    """

    def prove(folder: Path) -> bytes:
        if not _fits(folder):
            return _not_opened()
        probe = _probe(source, folders.DTYPES.get(word or main_dtype(folder), "float32"))
        expected = plain_answers(source, replace(probe, dequantise=True), tokenizer=False)
        proof = compare(expected, plain_answers(folder, probe, tokenizer=False), device="cpu")
        kernels = largest_difference(expected.kernels, expected.logits)
        says = f"{proof.says} The quantised layers' own kernels answer {kernels:.3g} from that."
        compared = f"logits of {len(expected.logits)} prompts with the source dequantised by transformers, both in {probe.dtype}; cpu"
        return checked(replace(proof, says=says, compared=compared), folder)

    return prove


def prove_quantised(source: Path, form: str, kept: Sequence[str], dtype: str) -> Callable[[Path], bytes]:
    """A proof that a quantised folder is what its library makes of the source: plain transformers quantises that as it opens.

    fp8 has no such way there. Its folder is opened with its weights dequantised by compressed-tensors, and must give the bits
    of the source with every weight rounded to e4m3; what rounding activations moves while serving is measured and said, as is
    for every form how far quantising moved the logits.
    """

    def prove(folder: Path) -> bytes:
        if not _fits(source):
            return _not_opened()
        if form == "fp8" and find_spec("compressed_tensors") is None:
            says = "compressed-tensors is not installed here, so the folder was not opened; its bytes are digested in luthier.json."
            return Proof("inconclusive", False, 0.0, 0.0, None, "nothing", says).to_bytes()
        probe = _probe(source, dtype)
        found = plain_answers(folder, replace(probe, dequantise=form == "fp8"), tokenizer=False)
        before = plain_answers(source, probe, tokenizer=False)
        moved = largest_difference(before.logits, found.kernels or found.logits)
        scale = max(float(tensor.abs().max()) for tensor in before.logits)
        says = f"Quantising to {form} moves the logits by up to {moved:.3g} (they reach {scale:.3g})."
        asked = replace(probe, quantisation={"precision": form, "skip": list(kept)})
        proof = compare(plain_answers(source, asked, tokenizer=False), found, device="cpu")
        if form == "fp8":
            rounded = largest_difference(found.kernels, found.logits)
            says = f"Its weights were dequantised by compressed-tensors; rounding activations while serving moves the logits by up to {rounded:.3g}. {says}"
            compared = f"logits of {len(found.logits)} prompts with the source, its weights rounded to e4m3, both in {dtype}; cpu"
            proof = replace(proof, compared=compared)
        return checked(replace(proof, says=f"{proof.says} {says}", unquantised=moved), folder)

    return prove


def prove_copy(source: Path, word: str | None) -> Callable[[Path], bytes]:
    """A proof that a copy, re-sharded or cast, gives the logits of its source opened in the same dtype."""

    def prove(folder: Path) -> bytes:
        if not _fits(folder):
            return checked(prove_slices(folder, source, None), folder)
        names = {"BF16": "bfloat16", "F16": "float16"}
        probe = _probe(source, names.get(word or main_dtype(folder), "float32"))
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
    return Probe(probe_ids(folder), dtype, "cpu", None, torch.get_num_threads(), False)


def probe_ids(folder: Path) -> list[list[int]]:
    """Token ids of a few texts where a tokenizer is there, else ids spread over the vocabulary."""
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        return [ids for text in TEXTS if (ids := tokenizer.encode(text).ids[:48])]
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    vocabulary = int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 256)
    return [[(7 * place + 3) % vocabulary for place in range(32)]]


def main_dtype(folder: Path) -> str:
    return main_float(place.spec for path in folder.glob("*.safetensors") for place in read_header(path)[0].values())


def _fits(folder: Path) -> bool:
    """Whether plain transformers can hold the model in fp32 beside what else is in memory."""
    free = free_bytes("cpu")
    return free is None or parameters_in(folder.glob("*.safetensors")) * 4 * 2 < free


def _not_opened() -> bytes:
    says = "the model does not fit into this machine's memory, so it was not opened; its bytes are digested in luthier.json."
    return Proof("inconclusive", False, 0.0, 0.0, None, "nothing", says).to_bytes()
