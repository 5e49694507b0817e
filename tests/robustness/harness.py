"""Tiny real runs in real processes: made in a folder, run by the command line's own main, killed, cut back, compared.

Every call runs in a process forked from a server that has imported the libraries and done nothing else, so that it
shares no state with another run and yet pays no start-up. `by_command` starts a whole new interpreter.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from tiny import make_llama, make_qwen3_moe
from warm import forkserver

from luthier.artifacts.run_folder import folder_of, published

STEPS = 20
WORDS = [
    "one",
    "two",
    "three",
    "order",
    "lamp",
    "red",
    "blue",
    "help",
    "late",
    "paid",
    "lost",
    "ship",
    "box",
    "morning",
    "sea",
    "violin",
]
VARYING = ("time", "tokens_per_second", "memory_gib")
"""What a record of metrics.jsonl says about clocks and memory."""


@dataclass(frozen=True)
class Setup:
    """A run file with its model and data in one folder; ``home`` holds the caches."""

    home: Path
    run: Path
    run_file: Path


@dataclass(frozen=True)
class Done:
    """How a call ended: exit code (minus the signal's number where one killed it), and all it printed."""

    code: int
    text: str


def make_setup(home: Path, *, model: str = "llama", lora: bool = True, changes: dict[str, Any] | None = None) -> Setup:
    """Write model, data and run file: 20 steps with dropout, saved at every step.

    Args:
        model: ``llama`` or ``moe``.
        changes: ``section.key`` to value.
    """
    home.mkdir(parents=True, exist_ok=True)
    (make_llama if model == "llama" else make_qwen3_moe)(home / "base")
    write_data(home / "data.jsonl", seed=0)
    config: dict[str, Any] = {
        "model": {"path": str(home / "base"), "precision": "fp32", "dropout": 0.1},
        "data": {"train": str(home / "data.jsonl")},
        "optim": {"lr": 0.01},
        "train": {"steps": STEPS, "batch_samples": 4, "micro_batch": 1, "max_length": 96, "packing": True},
        "checkpoint": {"every": 1, "keep": STEPS},
        "output": str(home / "run"),
    }
    if lora:
        config["adapter"] = {"type": "lora", "r": 4, "dropout": 0.0 if model == "moe" else 0.1}
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        if name:
            config.setdefault(section, {})[name] = copy.deepcopy(value)
        else:
            config[section] = copy.deepcopy(value)
    (home / "run.yaml").write_text(yaml.safe_dump(config))
    return Setup(home, Path(config["output"]), home / "run.yaml")


def write_data(path: Path, *, seed: int, samples: int = 48) -> None:
    """Short made-up conversations."""
    chosen = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(samples):
            said = [" ".join(chosen.choices(WORDS, k=chosen.randint(2, 9))) for _ in range(2)]
            roles = zip(("user", "assistant"), said, strict=True)
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}) + "\n")


@dataclass(frozen=True)
class Death:
    """An instant to be killed at: before the ``count``-th call of ``function`` whose first argument matches."""

    function: str
    pattern: str
    count: int = 1


class Running:
    """A call in a process of its own that has not ended yet."""

    def __init__(
        self, setup: Setup, arguments: Sequence[str], *, proof: bool = False, death: Death | None = None
    ) -> None:
        self._log = setup.home / f"log-{time.monotonic_ns()}.txt"
        target = functools.partial(_call, setup.home, list(arguments), self._log, proof, death)
        self.process = forkserver().Process(target=target)
        self.process.start()

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return pid

    @property
    def text(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_until(self, condition: Callable[[], bool], *, seconds: float = 240) -> None:
        """Wait for something that the process does; it must not end before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), f"it ended before: {self.text}"
            assert time.monotonic() < deadline, f"waited in vain: {self.text}"
            time.sleep(0.002)

    def end(self, *, seconds: float = 240) -> Done:
        """Wait for the end of the process."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it did not end in {seconds} s: {self.text}")
        code = self.process.exitcode
        assert code is not None
        return Done(code, self.text)


def call(setup: Setup, *arguments: str, proof: bool = False) -> Done:
    """Run ``luthier ARGUMENTS`` to its end; without ``proof`` training ends with its last checkpoint."""
    return Running(setup, arguments, proof=proof).end()


def train(setup: Setup, *overrides: str, proof: bool = False) -> Done:
    return call(setup, "train", str(setup.run_file), *overrides, proof=proof)


def resume(setup: Setup, run: Path | None = None, *arguments: str, proof: bool = False) -> Done:
    return call(setup, "resume", str(run or setup.run), *arguments, proof=proof)


def by_command(setup: Setup, *arguments: str) -> Done:
    """Run ``python -m luthier ARGUMENTS`` in a new interpreter."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(setup.home / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "luthier", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=setup.home, timeout=120)
    return Done(done.returncode, done.stdout + done.stderr)


def in_a_process(home: Path, function: str, *arguments: str) -> None:
    """Call ``module:function`` of a file in ``home`` in a forked process; it must end well."""
    log = home / f"log-{time.monotonic_ns()}.txt"
    process = forkserver().Process(target=_call_function, args=(home, function, arguments, log))
    process.start()
    process.join(200)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, log.read_text()


def cut_back(run: Path, step: int, target: Path) -> Path:
    """Copy a run as if it had been lost right after the checkpoint of ``step``."""
    target.mkdir(parents=True)
    for name in ("run.yaml", "metrics.jsonl", "facts.json"):
        shutil.copyfile(run / name, target / name)
    shutil.copytree(folder_of(run, step), folder_of(target, step))
    return target


def newest(run: Path) -> int:
    """The newest published step; 0 for none."""
    return max((found.step for found in published(run)), default=0)


def saved_bits(checkpoint: Path) -> dict[str, str]:
    """Digests of everything in a checkpoint but its manifest (which holds a time) and the metrics' length (which depends on digits of times)."""
    bits = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name, data = path.relative_to(checkpoint).as_posix(), path.read_bytes()
        if name == "trainer/state.json":
            state = json.loads(data)
            del state["extra"]["metrics_length"]
            data = json.dumps(state, sort_keys=True).encode()
        if name != "luthier.json":
            bits[name] = hashlib.sha256(data).hexdigest()
    return bits


def measured(run: Path) -> list[dict[str, Any]]:
    """The train and eval records of a run without clocks and memory."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in records if record["kind"] in ("train", "eval")]
    return [{key: value for key, value in record.items() if key not in VARYING} for record in kept]


def assert_same_run(run: Path, reference: Path, *, step: int = STEPS) -> None:
    """Weights, optimiser, masters, counters, small files and measurements are the same, bit for bit."""
    ours, theirs = saved_bits(folder_of(run, step)), saved_bits(folder_of(reference, step))
    assert sorted(ours) == sorted(theirs)
    assert any(name.startswith("trainer/optimizer") for name in ours)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert measured(run) == measured(reference)


@functools.cache
def _call_function(home: Path, function: str, arguments: Sequence[str], log: Path) -> None:
    _settle(home, log)
    pkgutil.resolve_name(function)(*arguments)


def _settle(home: Path, log: Path) -> None:
    """Write to the log, keep caches in the home, import from there."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    os.chdir(home)
    sys.path.insert(0, str(home))


def _call(home: Path, arguments: list[str], log: Path, proof: bool, death: Death | None) -> None:
    """What the forked process does."""
    _settle(home, log)
    from luthier import cli
    from luthier.training import finish

    with contextlib.ExitStack() as stack:
        if death is not None:
            stack.enter_context(mock.patch(death.function, _deadly(death)))
        if not proof:
            # The proof starts an interpreter, which would cost more than the run; what is asked here has happened by then.
            stack.enter_context(mock.patch.object(finish, "ask_live_model", side_effect=SystemExit(0)))
        sys.exit(cli.main(arguments))


def _deadly(death: Death) -> Callable[..., Any]:
    """The function itself, until the instant comes."""
    function = pkgutil.resolve_name(death.function)
    calls = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if re.search(death.pattern, str(args[0])) and next(calls) == death.count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call
