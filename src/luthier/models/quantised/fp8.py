"""Products in fp8: activations and gradients are rounded to e4m3 by row on the fly, the weight is e4m3 already.

Forward multiplies x (rows) with W (rows): both have their longest dimension in memory order, which is the one layout that
tensor cores take for fp8, and each row's scale factors out of the sum. Backward needs W's columns instead: the row scales of
W can't be factored out of a sum over rows, so they are folded into the gradient before that is rounded, and the codes are
transposed on the fly. So one copy of W serves both directions.

Whether `torch._scaled_mm` works depends on device, library versions and their bugs, not on a capability number; so it is
tried once per device and compared. Elsewhere the same numbers are multiplied in fp32.
"""

from __future__ import annotations

import functools

import torch

from luthier.models.quantised.formats import by_row

_E4M3 = torch.float8_e4m3fn
_MULTIPLE = 16
"""Both inner and outer dimensions of tensor cores' fp8 products."""


def forward(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x (…, in) times W (out, in) transposed, in x's dtype."""
    rows, row_scales = by_row(x.reshape(-1, x.shape[-1]))
    weight = codes.view(_E4M3)
    product = _multiply(rows, row_scales, weight, scales.view(torch.float32), x.dtype)
    return product.reshape(*x.shape[:-1], codes.shape[0])


def backward(grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """grad (…, out) times W (out, in), in grad's dtype."""
    folded = grad.reshape(-1, grad.shape[-1]).to(torch.float32) * scales.view(torch.float32).reshape(1, -1)
    rows, row_scales = by_row(folded)
    turned = codes.t().contiguous().view(_E4M3)
    ones = torch.ones(turned.shape[0], 1, device=grad.device)
    return _multiply(rows, row_scales, turned, ones, grad.dtype).reshape(*grad.shape[:-1], codes.shape[1])


def multiplies_in_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` with a scale a row runs on this device and is right; tried on a small product."""
    return _trial(str(device), dtype)


@functools.cache
def _trial(device: str, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator).to(device) for size in ((48, 64), (32, 64)))
    (a, a_scales), (b, b_scales) = by_row(left), by_row(right)
    try:
        found = _scaled(a, a_scales, b, b_scales, dtype)
    except (RuntimeError, NotImplementedError, ValueError, AttributeError):
        return False
    wanted = _emulated(a, a_scales, b, b_scales, torch.float32)
    return bool((found.float() - wanted).abs().max() <= 2**-7 * wanted.abs().max())


def _multiply(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """a (m, k) times b (n, k) transposed, both e4m3 with a scale a row."""
    divides = a.shape[1] % _MULTIPLE == 0 and b.shape[0] % _MULTIPLE == 0
    if divides and a.shape[0] and multiplies_in_fp8(a.device, dtype):
        return _scaled(a, a_scales, b, b_scales, dtype)
    return _emulated(a, a_scales, b, b_scales, dtype)


def _scaled(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return torch._scaled_mm(a, b.t(), scale_a=a_scales, scale_b=b_scales.reshape(1, -1), out_dtype=dtype)


def _emulated(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return (a.to(torch.float32) @ b.to(torch.float32).t() * a_scales * b_scales.reshape(1, -1)).to(dtype)
