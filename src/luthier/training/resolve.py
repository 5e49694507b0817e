"""Filling in what the run file leaves open, once; the choices are written into run.yaml and never made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts import fingerprint
from luthier.artifacts import manifest as manifests
from luthier.artifacts.run_folder import published
from luthier.config import compare
from luthier.config.read import read_resolved
from luthier.config.schema import RunConfig
from luthier.data.batches import DEFAULT_BATCH_SAMPLES
from luthier.data.prepare import longest_row, too_long
from luthier.errors import RequestError
from luthier.models.adapter_config import choose
from luthier.models.precision import resolve_precision
from luthier.models.quantised.existing import is_existing
from luthier.training.groups import peak_rate
from luthier.training.stage import fingerprint_at

Say = Callable[[str], None]
SAVES_PER_RUN = 10


def pick_device() -> torch.device:
    """The accelerator that torch sees, or the CPU."""
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        assert found is not None
        return torch.device(found.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def before_data(config: RunConfig, base_config: Any, device: torch.device) -> RunConfig:
    """Fill what the model, the device and the method decide: precision, longest row, batch, rate, scale."""
    config = config.model_copy(deep=True)
    if not is_existing(base_config):  # whose precision is its own
        config.model.precision = resolve_precision(config.model, device)
    config.data.too_long = too_long(config)
    text_config = base_config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    train = config.train
    if limit and train.max_length and train.max_length > limit and not getattr(text_config, "rope_parameters", None):
        raise RequestError(
            f"the model has positions for {limit} tokens only; {train.max_length} were asked for.",
            code="max-length",
            where="train.max_length",
            remedy=f"Set train.max_length to {limit} or less.",
        )
    train.max_length = longest_row(train.max_length, limit)
    if train.batch_tokens is None and train.batch_samples is None:
        train.batch_samples = DEFAULT_BATCH_SAMPLES
    if train.epochs is None and train.steps is None:
        train.epochs = 1.0
    config.optim.lr = peak_rate(config.optim, adapter=config.adapter is not None)
    if config.adapter:
        choose(config.adapter)
    return config


def after_data(config: RunConfig, steps_per_epoch: int, *, has_held_out: bool) -> tuple[RunConfig, int]:
    """Fill the intervals; returns the config and the run's number of steps."""
    config = config.model_copy(deep=True)
    train = config.train
    total = train.steps or max(1, math.ceil(round((train.epochs or 1.0) * steps_per_epoch, 6)))
    if config.checkpoint.every is None:
        config.checkpoint.every = max(1, min(steps_per_epoch, total // SAVES_PER_RUN))
    if config.evaluate.every is None and has_held_out:
        config.evaluate.every = steps_per_epoch
    for key, value in (("evaluate.patience", config.evaluate.patience), ("checkpoint.best", config.checkpoint.best)):
        if value is not None and not has_held_out:
            raise RequestError(
                f"{key} needs held-out data to measure, and there is none.",
                code="no-eval-data",
                where=key,
                remedy="Set data.eval: 0.05 (a share of the training data) or a file of its own.",
            )
    return config, total


def reconcile(config: RunConfig, run: Path, allow: Collection[str], say: Say) -> tuple[RunConfig, bool]:
    """Compare a config with the one an existing run was begun with; returns what to go on with, and whether it goes on.

    Raises:
        RequestError: the folder holds something else, or a key that decides the result has changed.
    """
    existing = run / "run.yaml"
    if not existing.is_file():
        strangers = [path.name for path in run.iterdir() if not path.name.startswith(".")] if run.is_dir() else []
        if strangers:
            raise RequestError(
                f"the folder is not empty and is no run of Luthier's (it holds {', '.join(sorted(strangers)[:3])}).",
                code="output-not-empty",
                where="output",
                remedy=f"Give an empty or new folder instead of {run}.",
            )
        return config, False
    if not published(run):  # nothing was trained yet, so nothing binds the config
        return config, False
    old = stored_config(run)
    merged = compare.merge_resolved(old, config)
    changes = compare.compare(old, merged)
    moved = [change for change in changes if change.key == "model.path"]
    if moved and _same_weights(run, old.model.path, merged.model.path):
        changes.remove(moved[0])
        say(f"the base moved to {merged.model.path}; its weights are the same")
    if any(change.key == "adapter.from" for change in changes) and _same_origin(run, merged):
        allow = {*allow, "adapter.from"}
    for line in compare.check(changes, allow):
        say(line)
    return merged, True


def not_writable(output: Path, error: OSError) -> RequestError:
    """What to say of an output folder that cannot be made."""
    return RequestError(
        f"{output} cannot be made: {error.strerror}.",
        code="output",
        where="output",
        remedy="Give a folder where you may write.",
    )


def stored_config(run: Path) -> RunConfig:
    """The resolved config of an existing run.

    Raises:
        RequestError: there is none.
    """
    path = run / "run.yaml"
    if not path.is_file():
        above = [folder for folder in run.parents if (folder / "run.yaml").is_file()]
        raise RequestError(
            "there is no run.yaml here, so this is no run's folder.",
            code="no-run",
            where=str(run),
            remedy=f"The run is {above[0]}." if above else "Name the folder that `output` named in the run file.",
        )
    return read_resolved(path)


def _same_origin(run: Path, config: RunConfig) -> bool:
    """Whether `adapter.from` leads to the weights that the run's checkpoints name as their parent: the folder was moved."""
    newest = manifests.check_whole(published(run)[-1].path)[0]
    known = {parent.get("fingerprint") for parent in newest.facts.get("parents", [])} if newest else set()
    assert config.adapter is not None and config.adapter.start is not None
    return Path(config.adapter.start.partition("@")[0]).is_dir() and fingerprint_at(config.adapter.start) in known


def _same_weights(run: Path, old: str, new: str) -> bool:
    """Whether a base at another path is the one that the run's checkpoints name, or the one at the old path."""
    if not Path(new).is_dir():
        return False
    found = fingerprint.of_folder(Path(new))
    newest = manifests.check_whole(published(run)[-1].path)[0]
    named = newest.facts["base"]["fingerprint"] if newest else None
    return found == named or (Path(old).is_dir() and fingerprint.of_folder(Path(old)) == found)
