"""Files read ahead of whoever maps them, so that a disk works at its own speed while matrices are packed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from luthier.models.room import free_bytes

_PIECE = 16 << 20


@contextmanager
def read_ahead(files: Sequence[Path]) -> Iterator[None]:
    """Bring files into the page cache in a thread, in their order, while the block runs; it stops when the block ends.

    Mapped files are otherwise read page fault by page fault, in small pieces and never while something is computed. Nothing
    is done where memory has no room for them: what was read would be dropped again before it is used.
    """
    free = free_bytes("cpu")
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
