"""The few counters that a run carries beside weights and optimiser. Everything else is a function of the step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import blake3


@dataclass
class State:
    """Counters of a run after ``step`` optimiser steps."""

    step: int = 0
    tokens: int = 0
    """Tokens computed so far, padding left out."""
    samples: int = 0
    evaluated: int = -1
    """The last step that was evaluated; an evaluation that a checkpoint already knows is not repeated."""
    best_step: int = -1
    best_loss: float | None = None
    worse: int = 0
    """Evaluations in a row without a better loss."""
    nonfinite: int = 0
    """Steps in a row that were skipped."""
    loss_scale: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> State:
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


def seed_of(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed that is a function of (run's seed, purpose, position) and of nothing that happened before."""
    text = "|".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(blake3.blake3(text.encode()).digest(length=8), "little") >> 1
