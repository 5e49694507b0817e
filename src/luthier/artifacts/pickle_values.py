"""Pickles read as what they are: a list of instructions. Nothing is imported, called or constructed.

Where an unpickler would import a name and call it, a `Call` is noted with the name's text and the arguments. So nothing
in the file can run, whatever it names; names that the reader does not expect are refused all the same.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from luthier.errors import RequestError

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUSH = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Named:
    """What stands for a class or a function: its module and name."""

    name: str


@dataclass(eq=False, slots=True)
class Call:
    """What an unpickler would construct: by what, from what, and the state it would be given."""

    name: str
    args: Any
    state: Any = None

    def get(self, field: str) -> Any:
        """A field of the state; None where there is none."""
        return self.state.get(field) if isinstance(self.state, dict) else None


@dataclass(frozen=True)
class Persistent:
    """What the pickle refers to outside of itself."""

    id: Any


def read_values(data: bytes, known: Collection[str], where: str) -> Any:
    """The value that a pickle describes, in plain containers, with a `Call` for every object.

    Args:
        known: full names of what it may mention, such as ``torch.Size``.

    Raises:
        RequestError: it mentions something else; it is named.
        ValueError: it is cut off, or none.
    """
    machine = _Machine(frozenset(known), where)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"it is no pickle that can be followed ({type(error).__name__})") from None
    raise ValueError("it has no end")


class _Machine:
    def __init__(self, known: frozenset[str], where: str) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._known = known
        self._where = where

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            return
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"):
            stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[name]())
        elif name == "APPEND":
            value = stack.pop()
            _list(stack[-1]).append(value)
        elif name == "APPENDS":
            values = self._to_mark()
            _list(stack[-1]).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self._set(stack[-1], values)
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Call):
                raise TypeError
            stack[-1].state = state
        elif name == "GLOBAL":
            stack.append(self._named(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            last = stack.pop()
            stack.append(self._named(f"{stack.pop()}.{last}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            if not isinstance(called, Named):
                raise TypeError
            stack.append(Call(called.name, arguments))
        elif name == "BINPERSID":
            stack.append(Persistent(stack.pop()))
        else:
            raise ValueError(f"it has the instruction {name}, which no checkpoint needs")

    def _named(self, name: str) -> Named:
        if name not in self._known:
            raise RequestError(
                f"this pickle wants {name:.120}, which has no part in a checkpoint's description.",
                code="pickle-code",
                where=self._where,
                remedy="Nothing of it was run. If you trust where it came from, load it there and save the weights as safetensors.",
            )
        return Named(name)

    def _to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    @staticmethod
    def _set(target: Any, values: list[Any]) -> None:
        if isinstance(target, Call):  # an OrderedDict's items
            return
        if not isinstance(target, dict):
            raise TypeError
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int | Call):  # a tuple of tuples takes for ever to hash
                raise TypeError
            target[key] = value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError
    return value
