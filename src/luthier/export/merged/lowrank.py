"""What an adapter does to one tensor, as arithmetic on blocks of its rows.

Every kind of LoRA that can be merged is the same few operations on the tensor seen as a matrix: add a product of two
thin matrices, scale its rows or columns to a learnt length (DoRA), put other rows in. ``W + L·R`` holds for linear layers
(L = sB, R = A), for embeddings and transposed layers (L = Aᵀ, R = sBᵀ), for convolutions (a kernel is a row), and for
fused experts, whose rows come in groups with a factor each. All is computed in fp32 on blocks that fit into the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from luthier.export.merged.combine import Mixer

BLOCK = 1 << 18  # elements at a time: 1 MiB of fp32, so that the passes over a block find it in the cache


@dataclass
class LowRank:
    """``left`` (rows × rank) and ``right`` (groups × rank × columns), both fp32; the scaling is in ``left``."""

    left: torch.Tensor
    right: torch.Tensor

    def add(self, block: torch.Tensor, first: int) -> None:
        """Add the product's rows ``[first, first + len(block))``."""
        share = self.left.shape[0] // self.right.shape[0]
        row = first
        while row < first + len(block):
            group = row // share
            end = min((group + 1) * share, first + len(block))
            block[row - first : end - first].addmm_(self.left[row:end], self.right[group])
            row = end


Reader = Callable[[int, int], torch.Tensor]  # rows [first, last) of the tensor before the change, in its own dtype


@dataclass
class Change:
    """What happens to one tensor, in this order.

    Attributes:
        width: the tensor's columns; all its other dimensions are rows (of a kernel it is the other way round).
        low: thin products, loaded when they are needed and not kept.
        magnitude: DoRA's learnt lengths, of every row, or of every column where ``by_column``.
        rows: rows that are replaced: indices and their values.
        first: this tensor's first row within the tensor that the adapter speaks of.
        mixer: combines the products otherwise than by their sum.
    """

    width: int
    low: list[Callable[[], LowRank]] = field(default_factory=list)
    magnitude: Callable[[], torch.Tensor] | None = None
    by_column: bool = False
    rows: list[Callable[[], tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)
    first: int = 0
    mixer: Mixer | None = None
    _norms: torch.Tensor | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, read: Reader, height: int) -> Prepared:
        """Load what the change consists of; DoRA by column first reads the whole tensor once for its norms."""
        low = [load() for load in self.low]
        if self.mixer is not None:
            self.mixer.prepare(low, self.width)
        scale = self.magnitude().float().reshape(-1) if self.magnitude else None
        if scale is not None and self.by_column:
            with self._lock:
                if self._norms is None:
                    self._norms = self._column_norms(low, read, height)
            scale = scale / self._norms
        rows: dict[int, torch.Tensor] = {}
        for load_rows in self.rows:
            indices, values = load_rows()
            rows |= {int(index): value.float() for index, value in zip(indices, values, strict=True)}
        return Prepared(low, scale, self.by_column, rows, self.first, self.mixer)

    def _column_norms(self, low: list[LowRank], read: Reader, height: int) -> torch.Tensor:
        squares = torch.zeros(self.width, dtype=torch.float64)
        step = max(1, BLOCK // self.width)
        for row in range(0, height, step):
            block = read(row, min(row + step, height)).to(torch.float32, copy=True)
            for product in low:
                product.add(block, row + self.first)
            squares += block.double().square_().sum(dim=0)
        return squares.sqrt_().float()


@dataclass
class Prepared:
    """A change with its tensors at hand."""

    low: list[LowRank]
    scale: torch.Tensor | None
    by_column: bool
    rows: dict[int, torch.Tensor]
    first: int
    mixer: Mixer | None = None

    def apply(self, block: torch.Tensor, first: int) -> None:
        """Change fp32 rows ``[first, first + len(block))`` of the tensor in place."""
        if self.mixer is not None:
            self.mixer.add(self.low, block, first + self.first)
        else:
            for product in self.low:
                product.add(block, first + self.first)
        if self.scale is not None and self.by_column:
            block.mul_(self.scale)
        elif self.scale is not None:
            wanted = self.scale[first + self.first : first + self.first + len(block)]
            block.mul_((wanted / torch.linalg.norm(block, dim=1))[:, None])
        for index, value in self.rows.items():
            if first <= index - self.first < first + len(block):
                block[index - self.first - first] = value
