"""Which checkpoints there are, which is the newest whole one, and which may go."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from luthier.artifacts import publish
from luthier.artifacts.manifest import Manifest, check_whole
from luthier.artifacts.run_folder import Found, folder_of, published


def newest_whole(run: Path, say: Callable[[str], None], *, before: int | None = None) -> tuple[Found, Manifest] | None:
    """The newest checkpoint (``before`` a step) that matches its manifest; damaged newer ones are named and passed over."""
    for item in reversed(published(run)):
        if before is not None and item.step >= before:
            continue
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
