"""The formats of one matrix: bitsandbytes' bytes where it has them, rows whole, errors as small as they must be."""

from __future__ import annotations

import bitsandbytes.functional as bitsandbytes
import pytest
import torch

from luthier.models.quantised.formats import FORMS, as_bytes, by_row, dequantise, fits, quantise

ERRORS = {"nf4": 0.11, "int8": 0.012, "fp8": 0.03}
"""Root mean square of the error over that of the weights, of normal numbers."""


def matrix(rows: int = 96, columns: int = 192, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_has_the_bytes_of_bitsandbytes_without_double_quantisation(dtype):
    weight = matrix(dtype=dtype)
    codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    packed = quantise(weight, "nf4")
    assert torch.equal(packed.codes.reshape(-1), codes.reshape(-1))
    assert torch.equal(packed.scales.view(torch.float32).reshape(-1), state.absmax)
    assert torch.equal(dequantise(*packed, "nf4", dtype), bitsandbytes.dequantize_4bit(codes, state).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_has_the_bytes_of_bitsandbytes(dtype):
    weight = matrix(dtype=dtype)
    codes, scales, _ = bitsandbytes.int8_vectorwise_quant(weight.to(torch.float16))
    packed = quantise(weight, "int8")
    assert torch.equal(packed.codes.view(torch.int8), codes)
    assert torch.equal(packed.scales.view(torch.float32).reshape(-1), scales)
    assert torch.allclose(dequantise(*packed, "int8", torch.float32), bitsandbytes.int8_vectorwise_dequant(codes, scales), rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_packed_by_itself(form, monkeypatch):
    """Any rows of the packed matrix are the packed rows: that is what sharding along the first dimension needs."""
    weight = matrix()
    packed = quantise(weight, form)
    part = quantise(weight[32:57], form)
    assert torch.equal(packed.codes[32:57], part.codes)
    assert torch.equal(packed.scales[32:57], part.scales)
    monkeypatch.setitem(__import__("luthier.models.quantised.formats").models.quantised.formats._AT_ONCE, "cpu", 1000)
    in_pieces = quantise(weight, form)
    assert torch.equal(packed.codes, in_pieces.codes)
    assert torch.equal(packed.scales, in_pieces.scales)


@pytest.mark.parametrize("form", FORMS)
def test_error_is_that_of_the_format_and_zeros_stay_zeros(form):
    weight = matrix(dtype=torch.float32)
    weight[3] = 0
    again = dequantise(*quantise(weight, form), form, torch.float32)
    error = ((again - weight).square().mean() / weight.square().mean()).sqrt()
    assert 0.3 * ERRORS[form] < error < ERRORS[form]
    assert torch.equal(again[3], torch.zeros(192))


def test_fp8_reaches_its_largest_number_and_never_nan():
    weight = torch.tensor([[1e4, -1e4, 1.0, 0.0] * 8, [1e-30, -1e-30, 0.0, 1e-31] * 8])
    codes, scales = by_row(weight)
    assert codes.float().abs().amax(dim=1).tolist() == [448.0, 448.0]
    assert torch.allclose(codes[:, :2].float() * scales, weight[:, :2])


def test_rows_that_do_not_divide_into_blocks_are_refused():
    assert fits(128, "nf4")
    assert not fits(96, "nf4")
    assert fits(96, "int8")
    with pytest.raises(ValueError, match="blocks of 64"):
        quantise(matrix(columns=96), "nf4")


def test_scales_as_bytes_are_the_same_bits():
    scales = torch.tensor([[1.5, -2.25]])
    assert torch.equal(as_bytes(scales).view(torch.float32), scales)
