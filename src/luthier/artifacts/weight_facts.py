"""Facts about weights that names, shapes and configs tell: how many parameters, in what precision, what adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from luthier.artifacts.names import ADAPTER_PARTS, of_adapter
from luthier.artifacts.tensorfile import TensorSpec

_FLOATS = ("F64", "F32", "F16", "BF16")
PRECISIONS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "fp8"}
# What bitsandbytes keeps beside its codes: scales and tables, no parameters of the model.
_BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format")
_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "modules_to_save")


def count(specs: Iterable[TensorSpec], config: dict[str, Any]) -> int:
    """Parameters of a model: two to a byte where bitsandbytes packed them."""
    packed = 2 if is_four_bit(config) else 1
    total = 0
    for spec in specs:
        if not _is_beside(spec.name):
            total += math.prod(spec.shape) * (packed if spec.dtype == "U8" else 1)
    return total


def precision_of(specs: Iterable[TensorSpec], config: dict[str, Any]) -> str | None:
    """How most of the weights are held: the quantisation's name, else the dtype with most elements."""
    method = quantisation(config)
    if method:
        return method
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype] += math.prod(spec.shape)
    widest = sizes.most_common(1)[0][0] if sizes else None
    return PRECISIONS.get(widest, widest.lower()) if widest else None


def main_float(specs: Iterable[TensorSpec]) -> str:
    """safetensors' word for the floating dtype that most bytes are in; ``F32`` where there is none."""
    sizes: Counter[str] = Counter()
    for spec in specs:
        if spec.dtype in _FLOATS:
            sizes[spec.dtype] += spec.size
    return sizes.most_common(1)[0][0] if sizes else "F32"


def quantisation(config: dict[str, Any]) -> str | None:
    """``nf4``, ``int8``, ``gptq-4bit`` … as the config tells, None for plain weights."""
    told = config.get("quantization_config")
    if not isinstance(told, dict):
        return None
    method = str(told.get("quant_method") or "unknown")
    if method == "bitsandbytes" or "load_in_4bit" in told or "load_in_8bit" in told:
        if is_four_bit(config):
            return str(told.get("bnb_4bit_quant_type") or "fp4")
        return "int8"
    bits = told.get("bits")
    return f"{method}-{bits}bit" if type(bits) is int else method


def is_four_bit(config: dict[str, Any]) -> bool:
    """Whether bitsandbytes' 4-bit codes are in the weights."""
    told = config.get("quantization_config")
    return isinstance(told, dict) and bool(told.get("load_in_4bit") or told.get("_load_in_4bit"))


def _is_beside(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in _BESIDE or "quant_state" in parts


def adapter_facts(config: dict[str, Any]) -> dict[str, Any]:
    """What an adapter_config.json says of its adapter."""
    told = {"type": str(config.get("peft_type", "unknown")).lower(), "r": None}
    return told | {key: config[key] for key in _KEYS if config.get(key) is not None}


def adapter_of_names(specs: Iterable[TensorSpec]) -> dict[str, Any]:
    """What names and shapes tell of an adapter without a config: its method, rank and targets."""
    method, ranks, targets = "unknown", Counter[int](), set()
    for spec in specs:
        parts = of_adapter(spec.name).name.split(".")
        own = next((index for index, part in enumerate(parts) if part.startswith(ADAPTER_PARTS)), None)
        if own is None:
            continue
        method = next(part for part in ADAPTER_PARTS if parts[own].startswith(part)).rstrip("_")
        if own:
            targets.add(parts[own - 1])
        if parts[own] == "lora_A" and spec.shape:
            ranks[spec.shape[0]] += 1
    told: dict[str, Any] = {"type": method, "r": ranks.most_common(1)[0][0] if ranks else None}
    return told | {"target_modules": sorted(targets)}
