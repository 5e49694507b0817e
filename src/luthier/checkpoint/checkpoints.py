"""Saving beside training, and finding one's way back.

A save has two halves. The first copies what is saved into host memory, and the step waits for it. The second
writes, publishes, reads back and, only then, lets retention delete something older; it runs in a thread beside the
following steps. Two saves are never in flight.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts import manifest as manifests
from luthier.artifacts import publish
from luthier.artifacts.manifest import Manifest, Problem, versions
from luthier.artifacts.run_folder import Found, folder_of, published
from luthier.checkpoint import training_state
from luthier.checkpoint.layout import Layout, is_adapter, model_layout, plain_layout, saved_state
from luthier.checkpoint.ranks import Ranks
from luthier.checkpoint.read import places_in, read_tensors
from luthier.checkpoint.retain import delete, may_go, newest_whole
from luthier.checkpoint.shards import HostBuffers, Shard, forms_of
from luthier.checkpoint.small_files import small_files
from luthier.checkpoint.write import Part, plan_part, write_parts
from luthier.errors import ArtifactError, LuthierError

STATE = "trainer/state.json"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was published. ``stall`` is the time the step waited, ``seconds`` the time until it was published."""

    step: int
    path: Path
    bytes: int
    stall: float
    seconds: float
    problems: tuple[Problem, ...] = ()


@dataclass
class _Flight:
    step: int
    thread: threading.Thread
    failure: BaseException | None = None
    saved: Saved | None = None


@dataclass(frozen=True)
class _Prepared:
    """What stays the same from save to save."""

    weights: Layout
    small: dict[str, bytes] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run: ``save`` beside training, ``restore`` exactly.

    Args:
        run: the run's folder; checkpoints lie in ``run/checkpoints/step-NNNNNNNN``.
        keep: how many of the newest stay.
        keep_every: those at multiples of this step stay for good.
        tokenizer: saved with every checkpoint, so that each of them can be served.
        facts: what the manifest says beside the bytes (base, parents).
        ranks: the processes that save together.
        metadata: goes into the weight files' own headers.
        say: told what is written where, and what is passed over.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        tokenizer: Any | None = None,
        facts: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        metadata: Mapping[str, str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.run = Path(run)
        self.protected: set[int] = set()
        self._keep, self._keep_every = keep, keep_every
        self._tokenizer = tokenizer
        self.facts = dict(facts or {})
        self._ranks = ranks or Ranks()
        self._metadata = {"format": "pt", **(metadata or {})}
        self._say = say or (lambda text: None)
        self._buffers: dict[str, HostBuffers] = {}
        self._prepared: tuple[nn.Module, _Prepared] | None = None
        self._flight: _Flight | None = None
        self._reserving: threading.Thread | None = None
        self._done: list[Saved] = []

    def save(
        self, step: int, model: nn.Module, optimizer: Any | None = None, extra: Mapping[str, Any] | None = None
    ) -> float:
        """Copy the state of ``step`` and write it beside what follows; returns the seconds of the copy.

        Args:
            optimizer: Luthier's or any torch optimiser.
            extra: JSON values to get back from `state_of`.

        Raises:
            LuthierError: the previous save failed (a full disk), or a checkpoint of this step exists.
        """
        begun = time.perf_counter()
        self.wait()
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        prepared = self._prepare(model)
        parts, shards = self._snapshot(model, optimizer, prepared)
        stall = time.perf_counter() - begun
        state = {"format": 1, "step": step, "groups": training_state.groups_of(optimizer), "extra": dict(extra or {})}
        folder = parts[0].folder
        small = {f"{folder}/{name}": data for name, data in prepared.small.items()}
        small[STATE] = json.dumps(state, indent=1).encode() + b"\n"
        facts = {"step": step, "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **self.facts, "versions": versions()}
        arguments = (step, parts, shards, small, facts, model, begun, stall)
        flight = _Flight(step, threading.Thread(target=self._run, args=arguments, name=f"save-{step}"))
        self._flight = flight
        flight.thread.start()
        return stall

    def reserve(self, model: nn.Module, optimizer: Any | None = None) -> None:
        """Begin to allocate the host memory of snapshots, beside the first steps."""
        state = training_state.collect(model, optimizer)
        tensors = {"weights": saved_state(model, self._prepare(model).weights), **state}
        forms = {stem: forms_of(values, self._ranks) for stem, values in tensors.items()}
        for stem in forms:
            self._buffers.setdefault(stem, HostBuffers())

        def work() -> None:
            for stem, wanted in forms.items():
                self._buffers[stem].reserve(wanted)

        self._reserving = threading.Thread(target=work, name="reserve", daemon=True)
        self._reserving.start()

    def wait(self) -> None:
        """Wait for the save in flight, if any.

        Raises:
            LuthierError: it failed.
        """
        flight = self._flight
        if flight is None:
            return
        if flight.thread.is_alive():
            begun = time.perf_counter()
            flight.thread.join()
            if (waited := time.perf_counter() - begun) > 1:
                self._say(f"waited {waited:.1f} s for the checkpoint of step {flight.step} to be written")
        self._flight = None
        if flight.failure is not None:
            raise flight.failure
        if flight.saved is not None:
            self._done.append(flight.saved)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def finished(self) -> list[Saved]:
        """The saves that were published and read back since the last call; never waits.

        Raises:
            LuthierError: a save failed.
        """
        if self._flight is not None and not self._flight.thread.is_alive():
            self.wait()
        done, self._done = self._done, []
        return done

    def size_of_save(self, model: nn.Module, optimizer: Any | None) -> int:
        """Bytes that one checkpoint will take: the save is planned, nothing is written."""
        prepared = self._prepare(model)
        parts = self._plan(prepared, model, training_state.collect(model, optimizer))
        return sum(part.size for part in parts) + sum(len(data) for data in prepared.small.values())

    def restore(self, model: nn.Module, optimizer: Any | None = None, *, step: int | None = None) -> int:
        """Read a checkpoint back into a model and its optimiser; returns its step, 0 where there is none.

        Args:
            step: which one; the newest whole one if left out.

        Raises:
            ArtifactError: it is damaged, or is not of this model and optimiser.
        """
        found = self.find(step)
        if found is None:
            return 0
        manifests.raise_problems(found.path, manifests.verify(found.path)[1])
        self.load(found, model, optimizer)
        return found.step

    def load(self, found: Found, model: nn.Module, optimizer: Any | None = None) -> None:
        """Read the tensors of a checkpoint that was verified into a model and its optimiser.

        Raises:
            ArtifactError: they are not of this model and optimiser.
        """
        layout = self._prepare(model).weights
        folder, stem = _weights_name(model)
        read_tensors(found.path / folder, stem, layout, saved_state(model, layout), converter=model)
        if optimizer is not None:
            parts = {}
            for stem in ("optimizer", "masters"):
                if list((found.path / "trainer").glob(f"{stem}*.safetensors")):
                    specs = [place.spec for _, place in places_in(found.path / "trainer", stem).values()]
                    targets = training_state.targets(model, specs)
                    read_tensors(found.path / "trainer", stem, plain_layout(targets), targets)
                    parts[stem] = targets
            training_state.load(model, optimizer, parts, read_state(found.path)["groups"])

    def state_of(self, step: int) -> dict[str, Any]:
        """The ``extra`` values saved with a step."""
        return read_state(folder_of(self.run, step))["extra"]

    def find(self, step: int | None = None) -> Found | None:
        """The checkpoint of a step, or the newest whole one.

        Raises:
            ArtifactError: there are checkpoints and none is whole, or the step asked for has none.
        """
        if step is None:
            newest = newest_whole(self.run, self._say)
            if newest is None and published(self.run):
                raise ArtifactError(
                    "none of this run's checkpoints is whole.",
                    code="no-whole-checkpoint",
                    where=str(self.run / "checkpoints"),
                    remedy="`luthier verify` on each of them says what is damaged.",
                )
            return newest[0] if newest else None
        for item in published(self.run):
            if item.step == step:
                return item
        raise ArtifactError(f"there is no checkpoint of step {step}.", code="no-checkpoint", where=str(self.run))

    def _prepare(self, model: nn.Module) -> _Prepared:
        if self._prepared is None or self._prepared[0] is not model:
            self._prepared = (model, _Prepared(model_layout(model), small_files(model, self._tokenizer)))
        return self._prepared[1]

    def _plan(
        self, prepared: _Prepared, model: nn.Module, state: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> list[Part]:
        folder, stem = _weights_name(model)
        whole = {"shard_bytes": sys.maxsize} if folder == "adapter" else {}  # peft opens no sharded adapter
        parts = [plan_part(folder, stem, prepared.weights, self._metadata, **whole)]
        return parts + [
            plan_part("trainer", stem, plain_layout(tensors), {"format": "pt"}) for stem, tensors in state.items()
        ]

    def _snapshot(
        self, model: nn.Module, optimizer: Any | None, prepared: _Prepared
    ) -> tuple[list[Part], list[dict[str, Shard]]]:
        state = training_state.collect(model, optimizer)
        gathered = {name for group in prepared.weights.groups for name in group}
        tensors = [("weights", saved_state(model, prepared.weights), gathered)]
        tensors += [(stem, values, set()) for stem, values in state.items()]
        shards = [
            self._buffers.setdefault(stem, HostBuffers()).snapshot(values, self._ranks, whole)
            for stem, values, whole in tensors
        ]
        return self._plan(prepared, model, state), shards

    def _run(
        self,
        step: int,
        parts: list[Part],
        shards: list[dict[str, Shard]],
        small: dict[str, bytes],
        facts: dict[str, Any],
        model: nn.Module,
        begun: float,
        stall: float,
    ) -> None:
        """Write, publish, read back, retain. Runs in the thread; a failure is kept for the next `wait`."""
        flight = self._flight
        assert flight is not None
        try:
            target = folder_of(self.run, step)
            manifest = self._write(target, parts, shards, small, facts, model)
            seconds = time.perf_counter() - begun
            problems = self._read_back(step, target) if self._ranks.rank == 0 else []
            flight.saved = Saved(step, target, manifest.size, stall, seconds, tuple(problems))
        except Exception as error:  # handed to the training thread by wait()
            flight.failure = error

    def _write(
        self,
        target: Path,
        parts: list[Part],
        shards: list[dict[str, Shard]],
        small: dict[str, bytes],
        facts: dict[str, Any],
        model: nn.Module,
    ) -> Manifest:
        partial = target.parent / f"{publish.MARK}{target.name}"
        try:
            with self._ranks.sharing_failure():
                if self._ranks.rank == 0:
                    self._make_way(target)
                    publish.begin(target)
            manifest = write_parts(partial, parts, shards, small, kind="checkpoint", facts=facts, ranks=self._ranks, converter=model)  # fmt: skip
            with self._ranks.sharing_failure():
                if self._ranks.rank == 0:
                    publish.finish(partial, target, manifest)
        except (LuthierError, OSError):
            if self._ranks.rank == 0:
                publish.sweep(target.parent)  # a full disk gets its room back
            raise
        return manifest

    def _make_way(self, target: Path) -> None:
        """Remove a damaged checkpoint that resuming passed over, now that its step is saved again."""
        if target.exists() and manifests.verify(target)[1]:
            self._say(f"replacing the damaged checkpoint {target}")
            publish.remove(target)

    def _read_back(self, step: int, target: Path) -> list[Problem]:
        """Verify what was published; only then may something older go."""
        manifests.forget(target)
        _, problems = manifests.verify(target, threads=1)
        if problems:
            self._say(f"the checkpoint {target} reads back wrong: {problems[0].message} Nothing older was deleted.")
            return problems
        # A newer one was damaged and passed over: it must not count as one of those that are kept instead of this.
        steps = [item.step for item in published(self.run) if item.step <= step]
        delete(self.run, may_go(steps, keep=self._keep, keep_every=self._keep_every, protected=self.protected))
        return []


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's ``trainer/state.json``.

    Raises:
        ArtifactError: it is missing or unreadable.
    """
    try:
        return json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the training state cannot be read: {error}.", code="state", where=str(checkpoint)
        ) from None


def _weights_name(model: nn.Module) -> tuple[str, str]:
    return ("adapter", "adapter_model") if is_adapter(model) else ("model", "model")
