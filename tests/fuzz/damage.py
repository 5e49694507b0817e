"""Random damage to a folder: bytes, lengths, names, JSON values, tensor headers; drawn by hypothesis, so that it shrinks."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308]),
    st.sampled_from(["", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "F32", "I32", "F16", "U8", "model.safetensors", "x" * 5000]),
    st.just([]), st.just({}), st.just([[[]]]), st.just({"a": {"b": []}}), st.just([1, 2, 3]),
)  # fmt: skip


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _bytes(draw: Callable, path: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        at = draw(st.integers(0, min(len(data) - 1, 4000)))
        data[at] ^= 1 << draw(st.integers(0, 7))
        path.write_bytes(data)


def _length(draw: Callable, path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, draw(st.sampled_from([0, 1, 7, 8, 9, size // 2, max(0, size - 1), size + 1, size + 4096])))


def _gone(draw: Callable, path: Path) -> None:
    path.unlink()
    what = draw(st.sampled_from(["nothing", "folder", "pipe", "loop", "device", "pointer"]))
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _place(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, outer ones first."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    found = [(value, key) for key in keys]
    for key in keys[:200]:
        found += _place(value[key])[:200]
    return found


def _change(draw: Callable, value: Any) -> Any:
    places = _place(value)
    if not places or draw(st.integers(0, 30)) == 0:
        return draw(ODD)
    holder, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["odd", "odd", "delete", "rename", "neighbour"]))
    if kind == "odd":
        holder[key] = draw(ODD)
    elif kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(["x", f"{key}.x", f"module.{key}", "", "__metadata__"]))] = holder.pop(key)
    else:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        holder[key] = holder[draw(st.sampled_from(list(keys)))]
    return value


def _json(draw: Callable, path: Path) -> str | None:
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return _bytes(draw, path)
    before = json.dumps(value)
    path.write_text(json.dumps(_change(draw, value)))
    return _difference(before, path.read_text())


def _difference(one: str, other: str) -> str:
    """The parts of two texts that differ, cut short."""
    start = next((at for at, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), 0)
    return f"{one[max(0, start - 40) : start + 60]!r} → {other[max(0, start - 40) : start + 60]!r}"


def _header(draw: Callable, path: Path) -> str | None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    try:
        value = json.loads(data[8 : 8 + length])
    except ValueError:
        return _bytes(draw, path)
    before = json.dumps(value)
    body = json.dumps(_change(draw, value)).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data[8 + length :])
    return _difference(before, body.decode())


@st.composite
def damages(draw: Callable, folder: Path, copy: Path, *, only: Callable[[str], bool] = lambda name: True, most: int = 3) -> list[str]:  # fmt: skip
    """Copy a folder and damage the copy, up to `most` times; returns what was done, for the report of a failure."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    done = []
    for _ in range(draw(st.integers(1, most))):
        names = [name for name in files_of(copy) if only(name)]
        if not names:
            break
        name = draw(st.sampled_from(names))
        ways = [_bytes, _length, _gone]
        ways += [_json] * 4 if name.endswith(".json") else [_header] * 4 if name.endswith(".safetensors") else []
        way = draw(st.sampled_from(ways))
        what = way(draw, copy / name)
        done.append(f"{way.__name__} {name} {what or ''}")
    return done
