"""Folders that torch.distributed.checkpoint wrote: which tensors there are, and which file holds which block of each.

Two forms: ``.metadata`` (a pickle, read as values) with ``.distcp`` files, and safetensors files of one rank each that
say in their headers where their blocks belong. Before anything is read, the blocks of every tensor must fill it
exactly: torch's own tools write zeros into a hole and take the last of two that overlap.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.artifacts.files import inside
from luthier.artifacts.pickle_values import Call, Named, read_values
from luthier.artifacts.tensorfile import Place, check_length, checked_spec, read_header
from luthier.errors import ArtifactError

METADATA = ".metadata"
SHARDING = "DCP_SHARDING_INFO"
LARGEST = 512 * 2**20  # bytes of .metadata
AGAIN = "Copy the whole folder again from where it was written, or take another checkpoint."
_RANK_FILE = re.compile(r"shard-(\d{5})-model-\d{5}-of-\d{5}\.safetensors")
_TORCH = "torch.distributed.checkpoint"
WORDS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64",
}  # fmt: skip
_KNOWN = {
    *(f"{_TORCH}.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta")),
    f"{_TORCH}.filesystem._StorageInfo", f"{_TORCH}.filesystem._StoragePrefix", "torch.Size",
    "torch.serialization._get_layout", "collections.OrderedDict",
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "PurePosix", "Windows", "PureWindows")),
    *(f"torch.{word}" for word in WORDS),
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A rectangular part of a tensor: ``sizes`` elements from ``offsets`` on, in ``length`` bytes at ``at`` of a file.

    In a ``.distcp`` file the bytes are an archive of torch.save; else they are the elements themselves.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    at: int
    length: int

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.sizes)


@dataclass
class ShardedTensor:
    """A tensor by its full name; ``path`` is where it stood in the nested state dict that was saved, if that is known."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: list[Block] = field(default_factory=list)
    path: tuple[str, ...] = ()


@dataclass
class Sharded:
    """A whole save: its tensors, the names of what is no tensor, its files, and files of its kind that it doesn't name."""

    folder: Path
    form: str
    tensors: dict[str, ShardedTensor]
    others: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)


def read_sharded(folder: Path) -> Sharded:
    """What a folder holds, by its ``.metadata`` or its files' headers; no weights are read.

    Raises:
        RequestError: the pickle wants more than a checkpoint's description needs.
        ArtifactError: it is damaged, or says what cannot be.
    """
    if (folder / METADATA).is_file():
        return _from_metadata(folder)
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file())
    if any(SHARDING in read_header(folder / name)[1] for name in names):
        return _from_headers(folder, names)
    raise ArtifactError(
        ".metadata is missing, which says where each tensor lies in the .distcp files.",
        code="no-metadata",
        where=str(folder),
        remedy="Copy it from where the folder was written.",
    )


def check_sharded(found: Sharded, tensors: Iterable[ShardedTensor] | None = None) -> None:
    """Check that every file is there and that the blocks of each tensor fill it: no hole, no overlap, no stranger.

    Raises:
        ArtifactError: the first of these, with the tensor and the range.
    """
    tensors = list(found.tensors.values() if tensors is None else tensors)
    for tensor in tensors:
        for block in tensor.blocks:
            path = inside(found.folder, block.file)
            if not path.is_file():
                raise ArtifactError(
                    f"{block.file} is missing, which holds {_span(block)} of {tensor.name}.",
                    code="shard-missing",
                    where=str(found.folder),
                    remedy=AGAIN,
                )
            if block.at + block.length > (size := path.stat().st_size):
                raise ArtifactError(
                    f"{block.file} ends at byte {size}, and {_span(block)} of {tensor.name} reaches to byte {block.at + block.length}.",
                    code="shard-cut",
                    where=str(found.folder),
                    remedy=AGAIN,
                )
        _check_fills(tensor, found.folder)
    if found.strangers:
        raise ArtifactError(
            f"{', '.join(found.strangers[:3])} {'is' if len(found.strangers) == 1 else 'are'} in no line of {METADATA}: "
            f"left from an earlier save by another number of ranks, so one of the two is not whole.",
            code="shard-stranger",
            where=str(found.folder),
            remedy="If the newer save is the one you want, move these files away.",
        )


def _from_metadata(folder: Path) -> Sharded:
    path = folder / METADATA
    if path.stat().st_size > LARGEST:
        raise _damaged(path, "it is larger than any")
    try:
        content = read_values(path.read_bytes(), _KNOWN, str(path))
        listed, stored = content.get("state_dict_metadata"), content.get("storage_data")
        paths = content.get("planner_data")
        found = Sharded(folder, "distcp", {})
        for name, entry in listed.items():
            if entry.name.endswith(".BytesStorageMetadata"):
                found.others.append(_text(name))
            else:
                found.tensors[name] = _tensor(name, entry, paths if isinstance(paths, dict) else {})
        sizes = {(t.name, b.offsets): b for t in found.tensors.values() for b in t.blocks}
        placed: dict[str, list[Block]] = {name: [] for name in found.tensors}
        files = set()
        for index, info in stored.items():
            name, file = _text(index.get("fqn")), _text(info.get("relative_path"))
            files.add(file)
            if info.get("transform_descriptors"):
                raise ArtifactError(f"{name} was written through an extension ({_text(info.get('transform_descriptors')[0]):.40}), which is not read here.", code="shard-extension", where=str(folder), remedy="Save it without extensions.")  # fmt: skip
            if name in found.tensors:
                block = sizes[name, _numbers(index.get("offset"))]
                at, length = _numbers((info.get("offset"), info.get("length")))
                placed[name].append(Block(block.offsets, block.sizes, file, at, length))
        for name, tensor in found.tensors.items():
            _check_placed(tensor, placed[name], folder)
            tensor.blocks = placed[name]
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise _damaged(path, str(error) if isinstance(error, ValueError) else f"it does not describe a save ({error!r:.60})") from None  # fmt: skip
    found.files = sorted(files)
    there = {entry.name for entry in folder.iterdir() if entry.suffix == ".distcp"}
    found.strangers = sorted(there - files)
    return found


def _check_placed(tensor: ShardedTensor, placed: Sequence[Block], folder: Path) -> None:
    """Raises ArtifactError for a block that the description lists and no file holds."""
    have = {block.offsets for block in placed}
    lost = next((block for block in tensor.blocks if block.offsets not in have and block.count), None)
    if lost is not None:
        raise ArtifactError(f"{_span(lost)} of {tensor.name} lies in no file that {METADATA} names.", code="shard-hole", where=str(folder), remedy=AGAIN)  # fmt: skip


def _tensor(name: str, entry: Call, paths: dict[str, Any]) -> ShardedTensor:
    properties = entry.get("properties").state
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    if not isinstance(dtype, Named):
        raise ValueError(f"{name} has no dtype")
    spec = checked_spec(name, {"dtype": WORDS[dtype.name.removeprefix("torch.")], "shape": list(_numbers(entry.get("size")))})  # fmt: skip
    blocks = [Block(_numbers(c.get("offsets")), _numbers(c.get("sizes")), "", 0, 0) for c in entry.get("chunks")]
    path = paths.get(name)
    parts = tuple(str(part) for part in path) if isinstance(path, tuple) else ()
    return ShardedTensor(spec.name, spec.dtype, spec.shape, blocks, parts)


def _from_headers(folder: Path, names: Sequence[str]) -> Sharded:
    found = Sharded(folder, "safetensors", {}, files=list(names))
    ranks = sorted({int(match[1]) for name in names if (match := _RANK_FILE.fullmatch(name))})
    for name in names:
        path = folder / name
        check_length(path)
        places, metadata, _ = read_header(path)
        try:
            told = json.loads(metadata[SHARDING])
            for place in places.values():
                offsets = _numbers(tuple(told[place.spec.name]["saved_offsets"]))
                _add(found.tensors, place, offsets, name)
        except KeyError:
            found.strangers.append(name)
        except (ValueError, TypeError, AttributeError) as error:
            raise _damaged(path, str(error)) from None
    if found.strangers:
        raise ArtifactError(f"{found.strangers[0]} does not say where its blocks belong, as the other files do: it is of another save.", code="shard-stranger", where=str(folder), remedy="Move it away.")  # fmt: skip
    lost = sorted(set(range(1, max(ranks, default=0) + 1)) - set(ranks))
    if lost:
        raise ArtifactError(f"the file of rank {lost[0]} is missing (there are those of {len(ranks)} of {ranks[-1]} ranks){_first_hole(found)}.", code="shard-missing", where=str(folder), remedy=AGAIN)  # fmt: skip
    return found


def _add(tensors: dict[str, ShardedTensor], place: Place, offsets: tuple[int, ...], file: str) -> None:
    spec = place.spec
    if len(offsets) != len(spec.shape):
        raise ValueError(f"{spec.name} has {len(spec.shape)} dimensions and {len(offsets)} offsets")
    tensor = tensors.setdefault(spec.name, ShardedTensor(spec.name, spec.dtype, spec.shape))
    if tensor.dtype != spec.dtype or len(tensor.shape) != len(spec.shape):
        raise ValueError(f"{spec.name} is {spec.dtype} here and {tensor.dtype} in another file")
    tensor.shape = tuple(max(old, offset + size) for old, offset, size in zip(tensor.shape, offsets, spec.shape))
    tensor.blocks.append(Block(offsets, spec.shape, file, place.offset, spec.size))


def _first_hole(found: Sharded) -> str:
    for tensor in found.tensors.values():
        try:
            _check_fills(tensor, found.folder)
        except ArtifactError as error:
            return f": {error.message.rstrip('.')}"
    return ""


def _check_fills(tensor: ShardedTensor, folder: Path) -> None:
    blocks = [block for block in tensor.blocks if block.count]
    for block in blocks:
        if len(block.offsets) != len(tensor.shape) or any(
            offset + size > extent for offset, size, extent in zip(block.offsets, block.sizes, tensor.shape, strict=True)
        ):  # fmt: skip
            raise _error("shard-overlap", f"{_span(block)} in {block.file} lies outside of {tensor.name}, which is {list(tensor.shape)}.", folder)  # fmt: skip
    cut = [axis for axis in range(len(tensor.shape)) if any(b.sizes[axis] != tensor.shape[axis] for b in blocks)]
    if len(cut) > 1:
        _check_grid(tensor, blocks, folder)
        return
    if not cut:
        _check_whole(tensor, blocks, folder)
        return
    axis, position = cut[0], 0
    last: Block | None = None
    for block in sorted(blocks, key=lambda block: block.offsets[axis]):
        begin = block.offsets[axis]
        if begin > position:
            raise _hole(tensor, axis, position, begin, folder)
        if begin < position:
            assert last is not None
            raise _error("shard-overlap", f"{_span(block)} of {tensor.name} in {block.file} overlaps {_span(last)} in {last.file}: files of two saves are mixed.", folder)  # fmt: skip
        position, last = begin + block.sizes[axis], block
    if position < tensor.shape[axis]:
        raise _hole(tensor, axis, position, tensor.shape[axis], folder)


def _check_whole(tensor: ShardedTensor, blocks: Sequence[Block], folder: Path) -> None:
    whole: int = math.prod(tensor.shape)
    if not blocks and whole:
        raise _error("shard-hole", f"all of {tensor.name} {list(tensor.shape)} lies in no file.", folder)
    if len(blocks) > 1:
        raise _error("shard-overlap", f"all of {tensor.name} is in {blocks[0].file} and in {blocks[1].file}: files of two saves are mixed.", folder)  # fmt: skip


def _check_grid(tensor: ShardedTensor, blocks: Sequence[Block], folder: Path) -> None:
    """Blocks cut along several dimensions: none may meet another, and together they must have every element."""
    for one, other in itertools.combinations(blocks, 2):
        if all(a < b + n and b < a + m for a, m, b, n in zip(one.offsets, one.sizes, other.offsets, other.sizes)):
            raise _error("shard-overlap", f"{_span(other)} of {tensor.name} in {other.file} overlaps {_span(one)} in {one.file}: files of two saves are mixed.", folder)  # fmt: skip
    whole: int = math.prod(tensor.shape)
    if sum(block.count for block in blocks) == whole:
        return
    edges = [sorted({0, *(b.offsets[d] for b in blocks), *(b.offsets[d] + b.sizes[d] for b in blocks)}) for d in range(len(tensor.shape))]  # fmt: skip
    for corner in itertools.product(*(range(len(edge)) for edge in edges)):
        low = tuple(edge[i] for edge, i in zip(edges, corner))
        if any(at >= extent for at, extent in zip(low, tensor.shape)):
            continue
        if not any(all(o <= at < o + s for at, o, s in zip(low, b.offsets, b.sizes)) for b in blocks):
            high = [edge[i + 1] if i + 1 < len(edge) else extent for edge, i, extent in zip(edges, corner, tensor.shape)]  # fmt: skip
            raise _error("shard-hole", f"{_range(low, high)} of {tensor.name} {list(tensor.shape)} lies in no file.", folder)  # fmt: skip


def _hole(tensor: ShardedTensor, axis: int, begin: int, end: int, folder: Path) -> ArtifactError:
    low = [begin if dimension == axis else 0 for dimension in range(len(tensor.shape))]
    high = [end if dimension == axis else extent for dimension, extent in enumerate(tensor.shape)]
    return _error("shard-hole", f"{_range(low, high)} of {tensor.name} {list(tensor.shape)} lies in no file.", folder)


def _error(code: str, message: str, folder: Path) -> ArtifactError:
    return ArtifactError(message, code=code, where=str(folder), remedy=AGAIN)


def _span(block: Block) -> str:
    return _range(block.offsets, [o + s for o, s in zip(block.offsets, block.sizes)])


def _range(low: Iterable[int], high: Iterable[int]) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(low, high)) + "]"


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"cannot be trusted: {why.rstrip('.')}.", code="sharded-damaged", where=str(path), remedy=AGAIN)  # fmt: skip


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name in it is no text")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    """A torch.Size or a tuple of numbers; ValueError for anything else."""
    if isinstance(value, Call) and value.name == "torch.Size":
        value = value.args[0]
    if not isinstance(value, tuple | list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError("an offset or a size in it is no number")
    return tuple(value)
