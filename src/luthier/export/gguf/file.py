"""The GGUF container as byte ranges: its header is a function of metadata and tensor list, known before any weight.

Magic, version, counts, key-value pairs, tensor table, then the tensors, each at a multiple of 32 bytes (ggml's
docs/gguf.md). So a GGUF is planned and written like a file of safetensors, in any order and by several threads; the
bytes of a tensor are computed when they are asked for, a few rows at a time, from the tensors of another source.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from luthier.artifacts.tensorfile import FilePlan, Place, TensorSpec
from luthier.checkpoint.dtypes import FROM_FILE
from luthier.errors import ArtifactError
from luthier.export.gguf.kquants import Kind, encode, row_bytes
from luthier.export.merged.lowrank import BLOCK
from luthier.export.source import Source

ALIGNMENT = 32
_VERSION = 3
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 4, 5, 6, 7, 8, 9, 10


@dataclass(frozen=True)
class GgufTensor:
    """One tensor to write: ``origin`` in the source, changed as llama.cpp wants it, packed as ``kind``.

    Attributes:
        heads: how many heads' rows are interleaved, since llama.cpp rotates neighbours where transformers rotates halves.
        plus: what is added to every element (Gemma's norms are held less one).
        scale: what every element is multiplied by.
        values: the elements themselves, of a tensor that no file holds.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    origin: str = ""
    heads: int = 0
    plus: float = 0.0
    values: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def rows(self) -> int:
        count = 1
        for extent in self.shape[:-1]:
            count *= extent
        return count

    @property
    def size(self) -> int:
        """Bytes, without what aligns the next one."""
        return self.rows * row_bytes(self.kind, self.shape[-1])

    @property
    def padded(self) -> int:
        return -(-self.size // ALIGNMENT) * ALIGNMENT

    @property
    def spec(self) -> TensorSpec:
        """The tensor as what the file holds of it: bytes."""
        return TensorSpec(self.name, "U8", (self.padded,))


class GgufBytes(Source):
    """The bytes of planned tensors, computed from another source where they are read."""

    def __init__(self, source: Source, tensors: Sequence[GgufTensor]) -> None:
        super().__init__(source.folder, {tensor.name: tensor.spec for tensor in tensors})
        self._source = source
        self._tensors = {tensor.name: tensor for tensor in tensors}

    def read(self, name: str, start: int, target: torch.Tensor) -> None:
        tensor = self._tensors[name]
        width = row_bytes(tensor.kind, tensor.shape[-1])
        end = min(start + target.numel(), tensor.size)
        target[max(0, end - start) :].zero_()  # what aligns the next tensor
        group = tensor.rows // tensor.heads if tensor.heads and len(tensor.shape) > 1 else 1
        step = max(1, BLOCK // (tensor.shape[-1] * group)) * group  # whole heads, which are read together
        for low in range(start // width, -(-end // width), step):
            high = min(low + step, -(-end // width))
            packed = self._packed(tensor, low, high)
            at, until = max(low * width, start), min(high * width, end)
            target[at - start : until - start] = packed[at - low * width : until - low * width]

    def _packed(self, tensor: GgufTensor, low: int, high: int) -> torch.Tensor:
        """The bytes of rows ``[low, high)``.

        Raises:
            ArtifactError: a value is larger than the kind can hold, or none in a kind that has no word for that.
        """
        rows = self._rows(tensor, low, high)
        packed = encode(tensor.kind, rows).view(-1)
        if tensor.kind in (Kind.F32, Kind.BF16):
            return packed
        largest = float(rows.abs().max())  # not a number where one of them isn't
        if tensor.kind == Kind.F16 and largest > 65504:
            raise ArtifactError(f"{tensor.origin} has values up to {largest:.3g}, more than F16 can hold (65504).", code="out-of-range", where=tensor.origin, remedy="Export with --quant BF16, F32 or Q8_0.")  # fmt: skip
        if tensor.kind != Kind.F16 and not math.isfinite(largest):
            raise ArtifactError(f"{tensor.origin} holds values that are no numbers, which {tensor.kind.name} cannot say.", code="out-of-range", where=tensor.origin, remedy="Mend the weights: a training run that diverged left them so.")  # fmt: skip
        return packed

    def _rows(self, tensor: GgufTensor, low: int, high: int) -> torch.Tensor:
        """Rows ``[low, high)`` of what llama.cpp is to see, in fp32."""
        width = tensor.shape[-1]
        if tensor.values is not None:
            return tensor.values.reshape(-1, width)[low:high].float()
        if tensor.heads and len(tensor.shape) == 1:  # a bias: its elements are the rows
            rows = self._read(tensor, 0, 1).view(tensor.heads, 2, -1).transpose(1, 2).reshape(1, width)
        elif tensor.heads:
            group = tensor.rows // tensor.heads
            first, last = low // group * group, -(-high // group) * group
            whole = self._read(tensor, first, last).view(-1, 2, group // 2, width)
            rows = whole.transpose(1, 2).reshape(-1, width)[low - first : high - first]
        else:
            rows = self._read(tensor, low, high)
        if tensor.scale != 1.0:
            rows = rows * tensor.scale
        return rows + tensor.plus if tensor.plus else rows

    def _read(self, tensor: GgufTensor, low: int, high: int) -> torch.Tensor:
        width = tensor.shape[-1]
        stored = torch.empty((high - low) * width, dtype=FROM_FILE[self._source.specs[tensor.origin].dtype])
        self._source.read(tensor.origin, low * width, stored)
        return stored.float().view(-1, width)


def plan_gguf(name: str, metadata: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> FilePlan:
    """Lay out a GGUF file.

    Args:
        metadata: values by key; an int is written as u32, a float as f32, lists alike (ints as i32).
    """
    header = bytearray(struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _value(value)
    offset = 0
    for tensor in tensors:
        header += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)) + struct.pack(
            "<IQ", tensor.kind, offset
        )
        offset += tensor.padded
    header += b"\0" * (-len(header) % ALIGNMENT)
    places, position = [], len(header)
    for tensor in tensors:
        places.append(Place(tensor.spec, name, position))
        position += tensor.padded
    return FilePlan(name, bytes(header), tuple(places), position)


def fills_blocks(kind: GGMLQuantizationType, width: int) -> bool:
    return width % GGML_QUANT_SIZES[kind][0] == 0


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value) if value < 1 << 32 else struct.pack("<IQ", _U64, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    first = value[0]
    if isinstance(first, str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    kind, code = (_BOOL, "?") if isinstance(first, bool) else (_I32, "i") if isinstance(first, int) else (_F32, "f")
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + struct.pack(f"<{len(value)}{code}", *value)
