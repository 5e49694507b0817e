"""Whether a model fits where it is to go, told before anything of it is read."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from luthier.artifacts.files import available_memory
from luthier.artifacts.tensorfile import read_header
from luthier.config.schema import Precision
from luthier.errors import RequestError

_BYTES: dict[Precision, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1, "nf4": 0.5 + 4 / 64}
"""Bytes a number; of a quantised base the least, since what stays in 16 bits isn't counted."""


def parameters_in(files: Iterable[Path]) -> int:
    """How many numbers a set of safetensors files holds, by their headers."""
    return sum(math.prod(place.spec.shape) for file in files for place in read_header(file)[0].values())


def free_bytes(device: str | torch.device) -> int | None:
    """Bytes free on a device, cached blocks released first; None where nobody says."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    return available_memory()


def check_room(parameters: int, precision: Precision, device: str | torch.device, free: int | None) -> None:
    """Refuse a model that does not fit in what is free.

    Raises:
        RequestError: too little is free; it says which precision or device would do.
    """
    needed = parameters * _BYTES[precision]
    if free is None or needed <= free:
        return
    on_cpu = torch.device(device).type == "cpu"
    fitting = next((word for word in ("bf16", "fp8", "nf4") if parameters * _BYTES[word] <= free and _BYTES[word] < _BYTES[precision]), None)  # fmt: skip
    smaller = fitting is not None
    remedy = f"Take precision={fitting!r}, which fits." if smaller else "Take a smaller model, or free memory."
    if not on_cpu and not smaller:
        in_ram = free_bytes("cpu")
        if in_ram is not None and needed <= in_ram:
            remedy = "Take device='cpu', where it fits."
    raise RequestError(
        f"the model needs {needed / 2**30:.1f} GiB in {precision}, and {free / 2**30:.1f} GiB are free on {device}.",
        code="no-memory-for-model",
        where="device",
        remedy=remedy,
    )


def give_back_free() -> None:
    """Let the C library give room that it keeps for later back to the system, where it can (glibc)."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
