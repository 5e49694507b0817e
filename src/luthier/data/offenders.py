"""Broken samples: collected, then either an error that shows the first few, or a number in the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from luthier.errors import RequestError

SHOWN = 5
PATIENCE = 2000
"""Samples read on after the first offender, to show what else is broken, before giving up."""


@dataclass(frozen=True)
class Place:
    """Where a sample begins: a file and its 1-based line, or row where the format has no lines."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class SampleError(Exception):
    """A sample cannot be used; the text says why."""


class Noting(Protocol):
    """What the readers of files tell of broken samples."""

    def add(self, place: Place, reason: str) -> None: ...


@dataclass
class Offenders:
    """Takes broken samples while data is read, and says what becomes of them."""

    on_bad: Literal["error", "skip"]
    count: int = 0
    first: list[str] = field(default_factory=list)
    _read_on: int = 0

    def add(self, place: Place, reason: str) -> None:
        """Note a broken sample; raises RequestError when enough have been seen and they are errors."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{place}: {reason}")
        if self.on_bad == "error" and self.count >= SHOWN:
            self.finish()

    def passed(self) -> None:
        """Note a good sample; raises RequestError when the last offender is far behind."""
        if self.on_bad == "error" and self.count:
            self._read_on += 1
            if self._read_on >= PATIENCE:
                self.finish()

    def finish(self) -> None:
        """Raise RequestError naming the first offenders, if there are any and they are errors."""
        if not self.count or self.on_bad == "skip":
            return
        head, *rest = self.first
        more = f" Also: {'; '.join(rest)}." if rest else ""
        raise RequestError(
            f"Broken sample: {head}.{more}",
            code="broken-sample",
            where=head.split(": ", 1)[0],
            remedy="Mend the file, or set `data.on_bad: skip` to go on without such samples; their number is reported.",
        )
