"""Opening what was mended before it gets its name: every tensor has its place, and plain libraries compute the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier.config.schema import ModelConfig
from luthier.errors import ArtifactError
from luthier.export.proof.prove import (
    TEXTS,
    Proof,
    compare,
    largest_difference,
    live_answers,
    make_probe,
    plain_answers,
)
from luthier.models.coverage import check_coverage
from luthier.models.open import open_base
from luthier.models.quiet import quiet


@dataclass
class Checked:
    """What the check found: a sentence, figures, and the proof where one could be made."""

    says: str
    facts: dict[str, Any] = field(default_factory=dict)
    proof: Proof | None = None


def check_mended(folder: Path, kind: str, base: Path | None, merged: Path | None, *, prove: bool) -> Checked:
    """Open a mended folder, with a coverage check, and prove it by plain libraries where a tokenizer is at hand.

    Args:
        base: an adapter's; the one its config names if None, and only its files are checked where that isn't here.
        merged: the model that a recovered adapter should equal; how far it does is measured.

    Raises:
        ArtifactError: the folder does not open, lacks or adds tensors, or the proof failed.
    """
    if kind == "base" and not _has_tokenizer(folder):
        _open_model(folder)
        return Checked("Opened by transformers with every tensor in its place; not proven, for want of a tokenizer (--base BASE gives one).")  # fmt: skip
    if kind == "adapter":
        named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        where = base or Path(str(named))
        if not (where / "config.json").is_file():
            return Checked("Not opened, because its base is not at hand (--base BASE).")
        from luthier.models.saved_adapter import open_adapter

        model: Any
        model, tokenizer = open_adapter(open_base(ModelConfig(path=str(where))), folder, trainable=False)
    else:
        opened = open_base(ModelConfig(path=str(folder)))
        model, tokenizer = opened.model, opened.tokenizer
    probe = make_probe(model, [tokenizer(text)["input_ids"] for text in TEXTS], deterministic=False, trust_remote_code=False)  # fmt: skip
    live = live_answers(model, tokenizer, probe)
    del model
    says = "Opened with every tensor in its place; "
    proof = None
    if not prove:
        says += "no proof was asked for."
    elif not _has_tokenizer(folder):
        says += "not proven, for want of a tokenizer (--base BASE gives one)."
    else:
        proof = compare(live, plain_answers(folder, probe, base=str(base) if base else None), device=probe.device)
        says += f"proof {proof.verdict}: {proof.says}"
    if proof is not None and proof.verdict == "failed":
        raise ArtifactError(f"the proof failed: {proof.says}", code="proof-failed", where=str(folder), remedy="Nothing was published.")  # fmt: skip
    facts: dict[str, Any] = {}
    if merged is not None:
        whole = _open_model(merged)
        wanted = live_answers(whole.to(getattr(torch, probe.dtype)), tokenizer, probe).logits
        facts["against_merged"] = {"max_logit_difference": largest_difference(wanted, live.logits)}
        says += f" Its logits differ from the merged model's by up to {facts['against_merged']['max_logit_difference']:.3g}."  # fmt: skip
    return Checked(says, facts, proof)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def _open_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True)  # fmt: skip
    model, loading = opened
    check_coverage(loading, str(folder))
    return model.eval()
