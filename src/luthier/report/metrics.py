"""``metrics.jsonl``: one strict JSON object a line, written as the run goes and cut back when it resumes.

A line counts once its newline is on disk. What follows the last newline was torn by a kill: reading ignores it,
and opening the log to write drops it, so that a torn line never ends up in the middle of the file.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.errors import ArtifactError


class MetricsLog:
    """Append-only log of a run's measurements; may be used from several threads.

    Args:
        path: the file; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        # Unbuffered: a record that could not be written leaves nothing behind that a later flush would write.
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (closed by close)
        self._drop_torn_line()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record as one line.

        Values that JSON has no word for (NaN, infinity) become null, and ``nonfinite`` lists their keys.
        Raises OSError when the disk refuses; the file then ends where it ended before.
        """
        line = (json.dumps(_strict(record), ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._lock:
            end = os.fstat(self._file.fileno()).st_size
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(end)
                raise

    def length(self) -> int:
        """Size in bytes after everything written has reached the disk."""
        with self._lock:
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def cut(self, length: int) -> None:
        """Keep the first ``length`` bytes, as a checkpoint recorded them.

        Raises ArtifactError when the file is shorter, or when ``length`` is not the end of a line.
        """
        with self._lock:
            size = os.fstat(self._file.fileno()).st_size
            if length > size:
                raise ArtifactError(
                    f"the metrics end at byte {size}, but the checkpoint was written when they had {length} bytes.",
                    code="metrics-short",
                    where=str(self.path),
                    remedy="Put the file of that run back, or start over in another output folder.",
                )
            if length < 0 or (length and self._byte_before(length) != b"\n"):
                raise ArtifactError(
                    f"byte {length}, where the checkpoint was written, is not the end of a line: the file was changed since.",
                    code="metrics-changed",
                    where=str(self.path),
                    remedy="Put the file of that run back, or start over in another output folder.",
                )
            self._file.truncate(length)
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()

    def _byte_before(self, offset: int) -> bytes:
        self._file.seek(offset - 1)
        return self._file.read(1)

    def _drop_torn_line(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        block = 1 << 16
        while end:
            start = max(0, end - block)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        self._file.truncate(end)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file in order; an unfinished last line is ignored.

    Raises ArtifactError naming the line when any other line is not a JSON object.
    """
    path = Path(path)
    *lines, _torn = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _broken(path, number, str(error)) from error
        if not isinstance(record, dict):
            raise _broken(path, number, f"an object was expected, found {type(record).__name__}")
        records.append(record)
    return records


def _broken(path: Path, number: int, reason: str) -> ArtifactError:
    return ArtifactError(
        f"line {number} of the metrics is not a JSON object ({reason}).",
        code="metrics-broken",
        where=f"{path}:{number}",
        remedy="Only the last line can be torn by a crash; this one was changed later. Mend or remove the line.",
    )


def _strict(record: Mapping[str, Any]) -> dict[str, Any]:
    strict: dict[str, Any] = {}
    nonfinite = []
    for key, value in record.items():
        strict[key], finite = _plain(value)
        if not finite:
            nonfinite.append(key)
    if nonfinite:
        strict["nonfinite"] = nonfinite
    return strict


def _plain(value: Any) -> tuple[Any, bool]:
    """Return the value in JSON's own types, and whether every number in it was finite."""
    if value is None or isinstance(value, bool | str):
        return value, True
    if isinstance(value, numbers.Integral):
        return int(value), True
    if isinstance(value, numbers.Real):  # NumPy's scalars too: a user's metric may return one
        number = float(value)
        return (number, True) if math.isfinite(number) else (None, False)
    if isinstance(value, Mapping):
        pairs = {str(key): _plain(item) for key, item in value.items()}
        return {key: item for key, (item, _) in pairs.items()}, all(finite for _, finite in pairs.values())
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return [item for item, _ in items], all(finite for _, finite in items)
    return str(value), True
