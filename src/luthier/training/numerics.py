"""Process-wide settings that decide bits: changed for a run, put back after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from luthier.config.schema import RunConfig
from luthier.models.quantised.fp8 import multiplies_in_fp8
from luthier.models.quantised.layer import quantised_layers


@contextmanager
def settled(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Deterministic kernels where asked for; the caller's random state and settings are as before afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if config.train.deterministic and device.type == "cuda":
        # cuBLAS knows no other way to be told, and reads this once, when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.use_deterministic_algorithms(config.train.deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


def environment(device: torch.device, model: Any) -> dict[str, Any]:
    """What decides bits besides config and data; compared when a run is resumed."""
    fp8 = [layer for layer in quantised_layers(model) if layer.multiplies == "fp8"]
    products = {"fp8": "tensor cores" if multiplies_in_fp8(device, fp8[0].computes_in) else "emulated"} if fp8 else {}
    return {
        **products,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "attention": getattr(model.config, "_attn_implementation", None),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed of the environment, one phrase each."""
    return [f"{key} {old[key]} → {new[key]}" for key in new if key in old and old[key] != new[key]]
