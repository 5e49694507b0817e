"""JSON that somebody else wrote, read with bounds: a file that is huge, nested without end, or no object is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.errors import ArtifactError

LARGEST = 64 * 2**20  # bytes; the largest tokenizer.json known has about 35 MB


def parse_object(data: bytes, *, unique: bool = False) -> dict[str, Any]:
    """An object from its bytes; ``unique`` refuses a key that stands twice, which readers disagree about.

    Raises:
        ValueError: it is none; the text says why.
    """
    try:
        value = json.loads(data, object_pairs_hook=_each_once if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 at byte {error.start}") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice")
    return result


def read_object(path: Path, *, unique: bool = False, largest: int = LARGEST) -> dict[str, Any]:
    """An object from a file.

    Raises:
        ArtifactError: it is no regular file, larger than ``largest`` bytes, or no JSON object.
    """
    try:
        if not path.is_file():  # a pipe or a device would never end
            raise ArtifactError("is no regular file.", code="unreadable", where=str(path))
        size = path.stat().st_size
        if size > largest:
            raise _broken(path, f"it has {size} bytes, more than any such file needs")
        return parse_object(path.read_bytes(), unique=unique)
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}.", code="unreadable", where=str(path)) from None
    except ValueError as error:
        raise _broken(path, str(error)) from None


def _broken(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"is no valid JSON: {why}.", code="broken-json", where=str(path), remedy="Get the file again.")
