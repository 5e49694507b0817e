"""Reading weights into the page cache while Python is still importing what will use them.

Torch takes seconds to import, and the disk has nothing to do meanwhile. What is asked for here is only a wish: whoever
reads the files later reads them as ever, finds what is wrong with them, and says so.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from luthier.artifacts.files import available_memory, open_binary

_STEP = 32 * 2**20
_SHARE = 4  # of the memory that is available, a quarter at most


def read_ahead(source: Path, base: Path | None) -> None:
    """Ask the system for an artefact's weights, and those of the base under it, on a thread that ends by itself."""
    if hasattr(os, "posix_fadvise"):
        under = base or _named_base(source)
        folders = [source] if under is None else [under, source]
        threading.Thread(target=_read, args=(folders,), name="read-ahead", daemon=True).start()


def _named_base(adapter: Path) -> Path | None:
    try:
        told = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        return Path(told["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):  # no adapter, or a broken one: its reader says so
        return None


def _read(folders: list[Path]) -> None:
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
