"""Names that an adapter can have in memory, where they become parts of its tensors' names."""

from __future__ import annotations

from typing import Any

from luthier.errors import RequestError

BELOW, TOP, JOINED = "below", "default", "joined"  # of a stacked pair: see models.stack
_LEAVES = ("weight", "bias")  # peft takes these for the end of a tensor's name, and then leaves the adapter at random


def check_name(name: str, where: str) -> None:
    """Raise RequestError for a name under which peft would lose the adapter's tensors."""
    if name and "." not in name and name not in _LEAVES:
        return
    raise RequestError(
        f"{name!r} cannot name an adapter: peft holds no empty name, none with a dot, and loses one called {' or '.join(_LEAVES)}.",
        code="adapter-name",
        where=where,
        remedy=f"Give another, such as {holdable(name)!r}.",
    )


def holdable(name: str) -> str:
    """The name itself, or one like it that peft can hold."""
    plain = name.replace(".", "_")
    return f"{plain or 'the'}_adapter" if plain in ("", *_LEAVES) else plain


def is_stacked(model: Any) -> bool:
    """Whether a live model carries a lower adapter that stays and an upper one that trains."""
    return {BELOW, TOP} <= set(getattr(model, "peft_config", None) or ())
