"""Proofs of exports: what was written is opened by plain libraries and compared with what it was made from.

A copy must give equal bits. A merge cannot: base plus adapter and their sum are computed in another order, and the sum
is rounded to the dtype of the files. How much that may move the logits is measured and not assumed: the prober
disturbs the adapted weights of base + adapter at random by one rounding of that dtype, in fp32, and the bound is four
times what that moves. Both models answer in fp32, so nothing else stands between them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from luthier.artifacts.tensorfile import read_header
from luthier.errors import ArtifactError
from luthier.export.prove import TEXTS, Probe, Proof, compare, plain_answers, within
from luthier.models.room import free_bytes, parameters_in

ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-53}


def prove_merge(base: Path, adapter: Path) -> Callable[[Path], bytes]:
    """A proof that a merged folder computes what base and adapter compute together."""

    def prove(folder: Path) -> bytes:
        if not _fits(folder):
            return _not_opened()
        dtype = _main_dtype(folder)
        probe = _probe(folder, "float32")
        found = plain_answers(folder, probe, tokenizer=False)
        expected = plain_answers(adapter, probe, base=str(base), rounding=ROUNDING[dtype], tokenizer=False)
        return checked(within(expected, found, dtype=dtype, device="cpu"), folder)

    return prove


def prove_copy(source: Path, word: str | None) -> Callable[[Path], bytes]:
    """A proof that a copy, re-sharded or cast, gives the logits of its source opened in the same dtype."""

    def prove(folder: Path) -> bytes:
        if not _fits(folder):
            return _not_opened()
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
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        for place in read_header(path)[0].values():
            sizes[place.spec.dtype] = sizes.get(place.spec.dtype, 0) + place.spec.size
    return max((word for word in sizes if word in ROUNDING), key=lambda word: sizes[word], default="F32")


def _fits(folder: Path) -> bool:
    """Whether plain transformers can hold the model in fp32 beside what else is in memory."""
    free = free_bytes("cpu")
    return free is None or parameters_in(folder.glob("*.safetensors")) * 4 * 2 < free


def _not_opened() -> bytes:
    says = "the model does not fit into this machine's memory, so it was not opened; its bytes are digested in luthier.json."
    return Proof("inconclusive", False, 0.0, 0.0, None, "nothing", says).to_bytes()
