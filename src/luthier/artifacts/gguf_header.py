"""A GGUF file's header: its metadata and where its tensors lie, read without any weight.

The layout is ggml's (docs/gguf.md): magic, version, counts, key-value pairs, tensor table, then aligned data. Every
length is checked against the file before it is trusted, so a cut-off file is an error here and not a crash later.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from luthier.errors import ArtifactError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_LONGEST_NAME = 1 << 16
_LONGEST_TEXT = 1 << 28  # a whole tokenizer.json may be one text
_MOST_ELEMENTS = 1 << 24  # of all arrays; vocabularies and their merges stay below a million
_LARGEST_ALIGNMENT = 1 << 20
_DEEPEST = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` in torch's order, `offset` and `size` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, and the tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads a GGUF header; raises ArtifactError if the file is cut off, damaged, or of a version before 2."""
    if not path.is_file() or path.stat().st_size < 24:
        raise _broken(path, "is cut off within its header, or is no regular file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data, path)
        magic, version, tensors, pairs = reader.take("<4sIQQ")
        if magic != b"GGUF":
            raise _broken(path, "does not begin with GGUF's signature")
        if version not in _VERSIONS:
            raise _broken(path, f"is of GGUF version {version}; 2 and 3 are read")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = reader.text(_LONGEST_NAME)
            if key in metadata:
                raise _broken(path, f"is damaged: {key} stands twice in its metadata")
            metadata[key] = reader.value(reader.take("<I")[0])
        if not isinstance(metadata.get("general.architecture"), str):
            raise _broken(path, "names no architecture")
        table = [reader.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _LARGEST_ALIGNMENT:
            raise _broken(path, f"is damaged: its tensors are aligned to {alignment!r:.40}")
        start = -(-reader.position // alignment) * alignment
        placed: dict[str, GgufTensor] = {}
        for name, shape, code, offset in table:
            if name in placed:
                raise _broken(path, f"is damaged: {name} stands twice")
            tensor = _place(path, name, shape, code, start + offset)
            if tensor.offset + tensor.size > len(data):
                raise _broken(
                    path, f"is cut off: {name} ends at byte {tensor.offset + tensor.size}, the file at {len(data)}"
                )
            placed[name] = tensor
        _check_apart(path, placed.values())
        return GgufHeader(metadata, placed)


def _check_apart(path: Path, tensors: Iterable[GgufTensor]) -> None:
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset < end:
            raise _broken(path, f"is damaged: {tensor.name} overlaps another tensor")
        end = max(end, tensor.offset + tensor.size)


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0
        self.elements = 0  # of all arrays so far

    def take(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        self.require(size)
        values = struct.unpack_from(form, self.data, self.position)
        self.position += size
        return values

    def text(self, longest: int | None = None) -> str:
        length = self.take("<Q")[0]
        if longest is not None and length > longest:
            raise _broken(self.path, f"is damaged: a name of {length} bytes at byte {self.position}")
        self.require(length)
        raw = self.data[self.position : self.position + length]
        self.position += length
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text(_LONGEST_TEXT)
        if kind != _ARRAY or depth > _DEEPEST:
            raise _broken(self.path, f"is damaged: metadata of unknown type {kind} at byte {self.position}")
        element, count = self.take("<IQ")
        self.require(count)
        self.elements += count
        if self.elements > _MOST_ELEMENTS:
            raise _broken(self.path, f"is damaged: an array of {count} values at byte {self.position}")
        if element in _SCALARS:
            return list(self.take(f"<{count}{_SCALARS[element][1]}"))
        return [self.value(element, depth + 1) for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text(_LONGEST_NAME)
        dimensions = self.take("<I")[0]
        if dimensions > 8:
            raise _broken(self.path, f"is damaged: {name} has {dimensions} dimensions")
        shape = self.take(f"<{dimensions}Q")
        code, offset = self.take("<IQ")
        return name, tuple(reversed(shape)), code, offset

    def require(self, size: int) -> None:
        if self.position + size > len(self.data):
            raise _broken(self.path, f"is cut off at byte {len(self.data)}, within its header")


def _place(path: Path, name: str, shape: tuple[int, ...], code: int, offset: int) -> GgufTensor:
    if code not in GGMLQuantizationType._value2member_map_:
        raise _broken(path, f"holds {name} in a format (number {code}) that this version of gguf does not know")
    kind = GGMLQuantizationType(code)
    block, size = GGML_QUANT_SIZES[kind]
    count = 1
    for length in shape:
        count *= length
    if count % block:
        raise _broken(path, f"is damaged: {name} does not fill its last block")
    return GgufTensor(name, shape, kind, offset, count // block * size)


def _broken(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"this GGUF file {why}.", code="broken-gguf", where=str(path), remedy="Get the file again.")
