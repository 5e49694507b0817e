"""Which checkpoints there are, which is the newest whole one, and which may go."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from luthier.artifacts import publish
from luthier.artifacts.manifest import Manifest, check_whole

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Found:
    """A published checkpoint."""

    step: int
    path: Path


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def published(run: Path) -> list[Found]:
    """All checkpoints under their names, oldest first; whether they are whole is not looked at."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((Found(int(match[1]), path) for match, path in found if match), key=lambda item: item.step)


def newest_whole(run: Path, say: Callable[[str], None]) -> tuple[Found, Manifest] | None:
    """The newest checkpoint that matches its manifest; damaged newer ones are named and passed over."""
    for item in reversed(published(run)):
        manifest, problems = check_whole(item.path)
        if manifest is not None and not problems:
            return item, manifest
        say(f"passing over {item.path}, which is damaged: {problems[0].message}")
    return None


def may_go(steps: Collection[int], *, keep: int, keep_every: int | None, protected: Collection[int]) -> list[int]:
    """The steps whose checkpoints retention deletes: all but the ``keep`` newest, the protected, and every n-th."""
    ordered = sorted(steps)
    newest = set(ordered[-keep:])
    return [
        step
        for step in ordered
        if step not in newest and step not in protected and not (keep_every and step % keep_every == 0)
    ]


def delete(run: Path, steps: Collection[int]) -> None:
    """Delete checkpoints so that none is ever half there under its name."""
    for step in sorted(steps):
        publish.remove(folder_of(run, step))
