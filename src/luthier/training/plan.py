"""``luthier plan``: memory, time and disk before the first step, and a rehearsal: one step, one save, one reload.

Everything is done with the real model, data and disk in a hidden folder beside the output, and removed afterwards.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts.files import free_bytes, readable_size
from luthier.artifacts.manifest import verify
from luthier.checkpoint.layout import model_layout, saved_state
from luthier.config.schema import RunConfig
from luthier.errors import ArtifactError
from luthier.models import adapters, stack
from luthier.training import metrics, numerics, pushing
from luthier.training.events import Events
from luthier.training.loop import Loop, Parts, memory_gib, steps_of
from luthier.training.progress import Progress, duration
from luthier.training.resolve import not_writable, pick_device
from luthier.training.session import Session
from luthier.training.signals import StopRequest
from luthier.training.stage import settle
from luthier.training.state import State


@dataclass(frozen=True)
class Plan:
    """What a run will need. Bytes, seconds and GiB."""

    summary: str
    device: str
    precision: str
    total_steps: int
    steps_per_epoch: int
    tokens_per_step: float
    seconds_per_step: float
    seconds: float
    memory_gib: float
    checkpoint_bytes: int
    disk_bytes: int
    free_bytes: int
    stall_seconds: float
    save_seconds: float
    rehearsal: str
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(
            [
                self.summary,
                f"steps      {self.total_steps} ({self.steps_per_epoch} an epoch, {self.tokens_per_step:.0f} tokens each) on {self.device} in {self.precision}",
                f"time       about {duration(self.seconds)}: {self.seconds_per_step:.2f} s a step, evaluation not counted",
                f"memory     {self.memory_gib:.2f} GiB at the peak of the steps tried",
                f"disk       {readable_size(self.disk_bytes)} of {readable_size(self.free_bytes)} free; {readable_size(self.checkpoint_bytes)} a checkpoint",
                f"saving     {self.save_seconds:.2f} s beside training; a step waits {self.stall_seconds:.2f} s",
                f"rehearsal  {self.rehearsal}",
                *self.notes,
            ]
        )


TRIED_STEPS = 3


def plan(config: RunConfig) -> Plan:
    """Try a run: a few steps, the last ones timed, one save read back, one reload compared bit for bit.

    Raises:
        RequestError, LuthierError: what would also stop the run itself.
        ArtifactError: what was saved does not come back.
    """
    output = Path(config.output)
    said: list[str] = []
    if config.adapter is not None and config.adapter.then != "continue":
        adapters.check(config.adapter)
    metrics.resolve(config.evaluate.metrics)
    Events(config.callbacks, config.log, output, config, said.append).close()
    parent = next(folder for folder in output.parents if folder.exists())
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".luthier-plan-", dir=parent))
    except OSError as error:
        raise not_writable(output, error) from None
    try:
        device = pick_device()
        trial = config.model_copy(deep=True)
        trial.output = str(scratch)
        with numerics.settled(trial, device):
            trial, origin = settle(trial, scratch)
            notes = pushing.check(trial)
            session = Session(trial, scratch, device, None, (), said.append, origin)
            prepared, batches, total = session.data()
            base, model = session.model()
            parts = session.parts(base, model, prepared, batches, total, Events([], [], scratch, trial, said.append))
            progress = Progress(total)
            try:
                made = _measure(parts, progress, adapters.summary(model, trial.adapter), total)
                return replace(made, notes=notes)
            finally:
                progress.close()
                parts.metrics.close()
    finally:
        shutil.rmtree(scratch)


def _measure(parts: Parts, progress: Progress, summary: str, total: int) -> Plan:
    state = State()
    loop = Loop(parts, state, progress, StopRequest())
    seconds, tokens = [], []
    for _ in range(min(TRIED_STEPS, total)):
        begun, before = time.perf_counter(), state.tokens
        loop.train_step()
        seconds.append(time.perf_counter() - begun)
        tokens.append(state.tokens - before)
    begun = time.perf_counter()
    stall = parts.checkpoints.save(state.step, parts.model, parts.optimizer)
    parts.checkpoints.wait()
    save_seconds = time.perf_counter() - begun
    folder = parts.checkpoints.find(state.step)
    assert folder is not None
    manifest, problems = verify(folder.path)
    assert manifest is not None
    rehearsal = _reload(parts, state.step) if not problems else f"FAILED: {problems[0].message}"
    rate = min(seconds[1:] or seconds)
    base = parts.run / "base"
    base_bytes = sum(path.stat().st_size for path in base.rglob("*") if path.is_file()) if base.is_dir() else 0
    checkpoint = parts.config.checkpoint
    kept = checkpoint.keep + 1 + (checkpoint.best is not None)
    kept += total // checkpoint.keep_every if checkpoint.keep_every else 0
    kept = min(kept, total // max(1, steps_of(checkpoint.every, parts.batches.steps_per_epoch)) + 1)
    return Plan(
        summary, str(parts.device), parts.config.model.precision or "the precision of its folder", total, parts.batches.steps_per_epoch,
        sum(tokens) / len(tokens), rate, rate * total, memory_gib(parts.device), manifest.size,
        manifest.size * kept + base_bytes, free_bytes(parts.run), stall, save_seconds, rehearsal,
    )  # fmt: skip


def _reload(parts: Parts, step: int) -> str:
    """Spoil the live weights, read the save back into them, and compare."""
    tensors = saved_state(parts.model, model_layout(parts.model))
    if stack.is_stacked(parts.model):  # the lower adapter is no part of what a reload brings back
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    parts.checkpoints.restore(parts.model, parts.optimizer, step=step)
    wrong = [name for name, tensor in tensors.items() if not same_bits(tensor, expected[name])]
    if wrong:
        raise ArtifactError(
            f"{len(wrong)} tensors came back changed from the rehearsal's save, such as {wrong[0]}.",
            code="rehearsal",
            where=str(parts.run),
            remedy="Do not train on this disk; if another one shows the same, please report it.",
        )
    return f"{min(TRIED_STEPS, parts.total_steps)} steps, one save read back, one reload: {len(tensors)} tensors, bits equal"


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes; by value, one that is not a number would differ from itself."""
    return torch.equal(*(tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
