"""Tensors of a sharded checkpoint, read block by block: any stretch of a tensor is put together from the files of its ranks."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable

import torch

from luthier.artifacts.files import forget_cached, inside, open_binary
from luthier.artifacts.sharded import AGAIN, Block, Sharded, ShardedTensor, check_sharded
from luthier.artifacts.tensorfile import BITS, TensorSpec, read_into
from luthier.artifacts.torch_archive import SavedTensor, read_archive
from luthier.checkpoint.dtypes import FROM_FILE, bytes_of
from luthier.errors import ArtifactError
from luthier.export.source import Source


class ShardedSource(Source):
    """The tensors of a save by torch.distributed.checkpoint, under the names it has for them.

    Every block is looked up in its file before the first is read: a block that is not what the description says belongs
    to another save.

    Raises:
        ArtifactError: a file is missing, or blocks leave a hole, overlap, or are of another save.
    """

    def __init__(self, found: Sharded, tensors: Iterable[ShardedTensor]) -> None:
        tensors = list(tensors)
        check_sharded(found, tensors)
        super().__init__(found.folder, {t.name: TensorSpec(t.name, t.dtype, t.shape) for t in tensors})
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        try:
            self._blocks = {t.name: [(b, self._saved(found, t, b)) for b in sorted(t.blocks, key=lambda b: b.offsets) if b.count] for t in tensors}  # fmt: skip
        except BaseException:
            self.close()
            raise
        self.file_of = {t.name: ", ".join(sorted({b.file for b in t.blocks})) for t in tensors}

    def read(self, name: str, start: int, target: torch.Tensor) -> None:
        shape = self.specs[name].shape or (1,)
        row = math.prod(shape[1:])
        end = start + target.numel()
        if not target.numel():
            return
        first, last = start // row, -(-end // row)
        rows: torch.Tensor | None = None
        for block, saved in self._blocks[name]:
            offsets, sizes = block.offsets or (0,), block.sizes or (1,)
            low, high = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
            if low >= high:
                continue
            if saved.contiguous and sizes[1:] == shape[1:]:  # the block is one stretch of the tensor
                begin = max(start, offsets[0] * row)
                until = min(end, (offsets[0] + sizes[0]) * row)
                self._fill(block.file, saved, begin - offsets[0] * row, target[begin - start : until - start])
                continue
            if rows is None:
                rows = torch.empty((last - first, *shape[1:]), dtype=target.dtype)
            part = self._rows(block, saved, low - offsets[0], high - offsets[0])
            space = rows[low - first : high - first]
            for axis, (offset, size) in enumerate(zip(offsets[1:], sizes[1:]), 1):
                space = space.narrow(axis, offset, size)
            space.copy_(part)
        if rows is not None:
            target.copy_(rows.reshape(-1)[start - first * row : end - first * row])

    def _rows(self, block: Block, saved: SavedTensor, low: int, high: int) -> torch.Tensor:
        """Rows of a block, as a tensor of its shape."""
        inner = block.sizes[1:]
        if saved.contiguous:
            flat = torch.empty((high - low) * math.prod(inner), dtype=FROM_FILE[saved.dtype])
            self._fill(block.file, saved, low * math.prod(inner), flat)
            return flat.reshape(high - low, *inner)
        whole = torch.empty(saved.reach, dtype=FROM_FILE[saved.dtype])
        self._fill(block.file, saved, 0, whole)
        return whole.as_strided(saved.shape, saved.strides)[low:high]

    def _fill(self, file: str, saved: SavedTensor, start: int, target: torch.Tensor) -> None:
        if target.numel():
            offset = saved.offset + start * BITS[saved.dtype] // 8
            read_into(self._open(file), bytes_of(target), offset, self.folder / file)

    def _saved(self, found: Sharded, tensor: ShardedTensor, block: Block) -> SavedTensor:
        if found.form == "safetensors":
            strides, step = [], 1
            for extent in reversed(block.sizes):
                strides.append(step)
                step *= extent
            return SavedTensor(tensor.dtype, block.sizes, tuple(reversed(strides)), block.at)
        span = f"[{', '.join(f'{o}:{o + s}' for o, s in zip(block.offsets, block.sizes))}] of {tensor.name}"
        try:
            saved = read_archive(self._open(block.file), block.at, block.length, str(found.folder / block.file))
        except ValueError as error:
            raise ArtifactError(f"{block.file} does not hold {span} at byte {block.at}: {error}. It is damaged, or left from another save.", code="shard-stranger", where=str(found.folder), remedy=AGAIN) from None  # fmt: skip
        if saved.shape != block.sizes or saved.dtype != tensor.dtype:
            raise ArtifactError(f"where {block.file} should hold {span} ({tensor.dtype}), it holds {list(saved.shape)} ({saved.dtype}): it is of another save.", code="shard-stranger", where=str(found.folder), remedy=AGAIN)  # fmt: skip
        return saved

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = open_binary(inside(self.folder, file), os.O_RDONLY)
            return self._descriptors[file]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            forget_cached(descriptor)
            os.close(descriptor)
        self._descriptors.clear()
