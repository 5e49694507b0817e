"""An export that was interrupted goes on where it stopped.

The hidden folder beside the target keeps a journal: first a fingerprint of the sources, the options and the plan, then a
line for every stretch that was written, with its digest. A second call for the same target takes over what the journal
lists only where the fingerprint is the same, and only stretches whose bytes, read back, have the digest noted; anything
else is written again. The journal and the lock never get into the published folder.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.artifacts import publish
from luthier.artifacts.files import exclusive
from luthier.artifacts.manifest import Digest, digest_file, digest_of, versions

JOURNAL, LOCK = ".journal", ".lock"


class Journal:
    """What an export has written so far.

    Attributes:
        done: the stretches that survive from an earlier call, by file and offset, each with the source's digest beside it
            where one was made.
        said: one sentence on what was found, empty for a fresh start.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.done: dict[tuple[str, int], tuple[Digest, str | None]] = {}
        self.said = ""
        self._identity = identity
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    def begin(self, plan: bytes) -> None:
        """Take over what is there of the same export, or clear the folder; to be called before anything is written.

        Args:
            plan: what will be written: the files' headers and the small files, as far as they tell it apart from another.
        """
        head = json.dumps({"format": 1, "export": digest_of(self._identity.encode() + plan)}) + "\n"
        path = self.folder / JOURNAL
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
        if lines and lines[0] == head:
            self._take_over(lines[1:])
            count, noted = len(self.done), len([line for line in lines[1:] if line.endswith("\n")])
            self.said = f"went on where an earlier call stopped: {count} of {noted} stretches it had noted were on disk unchanged"  # fmt: skip
        else:
            had = [child for child in self.folder.iterdir() if child.name != LOCK]
            for child in had:
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            if had:
                self.said = "started again: what an earlier call left was of other sources or options"
        kept = [_line(digest, before) for digest, before in self.done.values()]
        path.write_text(head + "".join(kept), encoding="utf-8")
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def add(self, digest: Digest, before: str | None) -> None:
        """Note a stretch that was written."""
        assert self._descriptor is not None
        with self._lock:
            os.write(self._descriptor, _line(digest, before).encode())

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take_over(self, lines: Sequence[str]) -> None:
        noted: dict[str, dict[tuple[int, int], tuple[Digest, str | None]]] = {}
        for line in lines:
            try:
                file, offset, length, blake3, before = json.loads(line)
            except (ValueError, TypeError):  # the last line may be torn
                continue
            noted.setdefault(file, {})[offset, length] = (Digest(file, offset, length, blake3), before)
        for file, entries in noted.items():
            path = self.folder / file
            size = path.stat().st_size if path.is_file() else 0
            there = [piece for piece in entries if sum(piece) <= size]
            for found in digest_file(path, file, there) if there else ():
                digest, before = entries[found.offset, found.length]
                if found.blake3 == digest.blake3:
                    self.done[file, found.offset] = (digest, before)


def _line(digest: Digest, before: str | None) -> str:
    return json.dumps([digest.file, digest.offset, digest.length, digest.blake3, before]) + "\n"


@contextmanager
def unfinished(out: Path, sources: Iterable[Path], options: Sequence[Any], say: Callable[[str], None] = lambda text: None) -> Iterator[tuple[Path, Journal]]:  # fmt: skip
    """The hidden folder that becomes ``out``, and its journal; kept where the process is stopped, removed on an error.

    Args:
        sources: folders and files that are read; their files are known by path, size and time of change.
        options: what else decides the result.

    Raises:
        RequestError: ``out`` exists, or another process is writing it.
    """
    partial = publish.begin(out, keep=True)
    identity = json.dumps([_identities(sources), options, versions()], sort_keys=True, default=str)
    journal = Journal(partial, identity)
    with exclusive(partial / LOCK, f"the export to {out.name}"):
        try:
            yield partial, journal
        except Exception:
            journal.close()
            shutil.rmtree(partial)
            raise
        finally:
            journal.close()
            if journal.said:
                say(journal.said)


def forget(partial: Path) -> None:
    """Remove what is not to be published."""
    for name in (JOURNAL, LOCK):
        (partial / name).unlink(missing_ok=True)


def _identities(sources: Iterable[Path]) -> list[list[Any]]:
    found = []
    for source in sources:
        for path in sorted(source.iterdir()) if source.is_dir() else [source]:
            if path.is_file():
                status = path.stat()
                found.append([str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns])
    return found
