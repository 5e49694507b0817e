"""How far a run is, for the person watching: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 10.0
SPEED_WINDOW = 50  # steps that the remaining time is judged by; pauses for evaluation and saving included
NARROW_COLUMNS = 90


class Progress:
    """Shows steps and keeps messages apart from them; may be used from several threads.

    Args:
        total_steps: steps of the whole run.
        start_step: steps already done when this process began.
        console: a rich console to use instead of standard output.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._clock = clock
        self._done = start_step
        self._moments = deque([clock()], maxlen=SPEED_WINDOW + 1)
        self._lock = threading.Lock()
        self._display = _display(total_steps, start_step, console, clock)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a finished step by its record in metrics.jsonl; missing values are left out."""
        with self._lock:
            self._done = int(metrics.get("step", self._done + 1))
            now = self._clock()
            speed = metrics.get("tokens_per_second")
            if (
                len(self._moments) == 1 and speed
            ):  # what came before the first step, an evaluation say, is no step's time
                self._moments[0] = max(self._moments[0], now - metrics.get("tokens", 0) / speed)
            self._moments.append(now)
            self._display.step(self._done, _values(metrics), self._left())

    def say(self, text: str) -> None:
        """Print a message of one or more lines, above the bar where there is one."""
        with self._lock:
            self._display.say(text)

    def close(self) -> None:
        """Show the last step and leave the terminal as it was; harmless twice."""
        with self._lock:
            self._display.close()

    def _left(self) -> str:
        steps = len(self._moments) - 1
        seconds = (self._moments[-1] - self._moments[0]) / steps * max(self._total - self._done, 0)
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Return seconds as ``4:32``, ``1:04:32`` or ``2 d 3 h``."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Display(Protocol):
    def step(self, step: int, values: Mapping[str, str], left: str) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class _Lines:
    """Plain lines for files, pipes and dumb terminals: the first step, the last, and one every ten seconds."""

    def __init__(self, total: int, stream: IO[str], clock: Callable[[], float]) -> None:
        self._total = total
        self._stream = stream
        self._clock = clock
        self._shown_at: float | None = None
        self._waiting: str | None = None
        self._reader_left = False

    def step(self, step: int, values: Mapping[str, str], left: str) -> None:
        line = "  ".join([f"step {step}/{self._total}", *values.values(), left])
        now = self._clock()
        if self._shown_at is None or now - self._shown_at >= LINE_SECONDS or step >= self._total:
            self._shown_at, self._waiting = now, None
            self._write(line)
        else:
            self._waiting = line

    def say(self, text: str) -> None:
        self._write(text)

    def close(self) -> None:
        if self._waiting is not None:  # stopped early: the last step is shown all the same
            self._write(self._waiting)
            self._waiting = None

    def _write(self, text: str) -> None:
        if self._reader_left:
            return
        try:
            self._stream.write(_sayable(text, getattr(self._stream, "encoding", None)) + "\n")
            self._stream.flush()
        except BrokenPipeError:  # `| head`, or a closed session: no reason to lose a run, metrics.jsonl has it all
            self._reader_left = True


class _Bar:
    """A rich bar for terminals and notebooks."""

    def __init__(self, total: int, start: int, console: Console) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = console
        self._bar = RichProgress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[values]}", markup=False),
            console=console,
            expand=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=total, completed=start, values="")
        self._bar.start()

    def step(self, step: int, values: Mapping[str, str], left: str) -> None:
        shown = dict(values)
        if self._console.width < NARROW_COLUMNS:
            for name in ("lr", "memory_gib"):
                shown.pop(name, None)
        if self._console.width < NARROW_COLUMNS // 2:
            shown.pop("tokens_per_second", None)
        self._bar.update(self._task, completed=step, values=" ".join([*shown.values(), left]))

    def say(self, text: str) -> None:
        self._console.print(_sayable(text, self._console.encoding), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


def _display(total: int, start: int, console: Console | None, clock: Callable[[], float]) -> _Display:
    if console is None and not _in_notebook() and not _is_lively(sys.stdout):
        return _Lines(total, sys.stdout, clock)
    if console is None:
        from rich.console import Console

        console = Console()
    # rich draws a bar in a notebook by ipywidgets, and shows nothing without them
    has_widgets = importlib.util.find_spec("ipywidgets") is not None
    lively = has_widgets if console.is_jupyter else console.is_terminal and not console.is_dumb_terminal
    return _Bar(total, start, console) if lively else _Lines(total, console.file, clock)


def _is_lively(stream: IO[str]) -> bool:
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules


def _values(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return what is shown of a step, by key, as text."""
    values: dict[str, str] = {}
    if metrics.get("skipped"):
        values["loss"] = "skipped"
    elif metrics.get("loss") is not None:
        values["loss"] = f"loss {metrics['loss']:.3f}"
    if metrics.get("lr") is not None:
        mantissa, _, exponent = f"{metrics['lr']:.1e}".partition("e")
        values["lr"] = f"lr {mantissa}e{int(exponent)}"
    if metrics.get("tokens_per_second") is not None:
        values["tokens_per_second"] = f"{metrics['tokens_per_second']:,.0f} tok/s"
    if metrics.get("memory_gib") is not None:
        values["memory_gib"] = f"{metrics['memory_gib']:.1f} GiB"
    return values


def _sayable(text: str, encoding: str | None) -> str:
    """Return the text with what the encoding lacks replaced, so that printing never fails."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)
