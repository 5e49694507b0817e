"""The dtype a model is held in while it computes."""

from __future__ import annotations

import torch

from luthier.config.schema import ModelConfig, Precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(model: ModelConfig, device: str | torch.device) -> Precision:
    """The precision asked for, or the default of the device: bf16 on a GPU that computes in it, else fp16; fp32 on a CPU."""
    if model.precision is not None:
        return model.precision
    kind = torch.device(device).type
    if kind == "cpu":
        return "fp32"
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"
