"""The safetensors format as byte ranges: a header is a function of the tensor list.

Because the header is known before any byte of data, so is the place of every tensor, and any number of writers can
put their parts of the same file there at the same time. The format is eight bytes of header length, a JSON header,
and the tensors' bytes without gaps (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from luthier.artifacts.json_file import parse_object
from luthier.errors import ArtifactError

MAX_HEADER = 100_000_000  # the reference implementation's own limit
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}  # fmt: skip
DEFAULT_SHARD = 4 * 2**30
MOST_DIMENSIONS = 64
LARGEST_TENSOR = 2**62  # elements; a product beyond it overflows in other readers
_LFS = b"version https://git-lfs"
_SETTLED = 2.0  # seconds


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as files name it; ``dtype`` is safetensors' word (``BF16``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie: ``offset`` counts from the start of the file."""

    spec: TensorSpec
    file: str
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.spec.size


@dataclass(frozen=True)
class FilePlan:
    """One file of tensors, known to the byte before it exists."""

    name: str
    header: bytes
    places: tuple[Place, ...]
    size: int


def plan_file(name: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> FilePlan:
    """Lay tensors out in one file: wider dtypes first, then by name, so that every tensor is aligned."""
    ordered = sorted(specs, key=lambda spec: (-BITS[spec.dtype], spec.name))
    entries: dict[str, object] = {"__metadata__": {key: metadata[key] for key in sorted(metadata)}} if metadata else {}
    position = 0
    for spec in ordered:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.size],
        }
        position += spec.size
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    header = struct.pack("<Q", len(body)) + body
    places, offset = [], len(header)
    for spec in ordered:
        places.append(Place(spec, name, offset))
        offset += spec.size
    return FilePlan(name, header, tuple(places), offset)


def plan_files(
    specs: Sequence[TensorSpec], stem: str, metadata: Mapping[str, str], shard_bytes: int = DEFAULT_SHARD
) -> tuple[list[FilePlan], bytes | None]:
    """Lay tensors out in one file ``stem.safetensors``, or in numbered shards with transformers' index beside them.

    Returns the files and the index's bytes (None for a single file).
    """
    groups: list[list[TensorSpec]] = [[]]
    room = shard_bytes
    for spec in specs:
        if groups[-1] and spec.size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(spec)
        room -= spec.size
    if len(groups) == 1:
        return [plan_file(f"{stem}.safetensors", groups[0], metadata)], None
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    files = [plan_file(name, group, metadata) for name, group in zip(names, groups)]
    weight_map = {place.spec.name: file.name for file in files for place in file.places}
    total = sum(spec.size for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return files, json.dumps(index, indent=2).encode() + b"\n"


Header = tuple[Mapping[str, Place], Mapping[str, str], int]


def read_header(path: Path) -> Header:
    """Read a file's header: places by tensor name, metadata, and the size that the header says the file has.

    The tensors' ranges must follow each other without a gap or an overlap, as the format says: bytes that belong to
    no tensor can hide anything, and two tensors on the same bytes are never what was saved.

    Raises:
        ArtifactError: it is no safetensors file, or its header contradicts itself. That the file is as long as
            its header says is left to the caller.
    """
    if not path.is_file():  # reading a pipe or a device might never end
        raise _broken(path, "it is no regular file")
    status = path.stat()
    if time.time() - status.st_mtime < _SETTLED:  # it may change again within what the file system's clock tells apart
        return _read_header(path)
    return _remembered(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


def _read_header(path: Path) -> Header:
    try:
        with open(path, "rb") as file:
            actual = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if _LFS.startswith(prefix) and file.read(len(_LFS) - 8) == _LFS[8:]:
                raise lfs_pointer(path)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, max(actual - 8, 0)):
                raise _broken(path, "its header is cut off or is none")
            body = file.read(length)
    except OSError as error:
        raise _broken(path, f"it cannot be read ({error.strerror})") from None
    try:
        places, metadata, end = _parsed(body, path.name)
    except ValueError as error:
        raise _broken(path, f"its header cannot be trusted: {error}") from None
    return MappingProxyType(places), MappingProxyType(metadata), 8 + length + end


@lru_cache(maxsize=256)
def _remembered(path: Path, identity: tuple[int, ...]) -> Header:
    """A header is asked for by whoever looks at a folder, several times while it is opened; it is parsed once."""
    return _read_header(path)


def _parsed(body: bytes, file: str) -> tuple[dict[str, Place], dict[str, str], int]:
    """A header's content; raises ValueError for everything that the format does not allow."""
    if not body.startswith(b"{"):
        raise ValueError("it does not begin with {")
    entries = parse_object(body, unique=True)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    ranges: list[tuple[int, int, TensorSpec]] = []
    for name, entry in entries.items():
        name.encode()  # half of a surrogate pair is no name: UnicodeEncodeError is a ValueError
        spec = checked_spec(name, entry)
        offsets = entry.get("data_offsets")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(value) is int for value in offsets)):
            raise ValueError(f"{name} has no range of bytes")
        if offsets[1] - offsets[0] != spec.size:
            raise ValueError(f"{name} has a wrong number of bytes")
        ranges.append((offsets[0], offsets[1], spec))
    position = 0
    for begin, end, spec in sorted(ranges, key=lambda item: item[:2]):
        if begin != position:
            raise ValueError(f"{spec.name} {'overlaps another tensor' if begin < position else 'lies behind a gap'}")
        position = end
    base = 8 + len(body)
    return {spec.name: Place(spec, file, base + begin) for begin, _, spec in ranges}, metadata, position


def checked_spec(name: object, entry: object) -> TensorSpec:
    """A tensor's name, dtype and shape out of somebody's JSON.

    Raises:
        ValueError: one of them is of another type, unknown, or larger than any file.
    """
    if not isinstance(name, str) or not isinstance(entry, dict):
        raise ValueError(f"{name!r:.80} is no tensor")
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} is of the unknown type {dtype!r:.40}")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{name} has no shape")
    size = 1
    for extent in shape:
        if type(extent) is not int or extent < 0:  # `true` is an int to Python
            raise ValueError(f"{name} has the extent {extent!r:.40}")
        size *= extent
        if size > LARGEST_TENSOR or extent > LARGEST_TENSOR:
            raise ValueError(f"{name} is larger than any file")
    if size * BITS[dtype] % 8:
        raise ValueError(f"{name} does not fill its last byte")
    return TensorSpec(name, dtype, tuple(shape))


def lfs_pointer(path: Path) -> ArtifactError:
    """The error for a file that git has not fetched."""
    return ArtifactError(
        "is a Git LFS pointer, not the file itself.",
        code="lfs-pointer",
        where=str(path),
        remedy="Run `git lfs pull` in that folder.",
    )


def check_length(path: Path) -> None:
    """Raise ArtifactError unless the file is exactly as long as its header says."""
    expected = read_header(path)[2]
    actual = path.stat().st_size
    if actual != expected:
        raise _broken(path, f"its header says {expected} bytes and it has {actual}")


def read_into(descriptor: int, target: memoryview, offset: int, path: Path) -> None:
    """Fill ``target`` from ``offset`` on.

    Raises:
        ArtifactError: the file ends before.
    """
    while target:
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [target[: 1 << 30]], offset)
        else:
            os.lseek(descriptor, offset, os.SEEK_SET)
            chunk = os.read(descriptor, min(len(target), 1 << 30))
            count = len(chunk)
            target[:count] = chunk
        if count == 0:
            raise _broken(path, f"it ends at byte {offset}, before its last tensor")
        target, offset = target[count:], offset + count


def _broken(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"this tensor file is broken: {why}.",
        code="broken-file",
        where=str(path),
        remedy="Get the file again, or go back to an older checkpoint (`luthier inspect` lists them).",
    )
