"""Numbers and names as people read them."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> str:
    """Return a number with thousands separated, or with four significant digits; ``–`` for none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return scientific(value) if abs(value) < 1e-3 else f"{value:.4g}"


def loss(value: float) -> str:
    """Return a loss with three decimals, or fewer where it is large."""
    return f"{value:.3f}" if abs(value) < 100 else number(value)


def score(value: Any) -> str:
    """Return a metric's value; shares with three decimals, so that they stand below each other."""
    return f"{value:.3f}" if isinstance(value, float) and 0 <= value <= 1 else number(value)


def short(count: float) -> str:
    """Return a large count as ``4.92 M``."""
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:,.0f}"


def scientific(value: float, digits: int = 2) -> str:
    """Return ``2e-4`` rather than ``0.0002`` or ``2e-04``."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def size(count: float) -> str:
    """Return a number of bytes as ``18.9 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds(count: float) -> str:
    """Return seconds as ``4.2 s``, ``12 min 30 s`` or ``3 h 5 min``."""
    if count < 60:
        return f"{count:.1f} s"
    minutes, rest = divmod(round(count), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def words(key: str) -> str:
    """Return ``trained_tokens`` as ``trained tokens``."""
    return key.replace("_", " ")
