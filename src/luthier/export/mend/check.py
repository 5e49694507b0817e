"""Opening what was mended before it gets its name: every tensor has its place, and plain libraries compute the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier.config.schema import ModelConfig
from luthier.errors import ArtifactError
from luthier.export.proof.prove import (
    TEXTS,
    Probe,
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

CARRIED = 0.1
"""A recovered adapter is one if at most this share of what training did to the logits is missing."""


@dataclass
class Checked:
    """What the check found: a sentence, figures, and the proof where one could be made."""

    says: str
    facts: dict[str, Any] = field(default_factory=dict)
    proof: Proof | None = None


def check_mended(
    folder: Path, kind: str, base: Path | None, merged: Path | None, *, prove: bool, approximate: bool = False
) -> Checked:
    """Open a mended folder, with a coverage check, and prove it by plain libraries where a tokenizer is at hand.

    Args:
        base: an adapter's; the one its config names if None, and only its files are checked where that isn't here.
        merged: the model that a recovered adapter should equal; the proof measures how far it does.
        approximate: its rank was chosen by someone, so a part may be missing; the proof says how much.

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
    says, facts, proof = "Opened with every tensor in its place; ", {}, None
    if not prove:
        says += "no proof was asked for."
    elif not _has_tokenizer(folder):
        says += "not proven, for want of a tokenizer (--base BASE gives one)."
    else:
        found = plain_answers(folder, probe, base=str(base) if base else None)
        proof = compare(live, found, device=probe.device)
        if merged is not None and proof.verdict != "failed":
            facts["against_merged"], proof = _against_merged(
                merged, tokenizer, probe, proof, found.logits, found.plain, approximate
            )
        says += f"proof {proof.verdict}: {proof.says}"
    if proof is not None and proof.verdict == "failed":
        raise ArtifactError(f"the proof failed: {proof.says}", code="proof-failed", where=str(folder), remedy="Nothing was published.")  # fmt: skip
    return Checked(says, facts, proof)


def _against_merged(
    merged: Path, tokenizer: Any, probe: Probe, proof: Proof,
    found: Sequence[torch.Tensor], plain: Sequence[torch.Tensor], approximate: bool,
) -> tuple[dict[str, float], Proof]:  # fmt: skip
    """Whether base and recovered adapter compute what the merged model does.

    The measure is the share of what training did to the logits that is missing: ‖merged - recovered‖ / ‖merged - base‖.
    A merge in 16 bits was rounded, and so is the computation, so some is; an adapter with a wrong scale, a missing
    layer or swapped factors is off by as much as training did.
    """
    whole = _open_model(merged)
    wanted = live_answers(whole.to(getattr(torch, probe.dtype)), tokenizer, probe).logits
    left = _distance(wanted, found)
    missing = left / max(_distance(wanted, plain), torch.finfo(torch.float32).tiny)
    facts = {"max_logit_difference": largest_difference(wanted, found), "missing_share": missing}
    told = f"the merged model's logits are matched but for {missing:.2g} of what training did to them (up to {facts['max_logit_difference']:.3g})"  # fmt: skip
    if missing <= CARRIED:
        return facts, replace(proof, says=f"{proof.says} As an adapter: {told}.")
    if approximate and missing < 1:
        says = f"{told}, which the rank that was asked for does not carry; what it does carry was {proof.says}"
        return facts, replace(proof, verdict="inconclusive", passed=False, says=says)
    says = f"{told}, more than the {CARRIED:g} that rounding may cost a recovered adapter."
    return facts, replace(proof, verdict="failed", passed=False, says=says, differences=(says,))


def _distance(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([(a.double() - b.double()).norm() for a, b in zip(left, right, strict=True)]).norm())


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def _open_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        opened: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True)  # fmt: skip
    model, loading = opened
    check_coverage(loading, str(folder))
    return model.eval()
