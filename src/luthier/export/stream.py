"""The stream: a few threads each take the next stretch of output, read what it is made of, compute, digest and write.

A stretch is what a manifest digests: a tensor, or 64 MiB of one. So memory is a few stretches whatever the model's
size, every byte passes the processor once, and reading, computing and writing of different stretches overlap (torch,
BLAKE3 and the system's calls release Python's lock). Where files can't be written past the page cache, a further thread
flushes what was written while the rest goes on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts.direct import BLOCK as ALIGNED
from luthier.artifacts.direct import DirectFile
from luthier.artifacts.files import free_bytes, full_disk_named, readable_size, write_file
from luthier.artifacts.manifest import Digest, Manifest, digest_of, stretches
from luthier.artifacts.tensorfile import BITS, DEFAULT_SHARD, FilePlan, Place, TensorSpec, plan_files
from luthier.checkpoint.dtypes import FROM_FILE, bytes_of
from luthier.errors import ArtifactError, LuthierError
from luthier.export.merged.lowrank import BLOCK, Change
from luthier.export.source import Source
from luthier.export.unfinished import Journal

WORKERS = 4
FLUSH_EVERY = 0.5  # seconds
WHOLE = 1 << 62  # a shard size for what must stay one file: peft opens no shards


@dataclass(frozen=True)
class Output:
    """One tensor to write: ``name`` of ``source``, changed or not; a dtype in ``spec`` other than the source's casts."""

    spec: TensorSpec
    source: Source
    name: str
    change: Change | None = None

    def load(self) -> torch.Tensor:
        """The whole tensor as the source has it."""
        return self.source.tensor(self.name)

    def named(self, name: str) -> Output:
        """The same under another name."""
        return replace(self, spec=replace(self.spec, name=name))


def as_they_are(source: Source) -> dict[str, Output]:
    """Every tensor of a source, unchanged, by name."""
    return {name: Output(spec, source, name) for name, spec in source.specs.items()}


@dataclass
class Written:
    """What a stream left: digests and places by file, and the digests of source stretches it happened to read whole."""

    manifest: Manifest
    source_digests: dict[tuple[str, int], Digest] = field(default_factory=dict)


def write_stream(
    target: Path,
    outputs: Sequence[Output],
    small: Mapping[str, bytes],
    *,
    stem: str,
    kind: str,
    metadata: Mapping[str, str],
    shard_bytes: int = DEFAULT_SHARD,
    witness: Source | None = None,
    journal: Journal | None = None,
    planned: list[FilePlan] | None = None,
) -> Written:
    """Write tensors and small files into the empty folder ``target``; the manifest is returned, not written.

    Args:
        witness: a source whose own stretches are digested on the way, for its fingerprint.
        journal: what an interrupted call has left in ``target``, which is taken over.
        planned: the files of another format, laid out already.

    Raises:
        LuthierError: there is less room than the files need.
    """
    files, index = planned, None
    if files is None:
        files, index = plan_files([output.spec for output in outputs], stem, metadata, shard_bytes)
    wholes = {**small, **({f"{stem}.safetensors.index.json": index} if index else {})}
    if journal is not None:
        journal.begin(b"".join(file.header for file in files) + digest_of(b"".join(wholes[n] for n in sorted(wholes))).encode())  # fmt: skip
    allocated = sum(_allocated(target / file.name) for file in files)
    check_room(target, sum(file.size for file in files) + sum(len(data) for data in wholes.values()) - allocated)
    by_name = {output.spec.name: output for output in outputs}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the threads
    try:
        with full_disk_named(target):
            for name, data in wholes.items():
                write_file(target / name, data)
            digests, seen = _write_files(target, files, by_name, witness, journal)
    finally:
        torch.set_num_threads(threads)
    sizes = {name: len(data) for name, data in wholes.items()} | {file.name: file.size for file in files}
    for name, data in wholes.items():
        digests += [Digest(name, at, length, digest_of(data[at : at + length])) for at, length in stretches(len(data)) if length]  # fmt: skip
    places = tuple(Place(place.spec, file.name, place.offset) for file in files for place in file.places)
    digests.sort(key=lambda digest: (digest.file, digest.offset))
    return Written(Manifest(kind, sizes, tuple(digests), places), seen)


def check_room(target: Path, needed: int) -> None:
    """Raises LuthierError where less is free than will be written."""
    free = free_bytes(target)
    if free < needed:
        raise LuthierError(
            f"{readable_size(needed)} are needed and {readable_size(free)} are free.",
            code="disk-full",
            where=str(target.parent),
            remedy="Make room, or give a folder on another disk.",
        )


def _write_files(
    target: Path,
    files: Sequence[FilePlan],
    outputs: Mapping[str, Output],
    witness: Source | None,
    journal: Journal | None,
) -> tuple[list[Digest], dict[tuple[str, int], Digest]]:
    opened: dict[str, DirectFile] = {}
    digests: list[Digest] = []
    seen: dict[tuple[str, int], Digest] = {}
    try:
        for file in files:
            opened[file.name] = DirectFile(target / file.name, file.size)
            opened[file.name].write(memoryview(bytearray(file.header)), 0)
            digests.append(Digest(file.name, 0, len(file.header), digest_of(file.header)))
        flusher = _Flusher([file.descriptor for file in opened.values() if not file.direct])
        worker = _Worker(opened, outputs, witness, digests, seen, journal)
        pieces = [(file, place, *piece) for file in files for place in file.places for piece in _pieces(place) if not worker.has(file, place, *piece)]  # fmt: skip
        with ThreadPoolExecutor(WORKERS, "export") as pool, flusher:
            futures = [pool.submit(worker.write, *piece) for piece in pieces]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also where Ctrl-C ends the wait: the pool would write all the rest first
                for future in futures:
                    future.cancel()
            for future in done:
                future.result()
        for written in opened.values():
            written.flush()
    finally:
        for written in opened.values():
            written.close()
    return digests, seen


def _allocated(path: Path) -> int:
    """Bytes that a file has on its device."""
    if not path.is_file():
        return 0
    status = path.stat()
    return min(status.st_size, getattr(status, "st_blocks", 0) * 512)


def _pieces(place: Place) -> list[tuple[int, int]]:
    return [piece for piece in stretches(place.end, [place]) if piece[0] >= place.offset and piece[1]]


class _Flusher:
    """Keeps the device busy while the workers compute, so that the last flush has little left to do.

    A system reports a failed write-back to one flush only: what this thread was told must not be lost with it.
    """

    def __init__(self, descriptors: list[int]) -> None:
        self._descriptors = descriptors
        self._failure: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="export-flush", daemon=True)

    def __enter__(self) -> _Flusher:
        self._thread.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        flush = getattr(os, "fdatasync", os.fsync)
        try:
            while not self._stop.wait(FLUSH_EVERY):
                for descriptor in self._descriptors:
                    flush(descriptor)
        except OSError as error:  # handed to the writing thread when it leaves
            self._failure = error


class _Worker:
    """What each thread does with a stretch; its buffers are its own and reused."""

    def __init__(
        self,
        opened: Mapping[str, DirectFile],
        outputs: Mapping[str, Output],
        witness: Source | None,
        digests: list[Digest],
        seen: dict[tuple[str, int], Digest],
        journal: Journal | None,
    ) -> None:
        self._opened = opened
        self._outputs = outputs
        self._witness = witness
        self._digests = digests
        self._seen = seen
        self._journal = journal
        self._local = threading.local()

    def has(self, file: FilePlan, place: Place, offset: int, length: int) -> bool:
        """Whether an interrupted call has written a stretch; its digests are noted as if it were written now."""
        found = self._journal.done.get((file.name, offset)) if self._journal else None
        if found is None or found[0].length != length:
            return False
        self._note(place, *found)
        return True

    def write(self, file: FilePlan, place: Place, offset: int, length: int) -> None:
        output = self._outputs[place.spec.name]
        width = BITS[place.spec.dtype] // 8
        start = (offset - place.offset) // width
        dtype = FROM_FILE[place.spec.dtype]
        out = self._buffer("out", length, offset).view(dtype)
        original = output.source.specs[output.name]
        same = original.dtype == place.spec.dtype
        before = None
        if output.change is None and same:
            output.source.read(output.name, start, out)
        else:
            before = self._compute(output, original, start, out, digest_before=same)
        data = bytes_of(out)
        digest = digest_of(data)
        self._opened[file.name].write(data, offset)
        written = Digest(file.name, offset, length, digest)
        if self._journal is not None:
            self._journal.add(written, before)
        self._note(place, written, before)

    def _note(self, place: Place, written: Digest, before: str | None) -> None:
        self._digests.append(written)
        output = self._outputs[place.spec.name]
        at = output.source.place(output.name)
        original = output.source.specs[output.name]
        if output.source is self._witness and at is not None and original.dtype == place.spec.dtype:
            begin = at.offset + written.offset - place.offset
            self._seen[at.file, begin] = Digest(at.file, begin, written.length, before or written.blake3)

    def _compute(
        self, output: Output, original: TensorSpec, start: int, out: torch.Tensor, *, digest_before: bool
    ) -> str | None:
        """Fill ``out`` with elements from ``start`` on; returns the digest of the same elements before the change."""
        count, source = out.numel(), FROM_FILE[original.dtype]
        width = output.change.width if output.change else 1
        held = original.size * 8 // BITS[original.dtype]
        begin, end = start // width * width, -(-(start + count) // width) * width
        if source is out.dtype and (begin, end) == (start, start + count):
            raw = out
        else:
            raw = self._buffer("in", (end - begin) * BITS[original.dtype] // 8).view(source)
        taken = max(0, min(end, held) - begin)
        if taken:
            output.source.read(output.name, begin, raw[:taken])
        raw[taken:].zero_()  # rows beyond the source's are given by the change
        before = None
        if digest_before and output.source is self._witness:
            before = digest_of(bytes_of(raw[start - begin : start - begin + count]))
        rows = raw.view(-1, width)

        def read(low: int, high: int) -> torch.Tensor:
            block = torch.empty((high - low) * width, dtype=source)
            output.source.read(output.name, low * width, block)
            return block.view(high - low, width)

        change = output.change.prepare(read, held // width) if output.change else None
        step = max(1, BLOCK // width)
        scratch = self._buffer("block", step * width * 4).view(torch.float32).view(step, width)
        for row in range(0, len(rows), step):
            taken_rows = rows[row : row + step]
            block = scratch[: len(taken_rows)].copy_(taken_rows)  # in one place: fresh memory costs more than the sum
            if change is not None:
                change.apply(block, begin // width + row)
            at = begin + row * width
            low, high = max(at, start), min(at + block.numel(), start + count)
            cast = out[low - start : high - start].copy_(block.reshape(-1)[low - at : high - at])
            if out.dtype is torch.float16 and source is not torch.float16:
                _check_range(cast, block, output.spec.name)
        return before

    def _buffer(self, name: str, size: int, offset: int = 0) -> torch.Tensor:
        """``size`` bytes of this thread's buffer of that name, which grows and is kept; aligned as ``offset`` is in a file."""
        held: torch.Tensor | None = getattr(self._local, name, None)
        if held is None or held.numel() < size + ALIGNED:
            held = torch.empty(size + ALIGNED, dtype=torch.uint8)
            setattr(self._local, name, held)
        shift = (offset - held.data_ptr()) % ALIGNED
        return held[shift : shift + size]


def _check_range(cast: torch.Tensor, block: torch.Tensor, name: str) -> None:
    if not torch.isfinite(cast).all() and torch.isfinite(block).all():
        raise ArtifactError(
            f"{name} has values up to {float(block.abs().max()):.3g}, more than fp16 can hold (65504).",
            code="out-of-range",
            where=name,
            remedy="Export with --dtype bf16 or fp32.",
        )
