"""What a live model is: class, adapters, what trains, precision."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from luthier.models.quantised.layer import quantised_layers


@dataclass(frozen=True)
class Description:
    """What a live model is."""

    class_name: str
    adapters: dict[str, str]
    trainable: int
    parameters: int
    precision: str
    fast_forms: tuple[str, ...] = ()
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    trains: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        adapters = ", ".join(f"{name} ({self._of(name)})" for name in self.adapters) or "none"
        return (
            f"{self.class_name} in {self.precision}: {self.trainable:,} of {self.parameters:,} parameters train; "
            f"adapters: {adapters}; fast forms: {', '.join(self.fast_forms) or 'none'}"
        )

    def _of(self, name: str) -> str:
        rank = f" r={self.ranks[name]}" if name in self.ranks else ""
        state = ", merged" if name in self.merged else "" if name in self.active else ", inactive"
        return f"{self.adapters[name]}{rank}{state}"


def describe(model: nn.Module) -> Description:
    """Say of a live model what it is: class, adapters, what trains, precision."""
    peft = hasattr(model, "peft_config") and hasattr(model, "base_model")
    base = model.get_base_model() if peft else model  # type: ignore[operator]
    configs: Mapping[str, Any] = model.peft_config if peft else {}  # type: ignore[assignment]
    adapters = {name: str(config.peft_type.value).lower() for name, config in configs.items()}
    ranks = {name: int(config.r) for name, config in configs.items() if isinstance(getattr(config, "r", None), int)}
    status = model.get_model_status() if peft and not any(c.is_prompt_learning for c in configs.values()) else None  # type: ignore[operator]
    merged = tuple(status.merged_adapters) if status and status.merged_adapters != "irregular" else ()
    active = tuple(model.active_adapters) if peft and (status is None or status.enabled is not False) else ()  # type: ignore[arg-type]
    trains: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trains[re.sub(r"\.\d+\.", ".*.", name)] += parameter.numel()
    dtype = str(getattr(base, "dtype", next(model.parameters()).dtype)).removeprefix("torch.")
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    count = sum(parameter.numel() for parameter in model.parameters())
    packed = quantised_layers(base)
    count += sum(
        layer.in_features * layer.out_features - layer.codes.numel() - layer.scales.numel() for layer in packed
    )
    return Description(
        type(base).__name__, adapters, sum(trains.values()), count, packed[0].form if packed else names.get(dtype, dtype),
        active=active, merged=merged, ranks=ranks, trains=dict(trains),
    )  # fmt: skip
