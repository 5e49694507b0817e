"""torch's dtypes by the words that safetensors has for them, and a tensor's bytes."""

from __future__ import annotations

import torch

from luthier.artifacts.tensorfile import TensorSpec

TO_FILE = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
}
FROM_FILE = {name: dtype for dtype, name in TO_FILE.items()}


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """A tensor's entry in a file; of a sharded tensor, the whole one's."""
    return TensorSpec(name, TO_FILE[tensor.dtype], tuple(tensor.shape))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, not a copy."""
    flat = tensor.reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
