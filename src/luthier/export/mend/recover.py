"""An adapter from a base and a merged model: the low-rank part of what training changed.

For each linear layer D = W_merged - W_base is decomposed, D = U S Vᵀ, and cut to rank r: B = U√S, A = √S Vᵀ, with
alpha = r so that the adapter's scaling is 1.

**How the rank is chosen.** A merged weight was rounded to its file's dtype, which adds to D a noise of independent
entries, each uniform within half a unit in the last place: of deviation ulp(W) / √12, where bf16 has an ulp of |W| · 2⁻⁷
at most. A matrix of independent noise of deviation σ has a largest singular value of about σ(√m + √n); for
deviations that differ by entry it is the largest row's norm plus the largest column's. Singular values above that (with
a tenth of margin) are kept: what lies below cannot be told from rounding. Products B·A are themselves rounded by
whoever merges, so D's own ulp enters alike. In fp32 the floor is so low that the true rank is found exactly; in bf16
directions weaker than the floor are lost, and the error that remains is measured.

Matrices up to 2048 in their smaller dimension are decomposed exactly (``torch.linalg.svd``), larger ones by a
randomised method (``torch.svd_lowrank``, 32 more columns than needed, 4 power iterations, a fixed seed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts.names import PEFT
from luthier.errors import RequestError
from luthier.export.mend.rebuild_config import common_rank, shortest
from luthier.export.source import MemorySource
from luthier.export.stream import Output, as_they_are

EXACT = 2048
OVERSAMPLING = 32
MARGIN = 1.1
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}


@dataclass(frozen=True)
class Layer:
    """One recovered layer: rank, and what of D the adapter does not carry (relative Frobenius, largest absolute)."""

    module: str
    rank: int
    relative_error: float
    largest_error: float
    floor: float
    method: str

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Recovered:
    """The adapter's tensors by peft's names, its config, and what was measured."""

    items: dict[str, Output] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A few lines for people: ranks, and the layers with the largest error."""
        if not self.layers:
            return f"No layer of low rank; saved whole: {', '.join(self.saved)}."
        worst = sorted(self.layers, key=lambda layer: -layer.relative_error)[:8]
        width = max(len(layer.module) for layer in worst)
        rows = [f"{layer.module:<{width}}  {layer.rank:>4}  {layer.relative_error:>14.2e}  {layer.largest_error:>13.2e}" for layer in worst]  # fmt: skip
        head = f"{'layer':<{width}}  {'rank':>4}  {'relative error':>14}  {'largest error':>13}"
        rest = f"({len(self.layers) - len(worst)} more, each with less)" if len(self.layers) > len(worst) else ""
        return "\n".join([head, *rows, *([rest] if rest else [])])


def recover(
    base: Mapping[str, Output],
    merged: Mapping[str, Output],
    model: nn.Module,
    *,
    rank: int | None,
    where: str,
    say: Callable[[str], None],
) -> Recovered:
    """Decompose merged - base, layer by layer; memory for one layer's difference and its factors is needed.

    Args:
        base, merged: tensors by the names that transformers writes.
        model: the architecture, on the meta device: it says which weights are of linear layers.
        rank: for every layer that changed; chosen from the spectrum if None.

    Raises:
        RequestError: the two differ in what an adapter cannot carry, or not at all; names are in the text.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    _check_same(base, merged, tied, where)
    modules = dict(model.named_modules())
    result = Recovered()
    ranks: dict[str, int] = {}
    for name in [name for name in base if name in merged]:
        before, after = base[name].load(), merged[name].load()
        if torch.equal(before, after):
            continue
        module, _, leaf = name.rpartition(".")
        owner = modules.get(module)
        if owner is None:
            raise _cannot(f"{name} differs, and the model holds it in another form in memory (fused experts), which no adapter carries layer by layer.", where)  # fmt: skip
        if type(owner) is not nn.Linear or leaf != "weight":
            if tied and isinstance(owner, nn.Embedding):
                raise _cannot(f"{name} differs and is tied to the head; peft would train a copy and untie them.", where)
            if module not in result.saved:
                result.saved.append(module)
            continue
        delta = after.float() - before.float()
        layer, a, b = _decompose(module, delta, after, rank)
        if layer.rank == 0:
            continue  # what differs is no more than rounding
        if rank is None and layer.rank * 2 > min(delta.shape):
            raise _not_low_rank(module, delta, layer, where)
        ranks[module] = layer.rank
        result.layers.append(layer)
        result.items |= as_they_are(MemorySource(Path(where), {f"{PEFT}{module}.lora_A.weight": a, f"{PEFT}{module}.lora_B.weight": b}))  # fmt: skip
        say(f"{module}: rank {layer.rank}, {layer.relative_error:.1e} of the difference remains")
    _save_whole(result, ranks, base, merged)
    if not result.items:
        raise RequestError("base and merged model don't differ by more than rounding, so there is no adapter to recover.", code="nothing-to-mend", where=where, remedy="Check that --base is the model before training.")  # fmt: skip
    r, pattern = common_rank(ranks) if ranks else (1, {})
    result.config = {
        "peft_type": "LORA", "r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": dict(pattern),
        "lora_dropout": 0.0, "bias": "none", "target_modules": shortest(list(ranks), base),
        "modules_to_save": sorted(result.saved) or None, "task_type": "CAUSAL_LM", "inference_mode": True,
    }  # fmt: skip
    return result


def _save_whole(
    result: Recovered, ranks: dict[str, int], base: Mapping[str, Output], merged: Mapping[str, Output]
) -> None:
    """Modules that differ in what LoRA doesn't carry (norms, embeddings, biases) go into the adapter whole."""
    for module in result.saved:
        if module in ranks:  # a linear layer whose bias differs: one module can't be both
            del ranks[module]
            result.layers = [layer for layer in result.layers if layer.module != module]
            for part in ("lora_A.weight", "lora_B.weight"):
                del result.items[f"{PEFT}{module}.{part}"]
        for name in base:
            if name.rpartition(".")[0] == module:
                result.items[f"{PEFT}{name}"] = merged[name].named(f"{PEFT}{name}")


def _check_same(base: Mapping[str, Output], merged: Mapping[str, Output], tied: set[str], where: str) -> None:
    only = sorted((set(base) ^ set(merged)) - tied)
    if only:
        owner = "the base" if only[0] in base else "the merged model"
        raise _cannot(f"{len(only)} tensors are in one of the two only, such as {only[0]} in {owner}.", where, "Give the base that was trained on (--base).")  # fmt: skip
    for name in [name for name in base if name in merged]:
        old, new = base[name].spec.shape, merged[name].spec.shape
        if old != new:
            resized = len(old) == len(new) == 2 and old[1] == new[1] and old[0] != new[0]
            why = f"the vocabulary grew or shrank from {old[0]} to {new[0]} rows, and an adapter on the smaller base has no place for the others" if resized else f"{list(old)} is not {list(new)}"  # fmt: skip
            raise _cannot(f"{name} has another shape: {why}.", where, "Give the base with the vocabulary as trained, resized and saved, as --base.")  # fmt: skip


def _cannot(why: str, where: str, remedy: str = "Keep the merged model: it is whole as it is.") -> RequestError:
    return RequestError(why, code="not-recoverable", where=where, remedy=remedy)


def _not_low_rank(module: str, delta: torch.Tensor, layer: Layer, where: str) -> RequestError:
    """With what approximations of some ranks would leave, for choosing one."""
    values, norm = torch.linalg.svdvals(delta), float(delta.norm())
    left = {rank: float(values[rank:].norm()) / norm for rank in (8, 16, 32, 64, 128) if rank < len(values)}
    told = "; ".join(f"rank {rank} would leave {share:.0%}" for rank, share in left.items())
    return _cannot(f"{module} differs by rank {layer.rank} of at most {min(delta.shape)}, so it was not changed by a low-rank adapter ({told} of the difference).", where, "Keep the merged model, or give --rank R for an approximation whose error is written down.")  # fmt: skip


def _decompose(
    module: str, delta: torch.Tensor, after: torch.Tensor, rank: int | None
) -> tuple[Layer, torch.Tensor, torch.Tensor]:
    floor = noise_floor(delta, after)
    left, values, right, method = _svd(delta, floor, rank)
    kept = int((values > floor).sum()) if rank is None else min(rank, len(values))
    root = values[:kept].sqrt()
    b = (left[:, :kept] * root).contiguous()
    a = (right[:, :kept] * root).T.contiguous()
    remaining = delta - b @ a
    relative = float(remaining.norm() / delta.norm())
    return Layer(module, kept, relative, float(remaining.abs().max()), floor, method), a, b


def noise_floor(delta: torch.Tensor, after: torch.Tensor) -> float:
    """The largest singular value that rounding alone is expected to give the difference, with a tenth of margin."""
    variance = _rounding(after.float(), after.dtype) + _rounding(delta, after.dtype)
    rows, columns = variance.sum(1).max().sqrt(), variance.sum(0).max().sqrt()
    exact = torch.finfo(torch.float32).eps * math.sqrt(max(delta.shape)) * float(delta.norm())  # of the decomposition
    return max(MARGIN * float(rows + columns), exact)


def _rounding(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The variance that rounding to a dtype has, by entry: a uniform error within half a unit in the last place."""
    exponent = torch.frexp(value)[1] - 1
    unit = torch.ldexp(torch.ones_like(value), exponent - _MANTISSA.get(dtype, 23))
    return torch.where(value == 0, 0.0, unit.square() / 12)


def _svd(delta: torch.Tensor, floor: float, rank: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    smaller = min(delta.shape)
    if smaller <= EXACT:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        return left, values, right.T, "exact"
    wanted = (rank or 128) + OVERSAMPLING
    while True:
        columns = min(wanted, smaller)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(delta, q=columns, niter=4)
        if rank is not None or columns == smaller or float(values[-1]) <= floor or columns * 2 > smaller:
            return left, values, right, f"randomised, {columns} columns"
        wanted *= 2
