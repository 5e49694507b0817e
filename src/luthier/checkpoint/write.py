"""Writing tensors at computed places: any number of processes fill the same files at the same time.

Nothing is gathered but what no list of byte ranges can express, nothing is consolidated afterwards, and the bytes
don't depend on how many processes wrote them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts.files import NO_ROOM, allocate, flush_file, no_room, open_binary, write_at
from luthier.artifacts.manifest import Digest, Manifest, digest_file, digest_of, stretches
from luthier.artifacts.tensorfile import BITS, DEFAULT_SHARD, FilePlan, Place, plan_files
from luthier.checkpoint.layout import Layout, Stored, to_files
from luthier.checkpoint.ranks import Ranks
from luthier.checkpoint.shards import Shard
from luthier.errors import ArtifactError


@dataclass(frozen=True)
class Part:
    """One folder of tensors within an artefact, planned to the byte: ``adapter/adapter_model.safetensors``."""

    folder: str
    layout: Layout
    files: tuple[FilePlan, ...]
    index: dict[str, bytes]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files) + sum(len(data) for data in self.index.values())

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


def plan_part(
    folder: str, stem: str, layout: Layout, metadata: Mapping[str, str], shard_bytes: int = DEFAULT_SHARD
) -> Part:
    """Plan the files of a layout; a function of the tensor list alone, so every rank plans the same."""
    files, index = plan_files([item.spec for item in layout.stored], stem, metadata, shard_bytes)
    return Part(folder, layout, tuple(files), {f"{stem}.safetensors.index.json": index} if index else {})


def write_parts(
    target: Path,
    parts: Sequence[Part],
    shards: Sequence[Mapping[str, Shard]],
    small: Mapping[str, bytes],
    *,
    kind: str,
    facts: Mapping[str, Any],
    ranks: Ranks,
    converter: nn.Module | None = None,
) -> Manifest:
    """Write parts and small files into the empty folder ``target``; the manifest is returned, not written.

    Args:
        shards: for each part, what this rank holds, by tensor name in memory.
        small: whole files by relative path (configs, tokenizer, state), written by the first rank.
        converter: the model whose conversion applies to groups; needed where a layout has any.

    Raises:
        LuthierError: the disk is full, here or on another rank.
        ArtifactError: the ranks' parts don't add up to the whole.
    """
    total = sum(part.size for part in parts) + sum(len(data) for data in small.values())
    try:
        with ranks.sharing_failure():
            if ranks.rank == 0:
                _create(target, parts, small)
        with ranks.sharing_failure():
            written = [_write_part(target, *each, converter) for each in zip(parts, shards, strict=True)]
    except OSError as error:
        if error.errno in NO_ROOM:
            raise no_room(error, target, total) from None
        raise
    everyone = ranks.gather([(counts, digests) for counts, digests in written])
    for position, part in enumerate(parts):
        _check_coverage(part, [rank[position][0] for rank in everyone])
    known = {(digest.file, digest.offset): digest for rank in everyone for _, digests in rank for digest in digests}
    digests, sizes, places = _digests(target, parts, small, known, ranks)
    return Manifest(kind, sizes, digests, places, dict(facts))


def _create(target: Path, parts: Sequence[Part], small: Mapping[str, bytes]) -> None:
    for part in parts:
        (target / part.folder).mkdir(parents=True, exist_ok=True)
        for file in part.files:
            with open(target / part.path(file.name), "wb") as handle:
                allocate(handle.fileno(), file.size)
                write_at(handle.fileno(), memoryview(file.header), 0)
    for name, data in [*small.items(), *((part.path(n), d) for part in parts for n, d in part.index.items())]:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as handle:
            handle.write(data)
            handle.flush()
            flush_file(handle.fileno())


def _write_part(
    target: Path, part: Part, shards: Mapping[str, Shard], converter: nn.Module | None
) -> tuple[dict[str, int], list[Digest]]:
    """Write this rank's bytes of one part. Returns bytes written by tensor, and digests of stretches it wrote whole."""
    stored = {item.spec.name: item for item in part.layout.stored}
    converted = _convert_groups(part.layout, shards, converter)
    counts: dict[str, int] = {}
    digests: list[Digest] = []
    for file in part.files:
        descriptor = open_binary(target / part.path(file.name), os.O_RDWR)
        try:
            for place in file.places:
                pieces = list(_pieces(stored[place.spec.name], shards, converted))
                for begin, data in pieces:
                    write_at(descriptor, data, place.offset + begin)
                counts[place.spec.name] = sum(len(data) for _, data in pieces)
                if len(pieces) == 1 and counts[place.spec.name] == place.spec.size:
                    digests += _digests_in_memory(part.path(file.name), place, pieces[0][1])
            flush_file(descriptor)
        finally:
            os.close(descriptor)
    return counts, digests


def _pieces(
    item: Stored, shards: Mapping[str, Shard], converted: Mapping[str, torch.Tensor]
) -> list[tuple[int, memoryview]]:
    """What this rank holds of one file tensor: (byte within the tensor, bytes)."""
    if item.spec.size == 0:
        return []
    if item.group is not None:
        tensor = converted.get(item.spec.name)
        return [] if tensor is None else [(0, Shard(tensor.contiguous(), 0).bytes)]
    shard = shards.get(item.source)
    if shard is None or item.runs is None:
        return []
    width = BITS[item.spec.dtype] // 8
    data = shard.bytes
    return [
        (file * width, data[local * width : (local + count) * width])
        for local, file, count in item.runs.within(shard.start, shard.data.numel())
    ]


def _convert_groups(
    layout: Layout, shards: Mapping[str, Shard], converter: nn.Module | None
) -> dict[str, torch.Tensor]:
    """Convert with real bytes the groups whose tensors this rank holds whole."""
    converted: dict[str, torch.Tensor] = {}
    for group in layout.groups:
        if all(name in shards for name in group):
            assert converter is not None
            converted |= to_files(converter, {name: shards[name].data for name in group})
    return converted


def _check_coverage(part: Part, counts: Sequence[Mapping[str, int]]) -> None:
    """Every byte of every tensor was written exactly once, by somebody."""
    wrong = [
        (item.spec.name, sum(rank.get(item.spec.name, 0) for rank in counts), item.spec.size)
        for item in part.layout.stored
        if sum(rank.get(item.spec.name, 0) for rank in counts) != item.spec.size
    ]
    if wrong:
        name, written, size = wrong[0]
        raise ArtifactError(
            f"{len(wrong)} tensors of {part.folder}/ were not written exactly once; {name}: {written} of {size} bytes.",
            code="coverage",
            where=part.folder,
            remedy="This is a defect of Luthier's; the checkpoint was not published. Please report it with this text.",
        )


def _digests_in_memory(file: str, place: Place, data: memoryview) -> list[Digest]:
    pieces = [piece for piece in stretches(place.end, [place]) if piece[0] >= place.offset]
    return [
        Digest(file, offset, length, digest_of(data[offset - place.offset : offset - place.offset + length]))
        for offset, length in pieces
        if length
    ]


def _digests(
    target: Path,
    parts: Sequence[Part],
    small: Mapping[str, bytes],
    known: Mapping[tuple[str, int], Digest],
    ranks: Ranks,
) -> tuple[tuple[Digest, ...], dict[str, int], tuple[Place, ...]]:
    """Digests of all files in file order: those known from memory, the rest shared out and read back."""
    wholes = {**small, **{part.path(name): data for part in parts for name, data in part.index.items()}}
    sizes = {name: len(data) for name, data in wholes.items()}
    wanted: list[tuple[str, int, int]] = []
    places: list[Place] = []
    for part in parts:
        for file in part.files:
            name = part.path(file.name)
            sizes[name] = file.size
            wanted += [(name, offset, length) for offset, length in stretches(file.size, file) if length]
            places += [Place(place.spec, name, place.offset) for place in file.places]
    missing = [entry for entry in wanted if (entry[0], entry[1]) not in known]
    mine = [
        digest
        for name, offset, length in missing[ranks.rank :: ranks.size]
        for digest in digest_file(target / name, name, [(offset, length)])
    ]
    found = {**known, **{(d.file, d.offset): d for rank in ranks.gather(mine) for d in rank}}
    digests = [found[name, offset] for name, offset, _ in wanted]
    for name, data in wholes.items():
        digests += [
            Digest(name, offset, length, digest_of(data[offset : offset + length]))
            for offset, length in stretches(len(data))
            if length
        ]
    return tuple(digests), sizes, tuple(places)
