"""Writing past the page cache leaves the same bytes as any other way of writing."""

from __future__ import annotations

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from luthier.artifacts import direct
from luthier.artifacts.direct import BLOCK, DirectFile


def placed(content: bytes, offset: int) -> memoryview:
    """The bytes in memory that lies as the file does, as the stream's buffers are."""
    held = np.zeros(len(content) + BLOCK, np.uint8)
    shift = (offset - held.ctypes.data) % BLOCK
    view = memoryview(held)[shift : shift + len(content)]
    view[:] = content
    return view


def pieces(size: int, seed: int) -> list[tuple[int, int]]:
    """Stretches that cover a file, many smaller than a block, few beginning at one."""
    chosen = random.Random(seed)
    found, at = [], 0
    while at < size:
        length = min(size - at, chosen.choice([1, 24, 500, 4096, 6144, 70_000, 300_001]))
        found.append((at, length))
        at += length
    chosen.shuffle(found)
    return found


def write_all(path: Path, content: bytes, seed: int, *, aligned: bool = True) -> DirectFile:
    file = DirectFile(path, len(content))

    def write(piece: tuple[int, int]) -> None:
        at, length = piece
        file.write(placed(content[at : at + length], at if aligned else at + 1), at)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, pieces(len(content), seed)))
    file.flush()
    file.close()
    return file


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("aligned", [True, False])
def test_pieces_of_any_size_from_several_threads_make_the_file(tmp_path, seed, aligned):
    content = random.Random(seed).randbytes(3_000_017)
    write_all(tmp_path / "file", content, seed, aligned=aligned)
    assert (tmp_path / "file").read_bytes() == content


def test_a_file_system_that_refuses_direct_writes_gets_ordinary_ones(tmp_path, monkeypatch):
    real, refused = direct.write_at, []

    def write_at(descriptor: int, data: memoryview, offset: int) -> None:
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor, data, offset)

    monkeypatch.setattr(direct, "write_at", write_at)
    content = random.Random(9).randbytes(1_000_003)
    file = write_all(tmp_path / "file", content, 9)
    assert (tmp_path / "file").read_bytes() == content
    assert bool(refused) == file.direct


def test_a_failed_direct_write_is_no_success(tmp_path, monkeypatch):
    file = DirectFile(tmp_path / "file", 8 * BLOCK)

    def full(descriptor: int, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct, "write_at", full)
    with pytest.raises(OSError, match="No space"):
        file.write(placed(bytes(4 * BLOCK), 0), 0)
    file.close()
