"""One run from its config to its proven final folder. Reads top to bottom: check, open, rehearse, train, prove."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts import fingerprint, publish
from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import exclusive, readable_size, replace_file
from luthier.artifacts.run_folder import Found, folder_of, published
from luthier.checkpoint.checkpoints import Checkpoints, read_state, versions
from luthier.checkpoint.retain import newest_whole
from luthier.config.read import parse_run, write_run
from luthier.config.schema import ModelConfig, RunConfig
from luthier.data.batches import Batches
from luthier.data.prepare import Prepared, prepare
from luthier.errors import ArtifactError, LuthierError, RequestError
from luthier.export.final import make_final
from luthier.export.prove import Answers, Probe, Proof, live_answers, make_probe
from luthier.models import adapters
from luthier.models.memory import recompute
from luthier.models.open import Base, open_base, open_config, open_tokenizer
from luthier.report.card import model_card
from luthier.report.metrics import MetricsLog, read_metrics
from luthier.report.page import write_report
from luthier.training import base_folder, metrics, numerics, optimizers, schedule
from luthier.training.events import Event, Events
from luthier.training.loop import Loop, Parts
from luthier.training.measure import Measurer
from luthier.training.progress import Progress
from luthier.training.rehearsal import rehearse_packing, rehearse_saving
from luthier.training.resolve import after_data, before_data, pick_device, reconcile, stored_config
from luthier.training.signals import stoppable
from luthier.training.state import State, seed_of

Say = Callable[[str], None]
PROBES = 3


@dataclass(frozen=True)
class Run:
    """A finished run: where its results lie."""

    path: Path
    final: Path
    proof: dict[str, Any]

    @property
    def checkpoints(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return [found.path for found in published(self.path)]

    @property
    def best(self) -> Path | None:
        """The checkpoint with the lowest held-out loss among those that are kept; None where none was evaluated."""
        found = best_checkpoint(self.path)
        return found.path if found else None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        return read_metrics(self.path / "metrics.jsonl")


def train(config: RunConfig, *, allow: Collection[str] = (), say: Say = print) -> Run:
    """Train a run from its config, or go on with it where its folder exists.

    Args:
        config: as read from a run file; what it leaves open is chosen here and written to ``run.yaml``.
        allow: keys that may differ from those an existing run was begun with.
        say: told one line at a time what happens, where the terminal shows no progress bar.

    Raises:
        RequestError: the config, the model's path or the data is wrong; before any weights are read.
        ArtifactError: something on disk is damaged, or the proof failed.
        Stopped: on SIGINT or SIGTERM, after a checkpoint was published.
    """
    run = Path(config.output)
    with ExitStack() as stack:
        run.mkdir(parents=True, exist_ok=True)
        stack.enter_context(exclusive(run / ".lock", "this run"))
        config, goes_on = reconcile(config, run, allow, say)
        if config.adapter is not None:
            adapters.check(config.adapter)
        metrics.resolve(config.evaluate.metrics)
        device = pick_device()
        publish.sweep(run)
        publish.sweep(run / "checkpoints")
        start = _starting_point(run, say) if goes_on else None
        stack.enter_context(numerics.settled(config, device))
        return _Session(config, run, device, start, allow, say).train()


def resume(run: str | Path, overrides: Collection[str] = (), *, allow: Collection[str] = (), say: Say = print) -> Run:
    """Go on with a run from its newest whole checkpoint.

    Args:
        overrides: ``key.sub=value`` changes, such as ``train.epochs=5``.

    Raises: as `train`.
    """
    config = stored_config(Path(run))
    config.output = str(Path(run).resolve())  # the folder may have been moved
    return train(parse_run(config.model_dump(mode="json", exclude_none=True), list(overrides)), allow=allow, say=say)


def best_checkpoint(run: Path) -> Found | None:
    """The kept checkpoint whose step had the lowest held-out loss."""
    losses = {
        record["step"]: record["eval_loss"]
        for record in read_metrics(run / "metrics.jsonl")
        if record["kind"] == "eval" and record["step"] > 0 and record["eval_loss"] is not None
    }
    kept = [found for found in published(run) if found.step in losses]
    return min(kept, key=lambda found: losses[found.step], default=None)


def how_to_open(kind: str) -> str:
    """Python that opens a final folder with plain libraries; ``FOLDER`` stands for its place."""
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    if kind == "model":
        return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
{tokenizer}"""
    return f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")
{tokenizer}"""


def _starting_point(run: Path, say: Say) -> Found | None:
    found = newest_whole(run, say)
    if found is None and published(run):
        raise ArtifactError(
            "none of this run's checkpoints is whole.",
            code="no-whole-checkpoint",
            where=str(run / "checkpoints"),
            remedy="`luthier verify` on each of them says what is damaged.",
        )
    if found is None:
        return None
    _, problems = manifests.verify(found[0].path)
    manifests.raise_problems(found[0].path, problems)
    return found[0]


class _Session:
    """The parts of one call of `train`, made in order."""

    def __init__(
        self, config: RunConfig, run: Path, device: torch.device, start: Found | None, allow: Collection[str], say: Say
    ) -> None:
        self.config, self.run, self.device, self.start, self.allow, self.say = config, run, device, start, allow, say
        self.extra: dict[str, Any] = read_state(start.path)["extra"] if start else {}
        self.notes: list[str] = []

    def train(self) -> Run:
        events = Events(self.config.callbacks, self.config.log, self.run, self.config, self.say)
        prepared, batches, total = self._data()
        state = State.from_dict(self.extra["state"]) if self.start else State()
        if state.step >= total and (self.run / "final").is_dir():
            return self._finished_already(total)
        base, model = self._model()
        self.say(adapters.summary(model, self.config.adapter))
        for note in [*base.notes, *self.notes]:
            self.say(note)
        parts = self._parts(base, model, prepared, batches, total, events)
        progress: Progress | None = None
        try:
            with stoppable(lambda text: (progress.say if progress else self.say)(text)) as stop:
                progress = Progress(total, state.step)
                Loop(parts, state, progress, stop).run()
        except BaseException:
            self._report()
            raise
        finally:
            if progress:
                progress.close()
            parts.metrics.close()
        return self._finish(parts, base, state, prepared)

    def _data(self) -> tuple[Prepared, Batches, int]:
        """Everything that can be wrong with the request is found here, before weights are read."""
        self.config = before_data(self.config, open_config(self._model_config()), self.device)
        tokenizer = open_tokenizer(self._model_config())
        prepared = prepare(self.config, tokenizer, say=self.notes.append)
        batches = Batches(prepared.train, self.config.train, pad_id=tokenizer.pad_token_id)
        self.config, total = after_data(self.config, batches.steps_per_epoch, has_held_out=prepared.eval is not None)
        self._compare_with_checkpoint(prepared.facts["fingerprint"], total)
        write_run(self.config, self.run / "run.yaml")
        return prepared, batches, total

    def _compare_with_checkpoint(self, data: str, total: int) -> None:
        if not self.start:
            return
        known = self.extra
        if known["data"] != data and "data" not in self.allow:
            raise RequestError(
                "the training data has changed since this run began, so the same step would see other samples.",
                code="data-changed",
                where="data.train",
                remedy="Put the data back, start a new run with another `output`, or insist with --allow data.",
            )
        if known["total_steps"] != total:
            self.notes.append(
                schedule.continuation_note(known["state"]["step"], known["total_steps"], total, self.config.optim)
            )
        now = versions()
        then = manifests.read(self.start.path).facts["versions"]
        changed = [f"{name} {then[name]} → {now[name]}" for name in now if name in then and then[name] != now[name]]
        if changed:
            self.notes.append(
                f"library versions changed, so bits may differ from an uninterrupted run: {', '.join(changed)}"
            )

    def _model_config(self) -> ModelConfig:
        """Where the model is opened from: the run file's path, or what this run wrote itself."""
        config = self.config.model
        if self.config.adapter is None and self.start:
            return config.model_copy(update={"path": str(self.start.path / "model"), "revision": None})
        own = base_folder.existing(self.run)
        return config if own is None else config.model_copy(update={"path": str(own), "revision": None})

    def _model(self) -> tuple[Base, nn.Module]:
        base = open_base(self._model_config(), device=self.device)
        own = base_folder.existing(self.run)
        if own is not None and self.config.adapter is not None:
            base.new_token_ids = tuple(manifests.read(own).facts["new_token_ids"])
        elif base.differs and self.config.adapter is not None:
            own = base_folder.write_base(self.run, base)
            self.notes.append(f"wrote the base once to {own}, so that plain peft opens final/")
        model: nn.Module = base.model
        if self.config.adapter is not None:
            model = adapters.attach(
                base, self.config.adapter, new_token_ids=base.new_token_ids,
                base_name=str(own) if own else base.source.name, seed=seed_of(self.config.train.seed, "adapter"),
            )  # fmt: skip
        else:
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        if self.config.train.memory == "recompute":
            recompute(base.model)
        if self.config.train.compile:
            from luthier.models.compile import by_layer

            by_layer(base.model)
        return base, model

    def _parts(
        self, base: Base, model: nn.Module, prepared: Prepared, batches: Batches, total: int, events: Events
    ) -> Parts:
        config = self.config
        optimizer = optimizers.build(model, config.optim, adapter=config.adapter is not None)
        environment = numerics.environment(self.device, base.model)
        identity = self._identity(base)
        checkpoints = Checkpoints(
            self.run, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every, tokenizer=base.tokenizer,
            facts={"base": identity, "parents": [{"kind": "base", **identity}]},
            metadata={"luthier.base": identity["fingerprint"]} if config.adapter else {}, say=self.say,
        )  # fmt: skip
        size = rehearse_saving(config, self.run, model, optimizer, checkpoints)
        if config.train.packing:
            rehearse_packing(model, prepared.train, self.device)
        log = MetricsLog(self.run / "metrics.jsonl")
        if self.start:
            self._restore(model, optimizer, checkpoints, environment, identity)
        log.cut(self.extra.get("metrics_length", 0))
        for line in optimizer.describe():
            self.say(line)
        self.say(
            f"{total} steps, {batches.steps_per_epoch} an epoch, on {environment['device']} in {config.model.precision}"
        )
        self.say(
            f"checkpoints: {self.run / 'checkpoints'} ({readable_size(size)} each, every {config.checkpoint.every} steps)"
        )
        self.say(f"final: {self.run / 'final'}")
        self._write_facts(model, prepared, environment, total, checkpoints.facts["parents"])
        return Parts(
            config, self.run, model, optimizer, batches, checkpoints,
            Measurer(config, base.tokenizer, prepared.eval, self.device), log, events, self.device, total,
            {"data": prepared.facts["fingerprint"], "total_steps": total, "environment": environment},
        )  # fmt: skip

    def _identity(self, base: Base) -> dict[str, Any]:
        """The base as manifests name it."""
        own = base_folder.existing(self.run)
        folder = own or base.source.path
        identity: dict[str, Any] = {"name": str(own) if own else base.source.name, "revision": base.source.revision}
        if self.config.adapter is None and self.start:
            return manifests.read(self.start.path).facts["base"]
        is_folder = folder is not None and folder.is_dir()
        found = fingerprint.of_folder(folder) if is_folder else fingerprint.of_file(folder) if folder else ""
        return {**identity, "fingerprint": found}

    def _restore(
        self,
        model: nn.Module,
        optimizer: Any,
        checkpoints: Checkpoints,
        environment: dict[str, Any],
        identity: dict[str, Any],
    ) -> None:
        assert self.start
        then = manifests.read(self.start.path).facts["base"]
        if then["fingerprint"] != identity["fingerprint"] and "model" not in self.allow:
            raise RequestError(
                f"the base at {identity['name']} is not the one this run was trained on (its weights differ).",
                code="base-changed",
                where="model.path",
                remedy="Give the right base with model.path=…, or insist with --allow model.",
            )
        checkpoints.restore(model, optimizer, step=self.start.step)
        self.say(f"resuming from step {self.start.step}: {self.start.path}")
        changed = numerics.differences(self.extra["environment"], environment)
        if changed:
            self.say(f"bits may differ from an uninterrupted run: {', '.join(changed)}")

    def _write_facts(
        self, model: nn.Module, prepared: Prepared, environment: dict[str, Any], total: int, parents: Any
    ) -> None:
        facts = {
            "parents": parents,
            "summary": adapters.summary(model, self.config.adapter),
            "data": prepared.facts,
            "device": environment["device"],
            "environment": environment,
            "versions": versions(),
            "total_steps": total,
        }
        replace_file(self.run / "facts.json", json.dumps(facts, indent=1, default=str).encode())

    def _finish(self, parts: Parts, base: Base, state: State, prepared: Prepared) -> Run:
        """Ask the live model, let go of it, and have plain libraries answer the same from the final folder."""
        samples = prepared.eval or prepared.train
        probe = make_probe(
            parts.model,
            [samples[index][0].tolist() for index in range(min(PROBES, len(samples)))],
            deterministic=self.config.train.deterministic,
            trust_remote_code=self.config.model.trust_remote_code,
        )
        if self.config.train.memory == "recompute":
            base.model.gradient_checkpointing_disable()
        expected = live_answers(parts.model, base.tokenizer, probe)
        facts = {
            "base": parts.checkpoints.facts["base"],
            "parents": parts.checkpoints.facts["parents"],
            "versions": versions(),
        }
        before = base.source.path if base.source.path and base.source.path.is_dir() else base_folder.existing(self.run)
        events, total = parts.events, parts.total_steps
        del parts, base
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        final, proof = self._prove(state.step, expected, probe, facts, before)
        self._report()
        events.emit(Event("end", state.step, total, self.run, {}, final))
        self._closing(final, proof, state)
        return Run(self.run, final, json.loads(proof.to_bytes()))

    def _prove(
        self, step: int, expected: Answers, probe: Probe, facts: dict[str, Any], before: Path | None
    ) -> tuple[Path, Proof]:
        begun = time.perf_counter()
        checkpoint = folder_of(self.run, step)

        def card(folder: Path, kind: str) -> str:
            return model_card(self.run, kind=kind, open_with=how_to_open(kind), final=folder)

        try:
            final, proof = make_final(self.run, checkpoint, expected, probe, facts=facts, card=card, base=before)
        except LuthierError:
            self._report()
            raise
        self.say(f"proof: {proof.verdict} in {time.perf_counter() - begun:.1f} s; {proof.says}")
        return final, proof

    def _report(self) -> None:
        try:
            write_report(self.run)
        except (LuthierError, OSError, ValueError, KeyError) as error:  # a picture never costs a run
            self.say(f"report.html could not be written: {error}")

    def _closing(self, final: Path, proof: Proof, state: State) -> None:
        kind = "adapter" if self.config.adapter else "model"
        self.say(f"the {kind} is in {final}")
        if state.best_loss is not None and state.best_step != state.step and math.isfinite(state.best_loss):
            kept = best_checkpoint(self.run)
            if kept and kept.step == state.best_step:
                self.say(
                    f"the lowest held-out loss was at step {state.best_step} ({state.best_loss:.4f}): {self.run}@best"
                )
        self.say(f"open it: luthier chat {final}    look at it: {self.run / 'report.html'}")

    def _finished_already(self, total: int) -> Run:
        self.say(
            f"this run is finished ({total} steps); its result is {self.run / 'final'}. More: train.epochs or train.steps"
        )
        proof = json.loads((self.run / "final" / "proof.json").read_text())
        return Run(self.run, self.run / "final", proof)
