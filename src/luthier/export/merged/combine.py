"""Several adapters as one change of a tensor: TIES, DARE and magnitude pruning, on the changes themselves, block by block.

For each adapter D = s·B·A is computed for a block of rows, thinned out, and the results are summed with the adapters' weights.
``magnitude_prune`` and ``ties`` keep the largest share ``density`` of a tensor's values; ``dare_linear`` and ``dare_ties`` keep each value with that
probability and divide by it. The ``ties`` methods sum, at each place, only what has the majority's sign (of the thinned values' sum), and
divide by how many that are. These are peft's formulas for ``luthier.combine``'s ``…_svd`` methods, without the cut to a rank that follows there.
Yadav et al., arXiv:2306.01708; Yu et al., arXiv:2311.03099.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import torch

from luthier.errors import RequestError

METHODS = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
SHORT = {"dare": "dare_linear"}
BLOCK = 1 << 18  # elements at a time
_HIGH = 1 << 15  # the sign is gone, so the upper half of a float has 15 bits


class Product(Protocol):
    """A thin product whose rows can be added to a block."""

    left: torch.Tensor

    def add(self, block: torch.Tensor, first: int) -> None: ...


@dataclass(frozen=True)
class Combination:
    """How changes are combined; ``seed`` decides what DARE drops."""

    method: str
    density: float
    seed: int = 0


def combination_of(method: str | None, density: float | None, seed: int = 0) -> Combination | None:
    """What is asked for; None for the plain sum.

    Raises:
        RequestError: the method is unknown, or the density is missing or out of range.
    """
    name = SHORT.get(method or "linear", method or "linear")
    if name not in METHODS:
        raise RequestError(f"there is no method {method!r} to combine by.", code="combine", where="--combine", remedy=f"Take one of {', '.join(METHODS)}.")  # fmt: skip
    if name == "linear":
        if density is not None:
            raise RequestError("a plain sum has no density.", code="combine", where="--density", remedy="Leave it out, or name a method with --combine.")  # fmt: skip
        return None
    if density is None or not 0 < density <= 1:
        raise RequestError(f"{name} needs a density, above 0 and at most 1.", code="combine", where="--density", remedy="Give, say, 0.5.")  # fmt: skip
    return Combination(name, density, seed)


@dataclass
class Mixer:
    """Combines the changes of one tensor; ``owners[i]`` and ``weights[i]`` are the adapter's of the i-th product."""

    how: Combination
    name: str
    owners: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    _limits: list[float] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, products: Sequence[Product], width: int) -> None:
        """Find once which values are large enough, where the method asks that."""
        if self.how.method.startswith("dare") or self.how.density >= 1:
            return
        with self._lock:
            if self._limits is None:
                self._limits = [limit_of(product, width, self.how.density) for product in products]

    def add(self, products: Sequence[Product], block: torch.Tensor, first: int) -> None:
        """Add the combined change's rows ``[first, first + len(block))`` to a block of the tensor."""
        changes = []
        for index, product in enumerate(products):
            change = torch.zeros_like(block)
            product.add(change, first)
            changes.append(self._thinned(change, index, first))
        stacked = torch.stack(changes)
        weights = torch.tensor(self.weights)[:, None, None]
        if not self.how.method.endswith("ties"):
            block += (stacked * weights).sum(dim=0)
            return
        majority = torch.where(stacked.sum(dim=0) >= 0, 1, -1)
        agrees = stacked.sign() == majority
        block += (stacked * weights * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)

    def _thinned(self, change: torch.Tensor, index: int, first: int) -> torch.Tensor:
        density = self.how.density
        if density >= 1:
            return change
        if self._limits is not None:
            return change * (change.abs() >= self._limits[index])
        start = first * change.shape[1]
        kept = uniform(start, change.numel(), self.how.seed, f"{self.owners[index]}:{self.name}") < density
        return change * kept.view(change.shape) / density


def limit_of(product: Product, width: int, density: float) -> float:
    """The smallest of the ``density`` largest absolute values of a product, exactly, without holding the product.

    Positive floats are ordered as their bits are: one pass counts upper halves, a second the lower halves of the one where the limit lies.
    """
    height = product.left.shape[0]
    kept = int(density * height * width)
    if kept == 0:
        return float("inf")
    step = max(1, BLOCK // width)

    def halves(row: int) -> tuple[torch.Tensor, torch.Tensor]:
        block = torch.zeros(min(step, height - row), width)
        product.add(block, row)
        bits = block.abs_().view(torch.int32).reshape(-1)
        return bits >> 16, bits & 0xFFFF

    counts = torch.zeros(_HIGH, dtype=torch.int64)
    for row in range(0, height, step):
        counts += torch.bincount(halves(row)[0], minlength=_HIGH)
    from_top = counts.flip(0).cumsum(0)
    high = _HIGH - 1 - int(torch.searchsorted(from_top, kept))
    above = int(from_top[_HIGH - 2 - high]) if high < _HIGH - 1 else 0
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for row in range(0, height, step):
        upper, lower = halves(row)
        counts += torch.bincount(lower[upper == high], minlength=1 << 16)
    low = (1 << 16) - 1 - int(torch.searchsorted(counts.flip(0).cumsum(0), kept - above))
    return float(torch.tensor([(high << 16) | low], dtype=torch.int32).view(torch.float32))


def uniform(start: int, count: int, seed: int, what: str) -> torch.Tensor:
    """Numbers in [0, 1) that are a function of (seed, what, position): the same however a tensor is cut into blocks."""
    key = int.from_bytes(blake2b(f"{seed}:{what}".encode(), digest_size=7).digest(), "big")
    x = torch.arange(start, start + count, dtype=torch.int64)
    x = (x * 0x9E3779B97F4A7C1 + key) & 0x7FFFFFFFFFFFFFFF
    for factor in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):  # splitmix64's steps, on 63 bits
        x = ((x ^ (x >> 30)) * factor) & 0x7FFFFFFFFFFFFFFF
    return ((x ^ (x >> 31)) & 0xFFFFFF).to(torch.float32) / (1 << 24)
