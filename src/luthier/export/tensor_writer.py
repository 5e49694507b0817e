"""Writing a folder of tensors that are read, or computed, one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from luthier.artifacts.files import (  # fmt: skip
    allocate,
    flush_file,
    free_bytes,
    full_disk_named,
    open_binary,
    readable_size,
    write_at,
    write_file,
)
from luthier.artifacts.manifest import Digest, digest_file, stretches
from luthier.artifacts.tensorfile import Place, plan_files
from luthier.checkpoint.shards import Shard
from luthier.errors import LuthierError
from luthier.export.tensor_source import Item


@dataclass
class Contents:
    """What a folder holds so far, as its manifest will say."""

    files: dict[str, int] = field(default_factory=dict)
    digests: list[Digest] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def add(self, folder: Path, name: str, data: bytes) -> None:
        """Write one small file."""
        with full_disk_named(folder):
            write_file(folder / name, data)
        self.files[name] = len(data)
        self.digests += digest_file(folder / name, name, stretches(len(data)))


def check_room(target: Path, items: Iterable[Item], small: Mapping[str, bytes]) -> None:
    """Raises LuthierError where the disk has less room than the folder needs."""
    need = sum(item.spec.size for item in items) + sum(map(len, small.values())) + 2**20
    free = free_bytes(target.parent)
    if need > free:
        raise LuthierError(f"the disk has {readable_size(free)} free and {readable_size(need)} are needed.", code="disk-full", where=str(target), remedy="Make room, or give a folder on another disk.")  # fmt: skip


def write_tensors(folder: Path, items: Mapping[str, Item], stem: str, metadata: Mapping[str, str]) -> Contents:
    """Write items as ``stem*.safetensors``; memory for one tensor is needed.

    Raises:
        LuthierError: the disk is full.
    """
    files, index = plan_files([item.spec for item in items.values()], stem, metadata)
    contents = Contents()
    with full_disk_named(folder):
        for file in files:
            descriptor = open_binary(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                allocate(descriptor, file.size)
                write_at(descriptor, memoryview(file.header), 0)
                for place in file.places:
                    write_at(descriptor, _bytes(items[place.spec.name].load()), place.offset)
                flush_file(descriptor)
            finally:
                os.close(descriptor)
            contents.files[file.name] = file.size
            contents.places += file.places
            contents.digests += digest_file(folder / file.name, file.name, stretches(file.size, file))
    if index is not None:
        contents.add(folder, f"{stem}.safetensors.index.json", index)
    return contents


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return Shard(flat, 0).bytes if flat.numel() else memoryview(b"")
