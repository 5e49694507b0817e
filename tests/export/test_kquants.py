"""K-quants of our own against gguf's reading of them."""

import gguf
import numpy
import pytest
import torch

from luthier.export.gguf.kquants import Kind, encode

# Relative error on normal values; what llama.cpp's own quantiser leaves lies within a few percent of these.
BOUNDS = {Kind.Q8_0: 0.0054, Kind.Q6_K: 0.0180, Kind.Q5_K: 0.0365, Kind.Q4_K: 0.0725}


def decoded(kind: Kind, rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.array(gguf.dequantize(encode(kind, rows).numpy(), kind))).reshape(rows.shape)


@pytest.mark.parametrize("kind", BOUNDS, ids=lambda kind: kind.name)
def test_quantised_rows_read_back_near_to_what_they_were(kind):
    rows = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    error = (decoded(kind, rows) - rows).norm() / rows.norm()
    assert error < BOUNDS[kind]


@pytest.mark.parametrize("kind", BOUNDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(2, 256),
        torch.full((1, 256), -1.5),
        torch.linspace(0, 1, 512).view(2, 256),
        -torch.linspace(0, 1, 256).view(1, 256),
        torch.cat([torch.zeros(255), torch.ones(1)]).view(1, 256) * 3e4,
        torch.full((1, 256), 1e-9),
    ],
    ids=["zeros", "constant", "positive", "negative", "spike", "tiny"],
)
def test_extreme_rows_stay_finite_and_near(kind, rows):
    back = decoded(kind, rows)
    assert torch.isfinite(back).all()
    assert (back - rows).abs().max() <= rows.abs().max() * 0.04 + 1e-6


def test_q8_0_is_the_reference_bit_for_bit():
    rows = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    assert numpy.array_equal(encode(Kind.Q8_0, rows).numpy(), gguf.quantize(rows.numpy(), Kind.Q8_0))


def test_rows_are_packed_the_same_one_by_one_or_together():
    rows = torch.randn(300, 512, generator=torch.Generator().manual_seed(2))
    one_by_one = torch.cat([encode(Kind.Q4_K, row[None]) for row in rows])
    assert torch.equal(encode(Kind.Q4_K, rows), one_by_one)
