"""Stages in a row: what can be known of all of them before the first trains, and which of them are finished."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from luthier.artifacts import fingerprint
from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import replace_file
from luthier.artifacts.run_folder import published
from luthier.config import compare
from luthier.config.chain import Chain, Stage
from luthier.config.read import read_resolved
from luthier.config.schema import RunConfig
from luthier.errors import RequestError
from luthier.models import adapters
from luthier.training import stage as origins
from luthier.training.finish import is_finished


def check(chain: Chain) -> None:
    """See that every stage can follow the one before it.

    Raises:
        RequestError: a key of an adapter is wrong, or two adapters cannot be stacked; the stage is named.
    """
    before: dict[str, RunConfig] = {}
    for stage in chain.stages:
        try:
            _check(stage.config, before)
        except RequestError as error:
            raise RequestError(f"stage {stage.title}: {error.message}", code=error.code, where=error.where, remedy=error.remedy) from None  # fmt: skip
        before[stage.config.output] = stage.config


def _check(config: RunConfig, before: dict[str, RunConfig]) -> None:
    adapter = config.adapter
    if adapter is None:
        return
    if adapter.then != "continue":
        adapters.check(adapter)
    earlier = before.get((adapter.start or "").partition("@")[0])
    if earlier is None or earlier.adapter is None:
        if adapter.start is not None and earlier is None:
            origins.look(config)
        return
    if adapter.then == "stack":
        lower = earlier.adapter
        origins.check_plain(lower, "the stage before")
        origins.check_plain(adapter, "adapter")
    if adapter.then == "continue":
        own = earlier.adapter.whole()
        asked = adapter.model_dump(exclude_unset=True)
        wrong = {k: v for k, v in asked.items() if k not in ("from", "then") and k in own and v != own[k] and earlier.adapter.then != "continue"}  # fmt: skip
        if wrong:
            raise origins.differs({key: (value, own[key]) for key, value in wrong.items()})


def begin(chain: Chain) -> None:
    """Make the parent's folder with its ``run.yaml``, by which it is recognised.

    Raises:
        RequestError: the folder holds something else.
    """
    known = chain.output / "run.yaml"
    if (
        chain.output.is_dir()
        and not known.is_file()
        and any(not p.name.startswith(".") for p in chain.output.iterdir())
    ):
        raise RequestError(
            "the folder is not empty and is no run of Luthier's.",
            code="output-not-empty",
            where="output",
            remedy=f"Give an empty or new folder instead of {chain.output}.",
        )
    if (chain.output / "checkpoints").exists():
        raise RequestError(
            "the folder holds a run of its own, and stages want one of their own.",
            code="output-not-empty",
            where="output",
            remedy=f"Give an empty or new folder instead of {chain.output}.",
        )
    chain.output.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(chain.values, sort_keys=False, allow_unicode=True, width=120)
    replace_file(known, text.encode())


def is_done(config: RunConfig, run: Path) -> bool:
    """Whether a stage is finished and nothing that is asked for now differs from what it was trained with."""
    if not (run / "run.yaml").is_file() or not published(run):
        return False
    manifest, problems = manifests.check_whole(run / "final") if (run / "final").is_dir() else (None, [])
    if manifest is None or problems or not is_finished(run, manifest.facts["step"], manifest.facts["total_steps"]):
        return False
    old = read_resolved(run / "run.yaml")
    new, _ = origins.settle(config, run)
    changes = compare.compare(old, compare.merge_resolved(old, new))
    return all(change.kind == "free" or _is_place(change.key) for change in changes)


def _is_place(key: str) -> bool:
    """A key that changes when the parent's folder is moved; the weights behind it are compared in `check_order`."""
    return key in ("adapter.from", "model.path")


def check_order(stage: Stage) -> None:
    """See that what a begun stage started from is still what the stage before it holds.

    Raises:
        RequestError: it was trained further since.
    """
    run = Path(stage.config.output)
    newest = manifests.check_whole(published(run)[-1].path)[0] if published(run) else None
    if newest is None:
        return
    start = stage.config.adapter.start if stage.config.adapter else None
    if start is not None:
        known = {p.get("fingerprint") for p in newest.facts.get("parents", []) if p.get("kind") == "adapter"}
        there = origins.fingerprint_at(start) if os.path.isdir(start.partition("@")[0]) else None
    elif stage.number == 1 or (run / "base").exists():
        return
    else:
        start = stage.config.model.path
        known = {newest.facts["base"]["fingerprint"]}
        there = fingerprint.of_folder(Path(start)) if (Path(start) / "config.json").is_file() else None
    if there is not None and known and there not in known:
        raise RequestError(
            f"stage {stage.title} was begun from another result of {start} than lies there now.",
            code="stage-changed",
            where=str(run),
            remedy=f"Delete {run} to train this stage again, or give the chain another `output`.",
        )


def ready(stage: Stage) -> bool:
    """Whether what a stage starts from is there."""
    start = stage.config.adapter.start if stage.config.adapter else None
    path = stage.config.model.path
    if start is not None:
        run = Path(start.partition("@")[0])
        return (run / "final").is_dir() or bool(published(run)) or not run.name[:1].isdigit()
    return not os.path.isabs(path) or Path(path).exists()
