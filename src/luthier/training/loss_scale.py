"""Dynamic loss scale for fp16: small gradients are lifted out of fp16's underflow, and overflow lowers the lift.

The rule is that of mixed-precision training (arXiv:1710.03740, section 3.2). Every factor is a power of two, so
scaling a loss and unscaling its gradient in fp32 changes no bit of it. The two numbers are part of every checkpoint.
"""

from __future__ import annotations

from typing import Any

_GROWTH_INTERVAL = 2000
_INITIAL = 2.0**16
_SMALLEST = 2.0**-14
_LARGEST = 2.0**24


class LossScale:
    """Multiply the loss by ``value`` before backward, the summed gradient by ``1 / value``, then report the outcome.

    Attributes:
        value: the scale; 1 and constant where the precision needs none.
        good_steps: finite steps since the scale last changed.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = _INITIAL if enabled else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> bool:
        """Halve after a gradient that was not finite; double after 2000 finite ones in a row.

        Returns whether the scale was halved: if not, a gradient that is not finite is not the scale's doing.
        """
        if not self.enabled:
            return False
        if finite:
            self.good_steps += 1
            if self.good_steps == _GROWTH_INTERVAL:
                self.value, self.good_steps = min(self.value * 2, _LARGEST), 0
            return False
        before = self.value
        self.value, self.good_steps = max(self.value / 2, _SMALLEST), 0
        return self.value < before

    def state(self) -> dict[str, Any]:
        """The two numbers a checkpoint keeps."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up the two numbers of a checkpoint; without a scale there is nothing to take up."""
        if self.enabled:
            self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
