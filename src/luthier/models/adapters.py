"""Attaching the adapter to train, and saying what it is attached to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from luthier.config.schema import AdapterConfig
from luthier.models.open import Base


def attach(
    base: Base, adapter: AdapterConfig, *, new_token_ids: Sequence[int] = (), base_name: str, seed: int
) -> PeftModel:
    """Wraps the base in a peft model whose adapter is initialised from `seed` alone."""
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha if adapter.alpha is not None else 2 * adapter.r,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base.model, config)
    model.peft_config["default"].base_model_name_or_path = base_name
    return model


def summary(model: nn.Module, adapter: AdapterConfig | None) -> str:
    """What trains, in one line: "LoRA r16 on 210 layers, 4.9 M of 134.5 M parameters"."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if adapter is None:
        return f"full fine-tuning, all {trained / 1e6:.1f} M (no `adapter` in the run file)"
    every = sum(p.numel() for p in model.parameters()) - trained
    layers = len({n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n})
    return f"LoRA r{adapter.r} on {layers} layers, {trained / 1e6:.1f} M of {every / 1e6:.1f} M parameters"
