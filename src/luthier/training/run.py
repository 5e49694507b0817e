"""One run from its config to its proven final folder: check, open, rehearse, train, prove."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts import manifest as manifests
from luthier.artifacts import publish
from luthier.artifacts.files import exclusive, full_disk_named
from luthier.artifacts.run_folder import Found, published
from luthier.checkpoint.retain import newest_whole
from luthier.config.chain import Chain, read_stored
from luthier.config.read import parse_run
from luthier.config.schema import RunConfig
from luthier.errors import ArtifactError, LuthierError, RequestError, Stopped
from luthier.models import adapters
from luthier.report.metrics import read_metrics
from luthier.training import chains, finish, metrics, numerics, pushing, stage
from luthier.training.events import Events
from luthier.training.loop import Loop
from luthier.training.progress import Progress
from luthier.training.resolve import not_writable, pick_device, reconcile, stored_config
from luthier.training.session import Session
from luthier.training.signals import stoppable
from luthier.training.state import State

Say = Callable[[str], None]


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
        found = finish.best_checkpoint(self.path)
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
        stack.enter_context(full_disk_named(run))
        config, origin = stage.settle(config, run, allow)
        config, goes_on = reconcile(config, run, allow, say)
        if config.adapter is not None and config.adapter.then != "continue":
            adapters.check(config.adapter)
        metrics.resolve(config.evaluate.metrics)
        for note in pushing.check(config):
            say(note)
        events = Events(config.callbacks, config.log, run, config, say)
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_writable(run, error) from None
        stack.enter_context(exclusive(run / ".lock", "this run"))
        publish.sweep(run)
        publish.sweep(run / "checkpoints")
        device = pick_device()
        stack.enter_context(numerics.settled(config, device))
        start = _starting_point(run, say) if goes_on else None
        if not goes_on and (run / "base").exists():  # of a beginning that never saved anything
            publish.remove(run / "base")
        return _train(Session(config, run, device, start, allow, say, origin), events)


def resume(run: str | Path, overrides: Collection[str] = (), *, allow: Collection[str] = (), say: Say = print) -> Run:
    """Go on with a run from its newest whole checkpoint.

    Args:
        overrides: ``key.sub=value`` changes, such as ``train.epochs=5``.

    Raises: as `train`.
    """
    chain = read_stored(Path(run), list(overrides))
    if chain is not None:
        return train_chain(chain, allow=allow, say=say)
    config = stored_config(Path(run))
    config.output = str(Path(run).resolve())  # the folder may have been moved
    values = config.model_dump(mode="json", exclude_none=True)
    stand_in = _stand_in(config)
    values["model"]["path"] = stand_in
    given = parse_run(values, list(overrides))
    if given.model.path == stand_in:
        given.model.path = config.model.path
    if given.output != config.output:
        raise RequestError(
            f"a run goes on in its own folder, {run}; {given.output} would be another run, begun at its first step.",
            code="output",
            where="output",
            remedy="Leave `output` out; to go on elsewhere, copy the run's folder and resume the copy.",
        )
    return train(given, allow=allow, say=say)


def _stand_in(config: RunConfig) -> str:
    """The model's path; where it is gone, full fine-tuning goes on from its checkpoints and needs it no more."""
    path, saved = Path(config.model.path), published(Path(config.output))
    gone = path.is_absolute() and not path.exists()
    return str(saved[-1].path / "model") if config.adapter is None and saved and gone else config.model.path


def train_chain(chain: Chain, *, allow: Collection[str] = (), say: Say = print) -> Run:
    """Train stage after stage, passing over those that are finished; returns the last one's run.

    Raises: as `train`; what can be known to be wrong with any stage is found before the first one trains.
    """
    chains.check(chain)
    chains.begin(chain)
    done: Run | None = None
    for stage_ in chain.stages:
        run = Path(stage_.config.output)
        chains.check_order(stage_)
        if chains.is_done(stage_.config, run):
            say(f"stage {stage_.title} is finished: {run / 'final'}")
            done = Run(run, run / "final", finish.stored_proof(run / "final"))
            continue
        say(f"stage {stage_.title} ({stage_.number} of {len(chain.stages)})")
        done = train(stage_.config, allow=allow, say=say)
    assert done is not None
    return done


def _train(session: Session, events: Events) -> Run:
    say, run = session.say, session.run
    prepared, batches, total = session.data()
    state = State.from_dict(session.extra["state"]) if session.start else State()
    if session.start and finish.is_finished(run, session.start.step, total):
        say(
            f"this run is finished ({total} steps); its result is {run / 'final'}. For more, raise train.epochs or train.steps"
        )
        if session.config.push is not None:
            say(f"it is pushed with: {pushing.how(session.config, run / 'final')}")
        return Run(run, run / "final", finish.stored_proof(run / "final"))
    base, model = session.model()
    say(adapters.summary(model, session.config.adapter))
    for note in [*base.notes, *session.notes]:
        say(note)
    parts = session.parts(base, model, prepared, batches, total, events)
    progress = Progress(total, state.step)
    with stoppable(progress.say) as stop:
        try:
            Loop(parts, state, progress, stop).run()
        except Exception as error:
            finish.settle(parts.checkpoints, say)
            finish.write_page(run, say)
            events.close()
            raise explained(error, session.device) from error
        finally:
            progress.close()
            parts.metrics.close()
        stop.leave_at_once(lambda reason: _stopped_before_proof(run, reason))
        trained = finish.ask_live_model(parts, base, state, prepared)
        del parts, base, model, batches
        final, _ = finish.prove(trained, say)
    pushing.push_final(session.config, run, state.step, say)
    return Run(run, final, finish.stored_proof(final))


def _stopped_before_proof(run: Path, reason: str) -> Stopped:
    return Stopped(
        f"stopped on {reason} after the last step, before the result was proven; the checkpoint is published.",
        code="stopped",
        where=str(run),
        remedy=f"Prove it with: luthier resume {shlex.quote(str(run))}",
    )


def explained(error: Exception, device: torch.device) -> Exception:
    """The same error, or one that says what to do where the library's own words don't."""
    if isinstance(error, torch.OutOfMemoryError):
        return LuthierError(
            f"{device} ran out of memory: {str(error).splitlines()[0]}",
            code="out-of-memory",
            where="train",
            remedy="Set train.memory: recompute, lower train.micro_batch or train.max_length, or train an adapter.",
        )
    if "does not have a deterministic implementation" in str(error):
        return LuthierError(
            f"this model uses an operation that has no deterministic kernel ({str(error).split()[0]}).",
            code="not-deterministic",
            where="train.deterministic",
            remedy="Set train.deterministic: false; resuming is then not bit for bit.",
        )
    return error


def _starting_point(run: Path, say: Say) -> Found | None:
    """The newest whole checkpoint, read back; None where nothing was saved yet.

    Raises:
        ArtifactError: there are checkpoints and none is whole.
    """
    found = newest_whole(run, say)
    while found is not None:
        _, problems = manifests.verify(found[0].path)
        if not problems:
            return found[0]
        say(f"passing over {found[0].path}, which is damaged: {problems[0].message}")
        found = newest_whole(run, say, before=found[0].step)
    if published(run):
        raise ArtifactError(
            "none of this run's checkpoints is whole.",
            code="no-whole-checkpoint",
            where=str(run / "checkpoints"),
            remedy="`luthier verify` on each of them says what is damaged.",
        )
    return None
