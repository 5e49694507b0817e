"""Bringing weights into the page cache before whoever needs them asks.

Torch takes seconds to import, and mapped files are read page fault by page fault, never while something is computed; the disk
has nothing to do meanwhile. What is done here is only a wish: whoever reads the files later reads them as ever, finds what is
wrong with them, and says so.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from luthier.artifacts.files import available_memory, open_binary

_STEP = 32 * 2**20
_PIECE = 16 * 2**20
_SHARE = 4  # of the memory that is available, a quarter at most


def read_for_export(source: Path, base: Path | None) -> None:
    """Ask the system for an artefact's weights, and those of the base under it, on a thread that ends by itself."""
    if hasattr(os, "posix_fadvise"):
        under = base or _named_base(source)
        folders = [source] if under is None else [under, source]
        threading.Thread(target=_ask, args=(folders,), name="read-ahead", daemon=True).start()


def _named_base(adapter: Path) -> Path | None:
    try:
        told = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        return Path(told["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):  # no adapter, or a broken one: its reader says so
        return None


def _ask(folders: list[Path]) -> None:
    left = (available_memory() or 0) // _SHARE
    for path in [
        path for folder in folders for path in sorted(folder.glob("*.*")) if path.suffix in (".safetensors", ".distcp")
    ]:
        try:
            descriptor = open_binary(path, os.O_RDONLY)
        except OSError:
            continue  # a dangling link, a file without permission: its reader names it
        try:
            size = min(os.fstat(descriptor).st_size, left)
            left -= size
            for at in range(0, size, _STEP):
                os.posix_fadvise(descriptor, at, min(_STEP, size - at), os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def _weights(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".distcp", ".bin"))


@contextmanager
def read_ahead(files: Sequence[Path]) -> Iterator[None]:
    """Read files in a thread, in their order, while the block runs; it stops when the block ends.

    Nothing is done where memory has no room for them: what was read would be dropped again before it is used.
    """
    free = available_memory()
    if free is None or sum(file.stat().st_size for file in files) > free * 3 // 4:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_read, args=(files, ended), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _read(files: Sequence[Path], ended: threading.Event) -> None:
    buffer = bytearray(_PIECE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while not ended.is_set() and file.readinto(buffer):
                pass
