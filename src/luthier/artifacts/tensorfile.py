"""The safetensors format as byte ranges: a header is a function of the tensor list.

Because the header is known before any byte of data, so is the place of every tensor, and any number of writers can
put their parts of the same file there at the same time. The format is eight bytes of header length, a JSON header,
and the tensors' bytes without gaps (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import ArtifactError

MAX_HEADER = 100_000_000  # the reference implementation's own limit
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}  # fmt: skip
DEFAULT_SHARD = 4 * 2**30


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


def read_header(path: Path) -> tuple[dict[str, Place], dict[str, str], int]:
    """Read a file's header: places by tensor name, metadata, and the size that the header says the file has.

    Raises:
        ArtifactError: it is no safetensors file, or its header contradicts itself. That the file is as long as
            its header says is left to the caller.
    """
    actual = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, max(actual - 8, 0)):
            raise _broken(path, "its header is cut off or is none")
        body = file.read(length)
    try:
        entries = json.loads(body)
        metadata = entries.pop("__metadata__", None) or {}
        base = 8 + length
        places = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            spec = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
            if spec.dtype in BITS and (end - begin != spec.size or begin < 0):
                raise _broken(path, f"the header gives {name} a wrong number of bytes")
            places[name] = Place(spec, path.name, base + begin)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, f"its header cannot be read ({error})") from None
    return places, dict(metadata), base + end


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
