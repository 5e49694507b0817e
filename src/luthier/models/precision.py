"""The dtype a model is held in while it computes."""

from __future__ import annotations

from typing import cast

import torch

from luthier.config.schema import QUANTISED, ModelConfig, Precision
from luthier.models.quantised.formats import Form

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(model: ModelConfig, device: str | torch.device) -> Precision:
    """The precision asked for, or the default of the device: bf16 on a GPU that computes in it, else fp16; fp32 on a CPU."""
    if model.precision is not None:
        return model.precision
    return unquantised_precision(device)


def form_of(model: ModelConfig) -> Form | None:
    """The form that a base's layers are quantised to; None for one in 16 or 32 bits."""
    return cast(Form, model.precision) if model.precision in QUANTISED else None


def dtype_of(model: ModelConfig, device: str | torch.device) -> torch.dtype:
    """What a base's layers compute in; of a quantised base, those that are not quantised are held in it."""
    return DTYPES[unquantised_precision(device) if form_of(model) else resolve_precision(model, device)]


def unquantised(model: ModelConfig, device: str | torch.device) -> ModelConfig:
    """The same base without quantisation, which is what is written, merged and compared."""
    if form_of(model) is None:
        return model
    return model.model_copy(update={"precision": unquantised_precision(device), "keep_16bit": []})


def unquantised_precision(device: str | torch.device) -> Precision:
    """bf16 on a GPU that computes in it, else fp16; fp32 on a CPU, most of which multiply bf16 far slower."""
    kind = torch.device(device).type
    if kind == "cpu":
        return "fp32"
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"
