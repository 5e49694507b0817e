"""Publishing: a folder appears under its name whole, or not at all.

Everything is written into a hidden folder beside the target and flushed; the manifest comes last; one rename gives
the folder its name; the parent is flushed. A process killed anywhere leaves either the old state or the new one, and
at worst a hidden folder that `sweep` removes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import flush_folder
from luthier.artifacts.manifest import Manifest
from luthier.errors import RequestError

MARK = ".partial-"


def begin(target: Path, *, keep: bool = False) -> Path:
    """Make the hidden folder that will become ``target``.

    Args:
        keep: leave what an interrupted call has in it; the caller knows what that is worth.

    Raises:
        RequestError: the target exists already.
    """
    if target.exists():
        raise RequestError("this folder exists already.", code="exists", where=str(target), remedy="Give another name, or move it away.")  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f"{MARK}{target.name}"
    if partial.exists() and not keep:
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=keep)
    return partial


def finish(partial: Path, target: Path, manifest: Manifest) -> None:
    """Write the manifest, flush every folder, and give the hidden folder its name."""
    manifests.write(partial, manifest)
    for folder in sorted((path for path in partial.rglob("*") if path.is_dir()), reverse=True):
        flush_folder(folder)
    flush_folder(partial)
    os.rename(partial, target)
    flush_folder(target.parent)


def remove(folder: Path) -> None:
    """Delete a published folder so that no half of it is ever seen under its name."""
    hidden = folder.parent / f"{MARK}deleted-{folder.name}"
    if hidden.exists():
        shutil.rmtree(hidden)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def sweep(parent: Path) -> list[str]:
    """Remove what interrupted writes and deletions left in ``parent``; the caller holds the run's lock."""
    leftovers = sorted(parent.glob(f"{MARK}*")) if parent.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name.removeprefix(MARK) for path in leftovers]
