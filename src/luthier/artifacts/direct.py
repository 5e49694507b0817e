"""Writing large files past the page cache.

A buffered write costs the processor twice: a page to find and clear, and the bytes to copy into it. Where a file is
written once, from memory that is at hand, that is as much work as a whole merge. Direct writes want file offset,
length and address in whole blocks; tensors lie anywhere. So the whole blocks of a piece go directly and its two ends,
less than a block each, through the cache; ends of neighbours meet in blocks that are never written directly.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from luthier.artifacts.files import allocate, flush_file, forget_cached, open_binary, write_at

BLOCK = 4096  # what every device and file system that allows direct writes takes
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class DirectFile:
    """A new file of known size, written at offsets by any number of threads.

    Attributes:
        descriptor: the file through the page cache.
        direct: whether writes pass it by; False where the system or the file system has no such thing.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.descriptor = open_binary(path, os.O_RDWR | os.O_CREAT)
        self._direct: int | None = None
        try:
            allocate(self.descriptor, size)
            self._direct = _open_direct(path)
        except BaseException:
            os.close(self.descriptor)
            raise

    @property
    def direct(self) -> bool:
        return self._direct is not None

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of ``data``, directly where its memory lies at ``offset`` modulo `BLOCK`.

        ``data`` is a flat, writable view of bytes that nobody else changes meanwhile.
        """
        begin = -offset % BLOCK
        end = begin + (len(data) - begin) // BLOCK * BLOCK
        if self._direct is None or end <= begin or (_address(data) - offset) % BLOCK:
            write_at(self.descriptor, data, offset)
            return
        try:
            write_at(self._direct, data[begin:end], offset + begin)
        except OSError as error:
            if error.errno not in _REFUSED:  # a file system that opens so and then writes only otherwise
                raise
            write_at(self.descriptor, data, offset)
            return
        write_at(self.descriptor, data[:begin], offset)
        write_at(self.descriptor, data[end:], offset + end)

    def flush(self) -> None:
        """Return when every byte is on the device, and keep none in memory."""
        flush_file(self.descriptor)
        forget_cached(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)


def _open_direct(path: Path) -> int | None:
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return open_binary(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return None


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))
