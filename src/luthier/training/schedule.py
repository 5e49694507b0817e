"""The learning rate as a pure function of the step: nothing to save, nothing to restore.

A run whose length is raised takes the longer schedule's value from the step it has reached; ``continuation_note`` says in
words what that does to the rate.
"""

from __future__ import annotations

import math

from luthier.config.schema import OptimConfig

_DECAY_SHARE = 5  # WSD falls over the last fifth


def warmup_steps(total: int, optim: OptimConfig) -> int:
    """Steps of warm-up: a share of ``total`` where ``optim.warmup`` is below 1, rounded up, else that many."""
    warmup = optim.warmup
    return min(total, math.ceil(warmup * total) if warmup < 1 else round(warmup))


def rate(step: int, total: int, optim: OptimConfig) -> float:
    """Multiplier of every group's peak rate.

    Args:
        step: 0-based, of the whole run.
        total: steps of the whole run.
        optim: ``schedule``, ``warmup`` and ``min_lr`` are read.

    Returns a value in [``min_lr``, 1]. Warm-up climbs from ``min_lr`` and its last step has 1; decay would reach
    ``min_lr`` one step after the last, so that no step is spent at a rate of zero.
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} is not within the run's {total} steps")
    floor = optim.min_lr
    warmup = warmup_steps(total, optim)
    if step < warmup:
        return floor + (1 - floor) * ((step + 1) / warmup)
    if optim.schedule == "constant":
        return 1.0
    start = warmup
    if optim.schedule == "wsd":
        start = max(warmup, total - math.ceil(total / _DECAY_SHARE))
        if step < start:
            return 1.0
    left = (total - step) / (total - start)
    if optim.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return floor + (1 - floor) * left


def continuation_note(
    step: int, old_total: int, new_total: int, optim: OptimConfig, old_optim: OptimConfig | None = None
) -> str:
    """Say what a changed length does to the learning rate.

    Args:
        step: the first step of the continued run, 0-based.
        old_total: steps that the run was to have.
        new_total: steps that it has now.
        old_optim: the settings until now, where they were others.
    """
    was = old_optim or optim
    change = f"The run now has {new_total} steps instead of {old_total}"
    if step >= new_total:
        return f"{change}; step {step} is reached, so nothing is left to train."
    after = rate(step, new_total, optim)
    before = rate(step, old_total, was) if step < old_total else None
    where = f"at step {step + 1} the learning rate is"
    if before is None:
        last = rate(old_total - 1, old_total, was)
        return (
            f"{change}: the {optim.schedule} schedule is stretched over the new length; {where} {_times(after, optim)}, "
            f"after {_times(last, was)} at the end of the old one."
        )
    if before == after and was.lr == optim.lr:
        return f"{change}; {where} the same, {_times(after, optim)}."
    return (
        f"{change}: the {optim.schedule} schedule is stretched over the new length; {where} {_times(after, optim)} "
        f"instead of {_times(before, was)}."
    )


def _times(multiplier: float, optim: OptimConfig) -> str:
    if optim.lr is None:
        return f"{multiplier:.3g} of its peak"
    return f"{multiplier * optim.lr:.3g}"
