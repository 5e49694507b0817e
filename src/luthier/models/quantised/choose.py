"""Which layers of a base are quantised, and which stay in 16 bits and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.config.schema import ModelConfig
from luthier.errors import RequestError
from luthier.models.quantised.formats import BLOCK, Form, fits
from luthier.models.targets import check_names, is_head, is_router, name_matches


@dataclass(frozen=True)
class Choice:
    """Names of the layers that are quantised, and of the linear layers that stay in 16 bits; notes say why."""

    quantised: frozenset[str]
    kept: tuple[str, ...]
    notes: tuple[str, ...]


def quantisation_of(model: ModelConfig, choice: Choice) -> dict[str, Any]:
    """What manifests say of a quantised base, beside the fingerprint of what it was made from.

    `keep_16bit` and `fp8` are what to ask for to get the same again; `kept` is what came of it.
    """
    facts: dict[str, Any] = {
        "precision": model.precision,
        "keep_16bit": list(model.keep_16bit),
        "kept": list(choice.kept),
    }
    return facts | ({"fp8": model.fp8} if model.precision == "fp8" else {})


def choose(model: PreTrainedModel, form: Form, keep: Sequence[str]) -> Choice:
    """Every plain linear layer is quantised but routers, the head, and what `keep` names.

    Raises:
        RequestError: `keep` names nothing, or no layer is left.
    """
    check_names(model, keep, "model.keep_16bit")
    quantised, kept, unfit, other = set(), [], [], []
    in_fp32 = [name for name in (getattr(model, "_keep_in_fp32_modules", None) or ())]
    tied = _tied(model)
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and type(module) is not nn.Linear):
            other.append(name)
        if type(module) is not nn.Linear:
            continue
        if (
            is_router(name)
            or is_head(model, name)
            or name_matches(name, list(keep))
            or id(module.weight) in tied
            or any(part in name.split(".") for part in in_fp32)
        ):
            kept.append(name)
        elif not fits(module.in_features, form):
            unfit.append(name)
        else:
            quantised.add(name)
    if not quantised:
        raise RequestError(
            f"no layer of this model can be held in {form}: none is a plain linear layer whose inputs divide by {BLOCK}."
            if unfit or other
            else "no linear layer is left to quantise.",
            code="nothing-to-quantise",
            where="model.precision",
            remedy="Take int8, fp8 or bf16, or name fewer layers in model.keep_16bit.",
        )
    notes = []
    if unfit:
        notes.append(f"These stay in 16 bits, because their inputs don't divide by {BLOCK}: {_folded(unfit)}.")
    fused = sorted({name.rpartition(".")[2] for name, weight in model.named_parameters() if weight.ndim == 3})
    if other or fused:
        notes.append(f"These stay in 16 bits, because they are no plain linear layers: {_folded([*other, *fused])}.")
    return Choice(frozenset(quantised), tuple(sorted([*kept, *unfit, *other])), tuple(notes))


def _tied(model: PreTrainedModel) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _folded(names: Sequence[str]) -> str:
    folded = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    return ", ".join(folded[:6]) + (", …" if len(folded) > 6 else "")
