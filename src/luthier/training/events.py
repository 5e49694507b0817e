"""What happens in a run, told to the user's own functions and to loggers.

Neither can hurt the run: wrong names are errors before training, and whatever fails later is reported by name and
passed over. The loop emits a ``checkpoint`` event only once the checkpoint is published.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from luthier.config.schema import RunConfig
from luthier.errors import RequestError
from luthier.training.loggers import LoggerThread, open_logger

Kind = Literal["start", "step", "evaluation", "checkpoint", "end"]
Say = Callable[[str], None]
REPORT_EVERY = 100


@dataclass(frozen=True)
class Event:
    """One moment of a run, as callbacks get it."""

    kind: Kind
    step: int
    """Steps done so far."""
    total_steps: int
    run: Path
    """The run's folder."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What was measured, under the names of metrics.jsonl; empty at start and end."""
    path: Path | None = None
    """The published checkpoint, or at the end the final folder; else None."""


class Events:
    """Passes events to callbacks and loggers.

    Args:
        callbacks: functions of one argument as ``module:function``; the working directory is importable.
        loggers: names out of the run file's ``log``.
        run: the run's folder.
        config: the resolved run file, handed to loggers.
        say: prints one line for the user; called from the emitting thread only.

    Raises RequestError naming ``callbacks`` or ``log`` when a function or package cannot be had.
    """

    def __init__(
        self, callbacks: Sequence[str], loggers: Sequence[str], run: Path, config: RunConfig, say: Say
    ) -> None:
        self._callbacks = [_Callback(name, _resolve_callback(name), say) for name in callbacks]
        self._loggers = [LoggerThread(open_logger(name, run), say) for name in loggers]
        self._config = config

    def emit(self, event: Event) -> None:
        """Tell everyone, in the order of the run file; raises nothing but KeyboardInterrupt."""
        for logger in self._loggers:
            if event.kind == "start":
                logger.start(self._config.model_dump(mode="json"), event.step)
            elif event.kind in ("step", "evaluation"):
                logger.log(event.step, _numbers(event))
        for callback in self._callbacks:
            callback(event)
        if event.kind == "end":
            self.close()

    def close(self) -> None:
        """Let loggers finish, for as long as they are reasonable about it; done by ``end``, and harmless twice."""
        for logger in self._loggers:
            logger.finish()


class _Callback:
    """A user's function that cannot stop the run."""

    def __init__(self, name: str, function: Callable[[Event], Any], say: Say) -> None:
        self.name = name
        self.function = function
        self.say = say
        self.failures = 0

    def __call__(self, event: Event) -> None:
        try:
            self.function(replace(event, metrics=dict(event.metrics)))  # its own copy: nobody can spoil another's
        except (Exception, SystemExit) as error:
            self.failures += 1
            if self.failures % REPORT_EVERY == 1:
                times = f", {self.failures} times so far" if self.failures > 1 else ""
                self.say(
                    f"callbacks: {self.name} failed at {event.kind} (step {event.step}{times}), "
                    f"the run goes on: {_brief(error)}"
                )


def resolve(name: str, *, key: str) -> Callable[..., Any]:
    """Return the function that ``module:function`` names, importing from the working directory too.

    Raises RequestError naming ``key`` when there is no such module or function, or the module fails to import.
    """
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise RequestError(
            f"{name!r} does not name a function.",
            code="callback-name",
            where=key,
            remedy="Write it as `module:function`.",
        )
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that a folder called `datasets` hides no library; kept for imports made later
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]
        remedy = (
            f"Put {module_name}.py into {here}, or install the package it belongs to."
            if missing
            else "Mend the module; the run has not begun."
        )
        raise RequestError(
            f"{name}: the module {module_name!r} cannot be imported: {_brief(error)}.",
            code="callback-module",
            where=key,
            remedy=remedy,
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RequestError(
            f"{name}: {module_name} ({getattr(module, '__file__', None) or 'built in'}) has no function {function_name!r}.",
            code="callback-function",
            where=key,
            remedy="Define it there, or mend the name.",
        )
    return function


def _resolve_callback(name: str) -> Callable[[Event], Any]:
    function = resolve(name, key="callbacks")
    if not _takes_one(function):
        raise RequestError(
            f"{name} cannot be called with one argument, the event.",
            code="callback-arguments",
            where="callbacks",
            remedy=f"Write it as `def {name.partition(':')[2]}(event): …`.",
        )
    return function


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # built-in functions may have no signature to look at
        return True
    return True


def _brief(error: BaseException) -> str:
    """Return the error with the innermost line it came from, such as ``ValueError: no (hooks.py:12)``."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}{place}" if first_line else f"{type(error).__name__}{place}"


def _numbers(event: Event) -> dict[str, float]:
    """Return the event's numbers under the names that loggers show: ``train/loss``, ``eval/loss``, ``eval/metric/exact``."""
    section = "train" if event.kind == "step" else "base" if event.metrics.get("base") else "eval"
    return {
        f"{section}/{name.removeprefix('eval_')}": float(value)
        for name, value in event.metrics.items()
        if isinstance(value, int | float) and name not in ("step", "time", "base")
    }
