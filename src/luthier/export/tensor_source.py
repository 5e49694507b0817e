"""Reading the tensors of a folder or file one at a time: safetensors, or PyTorch files without executing a pickle's code."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from luthier.artifacts.files import inside
from luthier.artifacts.tensorfile import BITS, TensorSpec, check_length, read_header
from luthier.errors import ArtifactError

WORDS = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
    torch.uint32: "U32", torch.float32: "F32", torch.int64: "I64", torch.uint64: "U64", torch.float64: "F64",
}  # fmt: skip
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(safetensors|bin)")
PICKLES = (".bin", ".pt", ".pth")
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler", "random_states")
_NESTS = ("state_dict", "model_state_dict", "model", "module")


@dataclass(frozen=True)
class Item:
    """A tensor that can be read when it is needed; ``storage`` is equal for tensors that share their bytes."""

    spec: TensorSpec
    load: Callable[[], torch.Tensor]
    storage: Any = None

    def named(self, name: str) -> Item:
        return replace(self, spec=TensorSpec(name, self.spec.dtype, self.spec.shape))


@dataclass
class Source:
    """The tensors of a folder by the names its files give them, and what else its files say."""

    items: dict[str, Item] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    index: Path | None = None
    file_of: dict[str, str] = field(default_factory=dict)
    nested: str | None = None

    @property
    def pickled(self) -> bool:
        return any(path.suffix in PICKLES for path in self.files)


def of_tensor(name: str, tensor: torch.Tensor) -> Item:
    """An item for a tensor in memory."""
    return Item(TensorSpec(name, WORDS[tensor.dtype], tuple(tensor.shape)), lambda: tensor)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder: safetensors where there are any, else PyTorch's; an adapter's before a model's."""
    for suffixes in ((".safetensors",), PICKLES):
        found = sorted(
            path
            for path in folder.iterdir()
            if path.suffix in suffixes and path.is_file() and not path.name.startswith(_NOT_WEIGHTS)
        )
        adapters = [path for path in found if path.name.startswith("adapter_model")]
        if found:
            return adapters or found
    return []


def read_source(path: Path) -> Source:
    """Find the tensors of a folder or of one file; no tensor of a safetensors file is read.

    Raises:
        ArtifactError: a file is broken or missing, a pickle holds more than tensors, or two files hold one tensor.
    """
    source = Source(files=[path] if path.is_file() else weight_files(path))
    _check_shards(path, source.files)
    for file in source.files:
        for name, item in (_pickled(file, source) if file.suffix in PICKLES else _safe(file, source)).items():
            if name in source.items:
                raise ArtifactError(f"{source.file_of[name]} and {file.name} both hold {name}.", code="names-clash", where=str(path), remedy="Move away the files that belong to another save.")  # fmt: skip
            source.items[name] = item
            source.file_of[name] = file.name
    if path.is_dir() and source.files:
        kind = "bin" if source.pickled else "safetensors"
        stems = {match["stem"] if (match := SHARD.fullmatch(file.name)) else file.stem for file in source.files}
        found = [index for stem in sorted(stems) if (index := path / f"{stem}.{kind}.index.json").is_file()]
        source.index = found[0] if found else None
        _check_index(path, source)
    return source


def _check_shards(path: Path, files: Iterable[Path]) -> None:
    groups: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := SHARD.fullmatch(file.name):
            groups.setdefault((match["stem"], int(match["count"])), set()).add(int(match["number"]))
    if path.is_file():
        return
    if len(groups) > 1:
        raise ArtifactError(f"shards of {len(groups)} different saves lie here: " + ", ".join(f"{stem} of {count}" for stem, count in sorted(groups)) + ".", code="names-clash", where=str(path), remedy="Move away those that belong to another save.")  # fmt: skip
    for (stem, count), numbers in groups.items():
        missing = sorted(set(range(1, count + 1)) - numbers)
        if missing:
            raise ArtifactError(f"shard {missing[0]} of {count} of {stem} is missing, and nothing can rebuild its tensors.", code="file-missing", where=str(path), remedy="Get that file again.")  # fmt: skip


def _check_index(path: Path, source: Source) -> None:
    """What an index promises must be in some file, whatever it says about which."""
    for name in sorted(indexed(source.index)):
        if name not in source.items:
            raise ArtifactError(f"{name}, which {source.index.name if source.index else 'the index'} lists, is in no file.", code="tensor-missing", where=str(path), remedy="Get the files again; nothing can rebuild a tensor.")  # fmt: skip


def indexed(index: Path | None) -> dict[str, str]:
    """An index's weight map; empty where there is no index, or none that can be read."""
    if index is None:
        return {}
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        listed = dict(content["weight_map"])
    except (ValueError, KeyError, TypeError):
        return {}
    for file in set(listed.values()):
        inside(index.parent, str(file))
    return listed


def _safe(file: Path, source: Source) -> dict[str, Item]:
    check_length(file)
    places, metadata, _ = read_header(file)
    source.metadata |= metadata
    unknown = next((place.spec for place in places.values() if place.spec.dtype not in BITS), None)
    if unknown is not None:
        raise ArtifactError(f"{unknown.name} is of dtype {unknown.dtype}, which this version does not know.", code="broken-file", where=str(file), remedy="Upgrade luthier, or cast that tensor.")  # fmt: skip

    def reader(name: str) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)

        return load

    return {name: Item(place.spec, reader(name)) for name, place in places.items()}


def _pickled(file: Path, source: Source) -> dict[str, Item]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, KeyError) as error:
        why = " ".join(str(error).split())[:160]
        raise ArtifactError(f"cannot be read as plain tensors, and code in a pickle is never run ({why}).", code="unsafe-pickle", where=str(file), remedy="Save its state dict alone, or as safetensors, with the program that wrote it.") from None  # fmt: skip
    while isinstance(content, dict):
        nest = next((key for key in _NESTS if isinstance(content.get(key), dict)), None)
        if nest is None:
            break
        source.nested, content = nest, content[nest]
    strange = [name for name, value in content.items() if not isinstance(value, torch.Tensor)] if isinstance(content, dict) else ["(not a dictionary)"]  # fmt: skip
    if strange:
        raise ArtifactError(f"holds more than tensors: {', '.join(map(str, strange[:4]))}.", code="not-tensors", where=str(file), remedy="Save the model's state dict alone.")  # fmt: skip
    return {str(name): _of_loaded(str(name), tensor) for name, tensor in content.items()}


def _of_loaded(name: str, tensor: torch.Tensor) -> Item:
    storage = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    return replace(of_tensor(name, tensor.detach()), storage=storage)
