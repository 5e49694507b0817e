"""One tensor in an archive of torch.save, found without unpickling: where its elements lie in the file, and in what order.

``.distcp`` files are such archives, one an item, end to end. The archive's ``data.pkl`` is read as values, so what it
says of dtype, shape and strides can be compared with what the folder's description says.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

from luthier.artifacts.pickle_values import Call, Named, Persistent, read_values
from luthier.artifacts.tensorfile import BITS

LARGEST = 2**20  # bytes of one tensor's data.pkl
_STORAGES = {
    "Bool": "BOOL", "Byte": "U8", "Char": "I8", "Short": "I16", "Int": "I32", "Long": "I64", "Half": "F16",
    "BFloat16": "BF16", "Float": "F32", "Double": "F64", "ComplexFloat": "C64", "Float8_e4m3fn": "F8_E4M3",
    "Float8_e5m2": "F8_E5M2",
}  # fmt: skip
_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_PARAMETER = "torch._utils._rebuild_parameter"
_DTYPES = {"torch.float8_e8m0fnu": "F8_E8M0", "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64", "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2"}  # fmt: skip
_KNOWN = {
    *_REBUILD, _PARAMETER, "collections.OrderedDict", "torch.storage.UntypedStorage", *_DTYPES,
    *(f"torch.{name}Storage" for name in _STORAGES),
}  # fmt: skip


@dataclass(frozen=True)
class SavedTensor:
    """``shape`` elements of ``dtype`` in a file, from byte ``offset`` on, ``strides`` elements apart."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def contiguous(self) -> bool:
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides)):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True

    @property
    def reach(self) -> int:
        """Elements from the first to the last in the file, both counted."""
        return 1 + sum((extent - 1) * stride for extent, stride in zip(self.shape, self.strides)) if math.prod(self.shape) else 0  # fmt: skip


def read_archive(descriptor: int, at: int, length: int, where: str) -> SavedTensor:
    """The tensor that ``length`` bytes from ``at`` on hold.

    Raises:
        RequestError: its pickle wants more than a tensor.
        ValueError: it is no archive with one tensor; the text says why.
    """
    try:
        with zipfile.ZipFile(_Slice(descriptor, at, length)) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            pickled = entries["data.pkl"]
            if pickled.file_size > LARGEST:
                raise ValueError("its description is larger than any")
            value = read_values(archive.read(pickled), _KNOWN, where)
            if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                raise ValueError("its numbers are in the other byte order")
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError, OverflowError) as error:
        raise ValueError(f"no archive of torch.save lies there ({error})") from None
    while isinstance(value, Call) and value.name == _PARAMETER:
        value = value.args[0]
    dtype, key, start, shape, strides = _described(value)
    data = entries.get(f"data/{key}")
    if data is None or data.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its elements are not in the archive, or packed")
    width = BITS[dtype] // 8
    found = SavedTensor(dtype, shape, strides, at + _start(descriptor, at, data.header_offset) + start * width)
    if (start + found.reach) * width > data.file_size or found.offset + found.reach * width > at + length:
        raise ValueError(f"it has {data.file_size} bytes of elements, fewer than its shape {list(shape)} needs")
    return found


def _described(value: Any) -> tuple[str, str, int, tuple[int, ...], tuple[int, ...]]:
    if not (isinstance(value, Call) and value.name in _REBUILD and isinstance(value.args, tuple)):
        raise ValueError("it holds no tensor")
    storage, start, shape, strides = value.args[:4]
    if not (isinstance(storage, Persistent) and isinstance(storage.id, tuple) and len(storage.id) == 5):
        raise ValueError("its tensor has no storage")
    _, kind, key, _, count = storage.id
    dtype = value.args[6] if value.name == _REBUILD[1] else kind
    if not isinstance(dtype, Named) or not isinstance(key, str) or not key.isdigit():
        raise ValueError("its storage is of no known kind")
    word = _DTYPES.get(dtype.name) or _STORAGES.get(dtype.name.removeprefix("torch.").removesuffix("Storage"))
    if word is None:
        raise ValueError(f"its elements are {dtype.name}")
    for numbers in ((start, count), shape, strides):
        if not isinstance(numbers, tuple) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError("its shape is none")
    if len(shape) != len(strides):
        raise ValueError("its shape is none")
    return word, key, start, shape, strides


def _start(descriptor: int, at: int, header: int) -> int:
    """Where an entry's bytes begin, behind its own header, whose length only it says."""
    data = os.pread(descriptor, 30, at + header)
    if len(data) < 30 or data[:4] != b"PK\x03\x04":
        raise ValueError("an entry of its archive has no header")
    name, extra = struct.unpack("<HH", data[26:30])
    return header + 30 + int(name) + int(extra)


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, descriptor: int, at: int, length: int) -> None:
        self._descriptor, self._at, self._length, self._position = descriptor, at, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        wanted = max(0, min(len(view), self._length - self._position))
        data = os.pread(self._descriptor, wanted, self._at + self._position)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
