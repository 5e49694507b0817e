"""TensorBoard, Weights & Biases, MLflow and trackio beside metrics.jsonl, none of which can stop or slow a run.

Each logger runs in a daemon thread of its own behind a bounded queue, because any of them may wait for a network.
The first failure switches it off with one message. What a service calls the run is kept in ``RUN/<service>.id``, so
that a resumed run continues the same curves.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from luthier.errors import RequestError

QUEUE_SIZE = 1000
FINISH_SECONDS = 30.0
PROJECT = "luthier"
Config = Mapping[str, Any]


class Logger(Protocol):
    """A service that draws curves; every method may block or raise."""

    name: str

    def start(self, config: Config, step: int) -> None:
        """Open the run, new or continued after ``step`` steps."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers measured after ``step`` steps."""

    def finish(self) -> None:
        """Send what is left and close."""


class LoggerThread:
    """Runs a logger in a daemon thread; no method blocks (``finish`` for a bounded time) or raises.

    Args:
        logger: the service.
        say: prints one line; called from the thread that calls these methods, never from the logger's own.
        size: calls that may wait before further ones are left out.
        finish_seconds: how long ``finish`` waits.
    """

    def __init__(
        self,
        logger: Logger,
        say: Callable[[str], None],
        *,
        size: int = QUEUE_SIZE,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        self._logger = logger
        self._say = say
        self._finish_seconds = finish_seconds
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(size)
        self._error: Exception | SystemExit | None = None
        self._off = False
        self._left_out = 0
        self._thread: threading.Thread | None = None

    def start(self, config: Config, step: int) -> None:
        """Start the thread and open the run in it."""
        self._thread = threading.Thread(target=self._work, name=f"log-{self._logger.name}", daemon=True)
        self._thread.start()
        self._put(lambda: self._logger.start(config, step))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue numbers; they are left out when the service cannot keep up."""
        self._put(lambda: self._logger.log(step, metrics))

    def finish(self) -> None:
        """Close the run and wait a bounded time for what is queued."""
        if self._thread is None:
            return
        self._put(self._logger.finish)
        self._put(None)
        self._thread.join(self._finish_seconds)
        if self._thread.is_alive() and not self._off:
            self._switch_off(f"did not finish within {self._finish_seconds:g} s")
        self._report()
        if self._left_out and not self._off:
            self._say(f"log: {self._left_out} records were left out of {self._logger.name}; metrics.jsonl has them.")
        self._thread = None

    def _put(self, call: Callable[[], None] | None) -> None:
        self._report()
        if self._thread is None or self._off:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._left_out += 1
            if self._left_out == 1:
                self._say(f"log: {self._logger.name} cannot keep up; records are left out there until it can.")

    def _report(self) -> None:
        if self._error is not None and not self._off:
            reason = str(self._error).strip().partition("\n")[0]
            self._switch_off(f"failed ({type(self._error).__name__}{f': {reason}' if reason else ''})")

    def _switch_off(self, what: str) -> None:
        self._off = True
        self._say(
            f"log: {self._logger.name} {what} and is off for the rest of this run; metrics.jsonl has every record."
        )

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except (Exception, SystemExit) as error:
                self._error = error  # said by the training thread at its next call
                return


def open_logger(name: str, run: Path) -> Logger:
    """Return the logger of this name; its package is imported, nothing is started.

    Raises RequestError naming the key ``log`` when the package is missing or broken.
    """
    kind, module = _LOGGERS[name]
    package = name  # each is called as its package is
    spec = importlib.util.find_spec(package)
    if (
        spec is None or spec.origin is None
    ):  # without an origin it is a mere folder, such as the `wandb` that wandb leaves
        raise RequestError(
            f"`log` asks for {name}, but the package {package} is not installed.",
            code="logger-missing",
            where="log",
            remedy=f"Run `pip install {package}`, or take {name} out of `log`.",
        )
    try:
        return kind(importlib.import_module(module), run)
    except Exception as error:
        raise RequestError(
            f"`log` asks for {name}, but its package fails to import ({type(error).__name__}: {error}).",
            code="logger-broken",
            where="log",
            remedy=f"Run `pip install --upgrade {package}`, or take {name} out of `log`.",
        ) from error


class TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    name = "tensorboard"

    def __init__(self, module: Any, run: Path) -> None:
        self._module = module
        self._run = run

    def start(self, config: Config, step: int) -> None:
        # purge_step hides what an interrupted run logged beyond the checkpoint it resumes from
        self._writer = self._module.SummaryWriter(str(self._run / "tensorboard"), purge_step=step + 1)
        self._writer.add_text("run", f"```json\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```", step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self._writer.close()


class WandB:
    """A run in the project ``luthier``, or in the one that ``WANDB_PROJECT`` names."""

    name = "wandb"

    def __init__(self, module: Any, run: Path) -> None:
        self._module = module
        self._run = run

    def start(self, config: Config, step: int) -> None:
        self._session = self._module.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._run.name,
            dir=str(self._run),
            config=dict(config),
            id=_recall(self._run, self.name),
            resume="allow",
            mode=None if "WANDB_MODE" in os.environ or _has_wandb_key(self._module) else "offline",
        )
        _remember(self._run, self.name, self._session.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._session.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._session.finish()


def _has_wandb_key(module: Any) -> bool:
    """Return whether wandb would start without asking on the terminal, where nobody would see the question."""
    if "prompt" in inspect.signature(module.login).parameters:
        return bool(module.login(prompt=False, verify=False))
    return bool(module.api.api_key)  # versions before that argument


class MLflow:
    """A run in the experiment ``luthier``, at the tracking server that MLflow is set up for."""

    name = "mlflow"

    def __init__(self, module: Any, run: Path) -> None:
        self._module = module
        self._run = run

    def start(self, config: Config, step: int) -> None:
        self._module.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        known = _recall(self._run, self.name)
        session = self._module.start_run(run_id=known, run_name=None if known else self._run.name)
        _remember(self._run, self.name, session.info.run_id)
        if known is None:  # parameters of a run can be set once
            pairs = [(key, str(value)[:500]) for key, value in _flat(config)]
            for start in range(0, len(pairs), 100):  # the limits of the tracking server's interface
                self._module.log_params(dict(pairs[start : start + 100]))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log_metrics(dict(metrics), step=step)

    def finish(self) -> None:
        self._module.end_run()


class Trackio:
    """A run in the project ``luthier`` of the local trackio data base."""

    name = "trackio"

    def __init__(self, module: Any, run: Path) -> None:
        self._module = module
        self._run = run

    def start(self, config: Config, step: int) -> None:
        known = _recall(self._run, self.name)
        name = known or f"{self._run.name}-{uuid.uuid4().hex[:6]}"  # trackio continues runs by name: it must be unique
        _remember(self._run, self.name, name)
        self._session = self._module.init(
            project=PROJECT, name=name, config=dict(config), resume="allow" if known else "never"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._session.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._session.finish()


_LOGGERS: dict[str, tuple[Callable[[Any, Path], Logger], str]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard"),
    "wandb": (WandB, "wandb"),
    "mlflow": (MLflow, "mlflow"),
    "trackio": (Trackio, "trackio"),
}


def _flat(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _recall(run: Path, name: str) -> str | None:
    path = run / f"{name}.id"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _remember(run: Path, name: str, identity: str) -> None:
    (run / f"{name}.id").write_text(f"{identity}\n", encoding="utf-8")
