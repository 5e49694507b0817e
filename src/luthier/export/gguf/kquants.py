"""Rows of fp32 as GGUF blocks: F32, F16, BF16, Q8_0 and the K-quants Q4_K, Q5_K and Q6_K.

A K-quant's block holds 256 values. Q6_K: sixteen groups of 16, ``x ≈ d·s·q`` with q in -32…31 and 8-bit s. Q4_K and Q5_K:
eight groups of 32, ``x ≈ d·s·q - e·m`` with q in 0…15 or 0…31, 6-bit s and m; d and e are fp16. The scales of a group are
fitted by least squares, weighted towards large values, to the best of several roundings; then they are rounded themselves,
and the values rounded anew to what the rounded scales can say. Layouts: gguf's reference, docs of ggml (block_q4_K …).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

Kind = GGMLQuantizationType
GROUP = 1 << 16  # elements at a time, so that what is computed on stays in the processor's cache
_TINY = 1e-30


def row_bytes(kind: Kind, width: int) -> int:
    """Bytes of a row of ``width`` elements, which must fill whole blocks."""
    block, size = GGML_QUANT_SIZES[kind]
    return width // block * size


def encode(kind: Kind, rows: torch.Tensor) -> torch.Tensor:
    """Pack ``rows`` (fp32, n × width) into bytes (uint8, n × row_bytes)."""
    count, width = rows.shape
    out = torch.empty(count, row_bytes(kind, width), dtype=torch.uint8)
    block = GGML_QUANT_SIZES[kind][0]
    blocks, packed = rows.contiguous().view(-1, block), out.view(-1, GGML_QUANT_SIZES[kind][1])
    step = max(1, GROUP // block)
    pack = _PACK[kind]
    for start in range(0, len(blocks), step):
        packed[start : start + step] = pack(blocks[start : start + step])
    return out


def _plain(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype).view(torch.uint8)


def _q8_0(x: torch.Tensor) -> torch.Tensor:
    """Per 32 values an fp16 scale and 32 signed bytes."""
    scale = x.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale.clamp_min(_TINY), 0)
    codes = _round_away(x * inverse).to(torch.int8).view(torch.uint8)
    return torch.cat([_half(scale), codes], 1)


def _q6_k(x: torch.Tensor) -> torch.Tensor:
    groups = x.view(-1, 16, 16)
    scales = _symmetric_scales(groups, 32)
    at = scales.abs().argmax(1, keepdim=True)
    step = (scales.gather(1, at) / -128).half().float()
    quantised = _over(scales, step).round_().clamp_(-128, 127)
    codes = (
        _over(groups, (step * quantised).unsqueeze(2)).round_().clamp_(-32, 31).add_(32).to(torch.uint8).view(-1, 256)
    )
    halves = codes.view(-1, 2, 4, 32)
    low, high = halves & 15, halves >> 4
    ql = torch.cat([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], 2)
    qh = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    return torch.cat([ql.flatten(1), qh.flatten(1), quantised.to(torch.int8).view(torch.uint8), _half(step)], 1)


def _q4_k(x: torch.Tensor) -> torch.Tensor:
    header, codes = _affine(x, 15)
    pairs = codes.view(-1, 4, 2, 32)
    return torch.cat([header, (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)], 1)


def _q5_k(x: torch.Tensor) -> torch.Tensor:
    header, codes = _affine(x, 31)
    pairs = (codes & 15).view(-1, 4, 2, 32)
    fifth = codes >> 4
    high = fifth[:, 0].clone()
    for group in range(1, 8):
        high |= fifth[:, group] << group
    return torch.cat([header, high, (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)], 1)


def _affine(x: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sixteen bytes of scales of each block (d, e, s and m), and the codes (n × 8 × 32)."""
    groups = x.view(-1, 8, 32)
    scales, minima = _affine_scales(groups, top)
    step, offset = ((each.amax(1, keepdim=True) / 63).half().float() for each in (scales, minima))
    s = _over(scales, step).round_().clamp_(0, 63)
    m = _over(minima, offset).round_().clamp_(0, 63)
    codes = _codes(groups, step * s, offset * m, top)
    step, offset = _refitted(groups, codes, s, m, step, offset)
    codes = _codes(groups, step * s, offset * m, top).to(torch.uint8)
    s, m = s.to(torch.uint8), m.to(torch.uint8)
    packed = torch.cat(
        [
            s[:, :4] | ((s[:, 4:] >> 4) << 6),
            m[:, :4] | ((m[:, 4:] >> 4) << 6),
            (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
        ],
        1,
    )
    return torch.cat([_half(step), _half(offset), packed], 1), codes


def _codes(groups: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, top: int) -> torch.Tensor:
    return _over(groups + minima.unsqueeze(2), scales.unsqueeze(2)).round_().clamp_(0, top)


def _refitted(
    groups: torch.Tensor,
    codes: torch.Tensor,
    s: torch.Tensor,
    m: torch.Tensor,
    step: torch.Tensor,
    offset: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d and e of each block, by least squares for its codes and rounded scales; as they were where that has no answer."""
    scaled = codes * s.unsqueeze(2)
    sums, squares, products = scaled.sum(2), scaled.square().sum(2), (scaled * groups).sum(2)
    uu, uv, vv = squares.sum(1, True), -(sums * m).sum(1, True), 32 * m.square().sum(1, True)
    ux, vx = products.sum(1, True), -(groups.sum(2) * m).sum(1, True)
    determinant = uu * vv - uv.square()
    d = torch.where(vv > 0, _over(vv * ux - uv * vx, determinant), _over(ux, uu))
    e = torch.where(vv > 0, _over(uu * vx - uv * ux, determinant), offset)
    good = (d > 0) & (e >= 0)
    return torch.where(good, d, step).half().float(), torch.where(good, e, offset).half().float()


def _affine_scales(x: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset (≥ 0) of each group (n × groups × 32): of several roundings that of the least weighted error.

    The groups lie side by side while they are compared, so that sums over a group add whole vectors. The error of a
    rounding follows from three sums, and is never computed value by value.
    """
    shape = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1]).t().contiguous()
    weight = x.abs() + (_sum(x.square()) / len(x)).sqrt()
    low = x.amin(0).clamp_max_(0)
    spread = x.amax(0) - low
    above, weighted_x = x - low, weight * x
    total, total_x = _sum(weight.clone()), _sum(weighted_x.clone())
    best_scale, best_low = spread / top, low
    best = torch.full_like(low, float("inf"))
    first = top - (1.0 if top == 15 else 0.5)
    codes, weighted = torch.empty_like(x), torch.empty_like(x)
    for number in range(-1, 7 if top == 15 else 5):
        reach = top if number < 0 else first + 0.3 * number  # the plain rounding first
        torch.mul(above, _over(torch.full_like(spread, reach), spread), out=codes).round_().clamp_(0, top)
        sum_qx = _sum(torch.mul(weighted_x, codes, out=weighted))
        sum_q = _sum(torch.mul(weight, codes, out=weighted))
        sum_qq = _sum(torch.mul(weight, codes.square_(), out=weighted))
        determinant = total * sum_qq - sum_q.square()
        scale = _over(total * sum_qx - total_x * sum_q, determinant)
        minimum = _over(sum_qq * total_x - sum_q * sum_qx, determinant)
        positive = minimum > 0
        scale = torch.where(positive, _over(sum_qx, sum_qq), scale)
        minimum = minimum.clamp_max_(0)
        # Σ w·(s·q + m - x)², less Σ w·x²
        error = scale * (scale * sum_qq + 2 * minimum * sum_q - 2 * sum_qx) + minimum * (minimum * total - 2 * total_x)
        better = (determinant > 0) & (scale > 0) & (error < best)
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, minimum, best_low)
    return best_scale.view(shape), -best_low.view(shape)


def _symmetric_scales(x: torch.Tensor, top: int) -> torch.Tensor:
    """The scale of each group, of either sign: codes run from ``-top`` to ``top - 1``, the largest value to ``-top``."""
    shape = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1]).t().contiguous()
    weighted_x = x.square() * x
    weight = x.square()
    largest = x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
    inverse = _over(torch.ones_like(largest), largest)
    best_scale, best = torch.zeros_like(largest), torch.zeros_like(largest)
    codes, weighted = torch.empty_like(x), torch.empty_like(x)
    for number in range(-3, 4):
        torch.mul(x, inverse * -(top + 0.3 * number), out=codes).round_().clamp_(-top, top - 1)
        product = _sum(torch.mul(weighted_x, codes, out=weighted))
        square = _sum(torch.mul(weight, codes.square_(), out=weighted))
        scale = _over(product, square)
        gain = scale * product  # the error of the best scale for these codes is Σ w·x² less this
        better = gain > best
        best = torch.where(better, gain, best)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale.view(shape)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, a power of two, in an order that depends on nothing else; ``x`` is used up."""
    half = len(x) // 2
    while half:
        x[:half].add_(x[half : 2 * half])
        half //= 2
    return x[0].clone()


def _over(value: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """``value / divisor``, and 0 where the divisor is 0."""
    return value * torch.where(divisor.abs() > _TINY, 1 / divisor, 0)


def _half(value: torch.Tensor) -> torch.Tensor:
    return value.half().view(torch.uint8)


def _round_away(x: torch.Tensor) -> torch.Tensor:
    """Halves away from zero, as ggml's reference rounds."""
    return (x.abs() + 0.5).floor_() * x.sign()


_PACK: dict[Kind, Callable[[torch.Tensor], torch.Tensor]] = {
    Kind.F32: _plain(torch.float32),
    Kind.F16: _plain(torch.float16),
    Kind.BF16: _plain(torch.bfloat16),
    Kind.Q8_0: _q8_0,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}
