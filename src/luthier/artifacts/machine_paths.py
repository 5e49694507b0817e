"""Paths of this machine in what is to leave it: finding them, and saying the same without them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

_WHOLE = re.compile(r"(?:~|\.{1,2}|[A-Za-z]:)?[\\/][^\n{}<>\"]*[^\s\\/{}<>\"][\\/]*")
_IN_TEXT = re.compile(r"(?<![\w:/.~\-\\])(?:/[\w.@+-]+){2,}")
_PLACE = re.compile(r"(^|_)(name|path|run|folder|file|files|parents|where)$")
_SYSTEM = ("/usr/", "/bin/", "/sbin/", "/etc/", "/dev/", "/proc/", "/sys/", "/lib")
_SNAPSHOT = re.compile(
    r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})[/\\]?"
)
_HUB_ID = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)?")


def is_path(text: str) -> bool:
    """Whether a name, of a base model say, is a place on a disk rather than an id of the hub."""
    return not _HUB_ID.fullmatch(text) or text.endswith(".gguf") or os.path.exists(text)


def snapshot(path: str) -> tuple[str, str] | None:
    """The hub id and commit of a folder in the hub's local cache."""
    found = _SNAPSHOT.search(path)
    return (f"{found['owner']}/{found['name']}", found["commit"]) if found and not path[found.end() :] else None


def without_paths(value: Any, names: Mapping[str, str], *, named: bool = True) -> Any:
    """A JSON value in which paths are replaced: those in ``names`` by what stands there, others by their last part.

    Args:
        named: whether the value stands where a place is named, so that a path of any machine counts; of the values of
            an object only those do whose key says so. A token of a tokenizer may look like a path.
    """
    if isinstance(value, dict):
        return {key: without_paths(item, names, named=bool(_PLACE.search(str(key)))) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, names, named=named) for item in value]
    if not isinstance(value, str):
        return value
    if value in names:
        return names[value]
    if named and _WHOLE.fullmatch(value) and len(re.findall(r"[\\/]", value.rstrip("\\/"))) > 1:
        return PureWindowsPath(value).name
    return text_without_paths(value, names)


def text_without_paths(text: str, names: Mapping[str, str] | None = None) -> str:
    """Prose in which this machine's paths are replaced in the same way; those that every machine has stay."""
    known = names or {}

    def public(match: re.Match[str]) -> str:
        path = match[0].rstrip(".")
        if path in known:
            return known[path] + match[0][len(path) :]
        return Path(path).name + match[0][len(path) :] if _is_of_this_machine(path) else match[0]

    return _IN_TEXT.sub(public, text)


def _is_of_this_machine(path: str) -> bool:
    if path.startswith(_SYSTEM):
        return False
    own = [str(Path.home()), os.getcwd(), tempfile.gettempdir()]
    return any(path.startswith(f"{folder}/") for folder in own if len(folder) > 1) or os.path.exists(path)
