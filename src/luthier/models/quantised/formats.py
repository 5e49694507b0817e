"""Three ways to hold one matrix in 4 or 8 bits, as bytes: codes beside scales, rows whole.

    nf4     blocks of 64 along the row, one fp32 scale a block; two 4-bit codes a byte, the first in the upper half.
            Bit for bit what bitsandbytes packs without double quantisation, whose second level of scales crosses rows.
    int8    one fp32 scale a row, its largest magnitude; a code stands for code × scale / 127. Bit for bit bitsandbytes',
            which rounds the matrix to fp16 first.
    fp8     e4m3, one fp32 scale a row: the largest magnitude lands on 448, the largest number of e4m3.

Both tensors are uint8 of shape (rows, bytes a row), so that a cast, a shard along the first dimension or a copy of rows
leaves every row with its own scales.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from luthier.errors import RequestError

Form = Literal["nf4", "int8", "fp8", "fp4"]
FORMS: tuple[Form, ...] = ("nf4", "int8", "fp8")
"""What matrices are packed to; fp4, and blocks of other lengths, are only read where a folder has them."""
FOUR_BITS: tuple[Form, ...] = ("nf4", "fp4")
BLOCK = 64
LARGEST_E4M3 = 448.0
_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Elements quantised at once: what a kernel needs beside its input stays small against one layer."""


class Packed(NamedTuple):
    """A matrix in bytes: `codes` (rows, bytes) and `scales` (rows, 4 × scales a row), both uint8."""

    codes: torch.Tensor
    scales: torch.Tensor


def fits(columns: int, form: Form) -> bool:
    """Whether rows of this length can be held whole: nf4's blocks must not cross rows."""
    return form not in FOUR_BITS or columns % BLOCK == 0


def code_bytes(columns: int, form: Form) -> int:
    """Bytes of one row's codes."""
    return columns // 2 if form in FOUR_BITS else columns


def scale_bytes(columns: int, form: Form) -> int:
    """Bytes of one row's scales."""
    return 4 * (columns // BLOCK) if form in FOUR_BITS else 4


def block_of(codes: torch.Tensor, scales: torch.Tensor) -> int:
    """How many numbers in 4 bits share a scale."""
    return 8 * codes.shape[1] // scales.shape[1]


@torch.no_grad()
def quantise(weight: torch.Tensor, form: Form) -> Packed:
    """Pack a matrix (rows, columns), on its device.

    Raises:
        RequestError: bitsandbytes, whose kernels pack nf4 and int8, is not installed.
        ValueError: rows don't divide into nf4's blocks.
    """
    rows, columns = weight.shape
    if not fits(columns, form):
        raise ValueError(f"rows of {columns} don't divide into blocks of {BLOCK}")
    codes = torch.empty(rows, code_bytes(columns, form), dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, scale_bytes(columns, form), dtype=torch.uint8, device=weight.device)
    step = max(1, _AT_ONCE.get(weight.device.type, 1 << 20) // columns)
    for first in range(0, rows, step):
        part = _PACK[form](weight[first : first + step].contiguous())
        codes[first : first + step] = part.codes
        scales[first : first + step] = part.scales
    return Packed(codes, scales)


@torch.no_grad()
def scales_of(weight: torch.Tensor, form: Form) -> torch.Tensor:
    """The scales that `quantise` gives, without the codes: for whoever writes one and then the other."""
    if form == "nf4":
        return as_bytes(weight.reshape(weight.shape[0], -1, BLOCK).abs().amax(dim=2))
    if form == "int8":
        return as_bytes(weight.to(torch.float16).abs().amax(dim=1, keepdim=True))
    return as_bytes(row_scales(weight))


@torch.no_grad()
def dequantise(codes: torch.Tensor, scales: torch.Tensor, form: Form, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (rows, columns) that codes and scales stand for, rounded once to `dtype`."""
    if form in FOUR_BITS:
        return _unpack_four_bits(codes, scales, form, dtype)
    return _UNPACK[form](codes, scales.view(torch.float32), dtype)


def kernels() -> None:
    """Import bitsandbytes, which registers its kernels with torch.

    Raises:
        RequestError: it is not installed, or does not load here.
    """
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise RequestError(
            f"nf4 and int8 compute with bitsandbytes' kernels, and it can't be imported: {error}.",
            code="bitsandbytes",
            where="model.precision",
            remedy='`pip install "luthier[bitsandbytes]"`, or take fp8 or bf16.',
        ) from error


def as_bytes(scales: torch.Tensor) -> torch.Tensor:
    """fp32 scales as bytes."""
    return scales.to(torch.float32).contiguous().view(torch.uint8)


def _pack_nf4(weight: torch.Tensor) -> Packed:
    kernels()
    rows, columns = weight.shape
    codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(weight, BLOCK, "nf4", torch.uint8)
    return Packed(codes.view(rows, columns // 2), as_bytes(scales.view(rows, columns // BLOCK)))


def _unpack_four_bits(codes: torch.Tensor, scales: torch.Tensor, form: Form, dtype: torch.dtype) -> torch.Tensor:
    shape, absmax = [codes.shape[0], 2 * codes.shape[1]], scales.view(torch.float32).reshape(-1)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        codes.view(-1, 1), absmax, block_of(codes, scales), form, shape, dtype
    )


def _pack_int8(weight: torch.Tensor) -> Packed:
    kernels()
    codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weight.to(torch.float16))
    codes[scales == 0] = 0  # 0 / 0 otherwise, which a CPU and a GPU round to different bytes
    return Packed(codes.view(torch.uint8), as_bytes(scales.view(-1, 1)))


def _unpack_int8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.view(torch.int8) * (scales / 127.0)).to(dtype)


def _pack_fp8(weight: torch.Tensor) -> Packed:
    codes, scales = by_row(weight)
    return Packed(codes.view(torch.uint8), as_bytes(scales))


def _unpack_fp8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.view(torch.float8_e4m3fn).to(torch.float32) * scales).to(dtype)


def row_scales(matrix: torch.Tensor) -> torch.Tensor:
    """fp32 scales (rows, 1) that bring each row's largest magnitude to e4m3's."""
    largest = matrix.abs().amax(dim=1, keepdim=True).to(torch.float32)
    return torch.where(largest == 0, 1.0, largest / LARGEST_E4M3)


def by_row(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in e4m3 and its fp32 scales (rows, 1); a row of zeros has scale 1."""
    scales = row_scales(matrix)
    scaled = (matrix.to(torch.float32) / scales).clamp_(-LARGEST_E4M3, LARGEST_E4M3)  # a cast beyond 448 gives NaN
    return scaled.to(torch.float8_e4m3fn), scales


_PACK = {"nf4": _pack_nf4, "int8": _pack_int8, "fp8": _pack_fp8}
_UNPACK = {"int8": _unpack_int8, "fp8": _unpack_fp8}
