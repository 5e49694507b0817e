"""The training loop, in the order in which things happen.

One step: its micro-batches forward and backward, gradients summed, clipped, applied; then, where they are due, a
checkpoint and after it an evaluation, so that saving never waits for an evaluation's result.
"""

from __future__ import annotations

import math
import shlex
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts.files import readable_size
from luthier.checkpoint.checkpoints import Checkpoints, Saved
from luthier.config.schema import RunConfig
from luthier.data.batches import Batches, MicroBatch, StepBatch
from luthier.errors import ArtifactError, LuthierError, Stopped
from luthier.models.precision import dtype_of
from luthier.objectives import causal_loss
from luthier.report.metrics import MetricsLog
from luthier.training import schedule
from luthier.training.events import Event, Events
from luthier.training.loss_scale import LossScale
from luthier.training.measure import Measurer
from luthier.training.optimizers import Optimizer
from luthier.training.progress import Progress
from luthier.training.signals import StopRequest
from luthier.training.state import State, seed_of

PLACES_SHOWN = 8
"""Samples whose places are named where a step is not finite."""


@dataclass
class Parts:
    """What the loop works with; made by ``training.run``."""

    config: RunConfig
    run: Path
    model: nn.Module
    optimizer: Optimizer
    batches: Batches
    checkpoints: Checkpoints
    measurer: Measurer
    metrics: MetricsLog
    events: Events
    device: torch.device
    total_steps: int
    fingerprints: dict[str, Any]


class Loop:
    """Trains from ``state.step`` to the end, or until it is asked to stop."""

    def __init__(self, parts: Parts, state: State, progress: Progress, stop: StopRequest) -> None:
        self.parts, self.state, self.progress, self.stop = parts, state, progress, stop
        config = parts.config
        self._scale = LossScale(enabled=dtype_of(config.model, parts.device) == torch.float16)
        if state.loss_scale:
            self._scale.load_state(state.loss_scale)
        per_epoch = parts.batches.steps_per_epoch
        self._save_every = steps_of(config.checkpoint.every, per_epoch)
        self._evaluate_every = steps_of(config.evaluate.every, per_epoch)
        if config.checkpoint.best and state.best_step > 0:
            parts.checkpoints.protected.add(state.best_step)
        self._saved = state.step if state.step else -1  # a resumed step is on disk already
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[StepBatch]] | None = None
        self._dtype = next(p.dtype for p in parts.model.parameters() if p.is_floating_point())

    def run(self) -> None:
        """Train to the end.

        Raises:
            Stopped: on request, after a checkpoint was published.
            LuthierError: too many steps in a row were not finite, or saving failed.
        """
        with self._beside:
            self._run()

    def _run(self) -> None:
        parts, state = self.parts, self.state
        parts.events.emit(self._event("start"))
        self._evaluate_if_due()
        if self.stop and state.step < parts.total_steps:
            self._leave_on_request()
        while state.step < parts.total_steps and not self._patience_is_over():
            record = self.train_step()
            self._log(record)
            self._save_if_due()
            self._evaluate_if_due()
            self._report_saves(parts.checkpoints.finished())
            if self.stop and state.step < parts.total_steps:
                self._leave_on_request()
        self._save()
        parts.checkpoints.wait()
        self._report_saves(parts.checkpoints.finished())

    def train_step(self) -> dict[str, Any]:
        """Do one optimiser step; returns its record for metrics.jsonl."""
        parts, state, config = self.parts, self.state, self.parts.config
        begun = time.perf_counter()
        batch = self._batch()
        parts.model.train()
        loss = torch.zeros(
            (), dtype=torch.float64 if parts.device.type != "mps" else torch.float32, device=parts.device
        )
        for position, micro_batch in enumerate(batch.micro_batches):
            loss += self._micro_step(micro_batch, position, batch)
        norm = self._gradient_norm()
        loss_value, norm_value = float(loss), float(norm)
        rate = schedule.rate(state.step, parts.total_steps, config.optim)
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        if finite:
            parts.optimizer.step(rate)
        parts.optimizer.zero_grad()
        reason = self._after(finite, loss_value, norm_value, batch)
        state.step += 1
        state.tokens += batch.tokens
        state.samples += batch.samples
        seconds = time.perf_counter() - begun
        record = {
            "kind": "train",
            "step": state.step,
            "time": time.time(),
            "epoch": state.step / parts.batches.steps_per_epoch,
            "loss": loss_value,
            "lr": rate * parts.optimizer.base_rate,
            "grad_norm": norm_value,
            "tokens": batch.tokens,
            "trained_tokens": batch.trained_tokens,
            "samples": batch.samples,
            "tokens_per_second": batch.tokens / seconds,
            "memory_gib": memory_gib(parts.device),
            "skipped": not finite,
        }
        return record if finite else {**record, "reason": reason, "indices": batch.indices[:64]}

    def _batch(self) -> StepBatch:
        """This step's samples; the next step's are put together beside it. Which ones is a function of the step alone."""
        step = self.state.step
        batch = self._ahead[1].result() if self._ahead and self._ahead[0] == step else self.parts.batches.step(step)
        if step + 1 < self.parts.total_steps:
            self._ahead = (step + 1, self._beside.submit(self.parts.batches.step, step + 1))
        return batch

    def _micro_step(self, micro_batch: MicroBatch, position: int, batch: StepBatch) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its share of the step's loss."""
        parts = self.parts
        torch.manual_seed(seed_of(parts.config.train.seed, "dropout", self.state.step, position))
        with self._autocast():
            loss = causal_loss(parts.model, micro_batch)
        share = loss.sum / batch.trained_tokens
        if loss.extra is not None:
            share = share + loss.extra / len(batch.micro_batches)
        (share * self._scale.value).backward()
        parts.optimizer.accumulate()
        return share.detach()

    def _gradient_norm(self) -> torch.Tensor:
        optimizer = self.parts.optimizer
        if self._scale.value != 1.0:
            optimizer.scale_gradients(1.0 / self._scale.value)
        return optimizer.clip(self.parts.config.optim.clip)

    def _after(self, finite: bool, loss: float, norm: float, batch: StepBatch) -> str:
        """Keep count of steps that were not finite; returns why this one was skipped."""
        state, limit = self.state, self.parts.config.train.nan_limit
        overflow = self._scale.update(finite and math.isfinite(loss))
        state.loss_scale = self._scale.state()
        if finite:
            state.nonfinite = 0
            return ""
        if overflow and math.isfinite(loss):
            return f"fp16 overflow; the loss scale is now {self._scale.value:g}"
        state.nonfinite += 1
        what = "loss" if not math.isfinite(loss) else "gradient norm"
        value = loss if what == "loss" else norm
        reason = f"{what} is {value}"
        self.progress.say(f"step {state.step + 1} skipped: {reason}; its samples are {self._places(batch.indices)}")
        if state.nonfinite >= limit:
            raise LuthierError(
                f"{limit} steps in a row were not finite (the last: {reason}).",
                code="not-finite",
                where=f"step {state.step + 1}",
                remedy="Lower optim.lr, look at the samples named above with `luthier data`, or use model.precision: bf16 or fp32."
                + (f" The last checkpoint is of step {self._saved}." if self._saved > 0 else " Nothing was saved yet."),
            )
        return reason

    def _places(self, indices: list[int]) -> str:
        """Where samples came from, the first few: each file once, with its lines."""
        lines: dict[str, list[str]] = {}
        for index in indices[:PLACES_SHOWN]:
            file, _, line = self.parts.batches.place(index).rpartition(":")
            lines.setdefault(file, []).append(line)
        shown = "; ".join(f"{file}:{','.join(numbers)}" for file, numbers in lines.items())
        return shown + (", …" if len(indices) > PLACES_SHOWN else "")

    def _log(self, record: dict[str, Any]) -> None:
        self.parts.metrics.append(record)
        self.progress.step(record)
        self.parts.events.emit(self._event("step", metrics=record))

    def _save_if_due(self) -> None:
        if self._save_every and self.state.step % self._save_every == 0:
            self._save()

    def _save(self) -> None:
        """Publish this step, unless it is already on disk."""
        parts, state = self.parts, self.state
        if self._saved == state.step:
            return
        extra = {**parts.fingerprints, "state": state.as_dict(), "metrics_length": parts.metrics.length()}
        parts.checkpoints.save(state.step, parts.model, parts.optimizer, extra)
        self._saved = state.step

    def _report_saves(self, saves: list[Saved]) -> None:
        for saved in saves:
            self.parts.metrics.append(
                {"kind": "checkpoint", "step": saved.step, "time": time.time(), "path": str(saved.path), "bytes": saved.bytes, "seconds": saved.seconds, "stall_seconds": saved.stall}
            )  # fmt: skip
            state = "read back" if not saved.problems else f"READS BACK WRONG: {saved.problems[0].message}"
            self.progress.say(
                f"saved step {saved.step}: {saved.path} ({readable_size(saved.bytes)} in {saved.seconds:.1f} s, "
                f"the step waited {saved.stall:.2f} s; {state}); open it: luthier chat {shlex.quote(str(saved.path))}"
            )
            if not saved.problems:
                self.parts.events.emit(replace(self._event("checkpoint", path=saved.path), step=saved.step))
            elif saved.step == self.state.step and (self.stop or saved.step == self.parts.total_steps):
                raise ArtifactError(
                    f"the last checkpoint reads back wrong: {saved.problems[0].message}",
                    code="reads-back-wrong",
                    where=str(saved.path),
                    remedy="Check the disk, then run `luthier resume`: it goes on from the newest whole checkpoint.",
                )

    def _evaluate_if_due(self) -> None:
        parts, state = self.parts, self.state
        last = state.step == parts.total_steps
        due = state.step == 0 or last or (self._evaluate_every and state.step % self._evaluate_every == 0)
        if not due or not parts.measurer.has_data or state.evaluated == state.step:
            return
        record = parts.measurer.measure(parts.model, state.step, self.progress.say)
        parts.metrics.append(record)
        parts.events.emit(self._event("evaluation", metrics=record))
        state.evaluated = state.step
        loss = record["eval_loss"]
        if state.step == 0:
            return
        if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_step, state.worse = loss, state.step, 0
            if parts.config.checkpoint.best:
                self._save()
                parts.checkpoints.protected.clear()
                parts.checkpoints.protected.add(state.step)
        else:
            state.worse += 1

    def _patience_is_over(self) -> bool:
        patience = self.parts.config.evaluate.patience
        over = patience is not None and self.state.worse >= patience
        if over:
            text = f"stopping early at step {self.state.step}: {patience} evaluations without a better eval_loss"
            self.progress.say(text)
            self.parts.metrics.append({"kind": "note", "step": self.state.step, "time": time.time(), "message": text})
        return over

    def _leave_on_request(self) -> None:
        self._save()
        self.parts.checkpoints.wait()
        self._report_saves(self.parts.checkpoints.finished())
        raise Stopped(
            f"stopped on {self.stop.reason} after step {self.state.step} of {self.parts.total_steps}; the checkpoint is published.",
            code="stopped",
            where=str(self.parts.run),
            remedy=f"Go on with: luthier resume {shlex.quote(str(self.parts.run))}",
        )

    def _event(self, kind: Any, metrics: dict[str, Any] | None = None, path: Path | None = None) -> Event:
        return Event(kind, self.state.step, self.parts.total_steps, self.parts.run, metrics or {}, path)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Compute in the base's 16-bit dtype where adapter weights are held in fp32 beside it."""
        mixed = self._dtype in (torch.bfloat16, torch.float16) and self.parts.config.adapter is not None
        return torch.autocast(self.parts.device.type, self._dtype) if mixed else nullcontext()


def steps_of(interval: int | str | None, per_epoch: int) -> int:
    """An interval of the run file in steps: ``100``, ``"1 epoch"``, ``"0.5 epochs"``; 0 for none."""
    if isinstance(interval, str):
        return max(1, round(float(interval.split()[0]) * per_epoch))
    return interval or 0


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_process_gib()


def peak_process_gib() -> float:
    """The largest resident size this process has had, in GiB; 0 where the system doesn't say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
