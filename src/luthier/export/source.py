"""Where an export's tensors come from: a folder's files, read by byte range and never as a whole.

A source says which tensors it has and fills memory with any stretch of one. safetensors are read in place; torch's own
files are read as data, with their storages mapped where the file's form allows.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from luthier.artifacts.files import forget_cached, inside, open_binary
from luthier.artifacts.tensorfile import BITS, Place, TensorSpec, check_length, read_header, read_into
from luthier.checkpoint.dtypes import FROM_FILE, TO_FILE, bytes_of, spec_of
from luthier.errors import ArtifactError
from luthier.models.pickles import read_nested, read_pickle


class Source:
    """The tensors of one folder, in the order of their files.

    Attributes:
        file_of: the name of the file that each tensor lies in.
        metadata: what the files' headers say beside their tensors.
        nested: the key under which a torch file held its tensors.
    """

    def __init__(self, folder: Path, specs: dict[str, TensorSpec]) -> None:
        self.folder = folder
        self.specs = specs
        self.file_of: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self.nested: str | None = None

    def place(self, name: str) -> Place | None:
        """Where a tensor's bytes lie, if they lie in one stretch of a file."""
        return None

    def read(self, name: str, start: int, target: torch.Tensor) -> None:
        """Fill the flat tensor ``target``, of the stored dtype, with elements ``[start, start + numel)``."""
        raise NotImplementedError

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are the same bytes in the same place, known without reading them."""
        return False

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor in memory."""
        spec = self.specs[name]
        flat = torch.empty(_count(spec), dtype=FROM_FILE[spec.dtype])
        self.read(name, 0, flat)
        return flat.reshape(spec.shape)

    def close(self) -> None:
        """Let go of the files."""


class SafetensorsSource(Source):
    def __init__(self, folder: Path, files: list[Path]) -> None:
        self._places: dict[str, tuple[Path, Place]] = {}
        metadata: dict[str, str] = {}
        for path in files:
            check_length(path)
            places, told, _ = read_header(path)
            metadata |= told
            for name, place in places.items():
                if name in self._places:
                    raise _twice(name, self._places[name][0].name, path.name, folder)
                if place.spec.dtype not in FROM_FILE:
                    raise ArtifactError(f"{name} has dtype {place.spec.dtype}, which cannot be exported.", code="dtype", where=str(path))  # fmt: skip
                self._places[name] = (path, place)
        super().__init__(folder, {name: place.spec for name, (_, place) in self._places.items()})
        self.file_of = {name: path.name for name, (path, _) in self._places.items()}
        self.metadata = metadata
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def place(self, name: str) -> Place | None:
        return self._places[name][1]

    def read(self, name: str, start: int, target: torch.Tensor) -> None:
        path, place = self._places[name]
        width = BITS[place.spec.dtype] // 8
        if target.numel():
            view = bytes_of(target)
            read_into(self._open(path), view, place.offset + start * width, path)

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = open_binary(path, os.O_RDONLY)
            return self._descriptors[path]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            forget_cached(descriptor)
            os.close(descriptor)
        self._descriptors.clear()


class MemorySource(Source):
    """Tensors at hand."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        strange = next((name for name, tensor in tensors.items() if tensor.dtype not in TO_FILE), None)
        if strange is not None:
            raise ArtifactError(f"{strange} has dtype {tensors[strange].dtype}, which cannot be exported.", code="dtype", where=str(folder))  # fmt: skip
        super().__init__(folder, {name: spec_of(name, tensor) for name, tensor in tensors.items()})
        self._tensors = tensors

    def read(self, name: str, start: int, target: torch.Tensor) -> None:
        target.copy_(self._tensors[name].contiguous().reshape(-1)[start : start + target.numel()])

    def same(self, one: str, other: str) -> bool:
        a, b = self._tensors[one], self._tensors[other]
        return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


class PickleSource(MemorySource):
    """torch's own files, read as data: bytes are mapped, and read where they are used.

    With ``nested``, tensors may lie under a key such as ``state_dict``.
    """

    def __init__(self, folder: Path, files: list[Path], *, nested: bool = False) -> None:
        tensors: dict[str, torch.Tensor] = {}
        file_of: dict[str, str] = {}
        nest = None
        for path in files:
            found, key = read_nested(path) if nested else (read_pickle(path), None)
            nest = key or nest
            again = next((name for name in found if name in tensors), None)
            if again is not None:
                raise _twice(again, file_of[again], path.name, folder)
            tensors |= found
            file_of |= dict.fromkeys(found, path.name)
        super().__init__(folder, tensors)
        self.file_of, self.nested = file_of, nest


def _twice(name: str, one: str, other: str, folder: Path) -> ArtifactError:
    return ArtifactError(f"tensor {name} is in two files, {one} and {other}.", code="twice", where=str(folder), remedy="Move away the files that belong to another save.")  # fmt: skip


@contextmanager
def open_source(folder: Path, stem: str = "model") -> Iterator[Source]:
    """Open the weights of a transformers folder (``model``) or of an adapter's (``adapter_model``).

    Raises:
        ArtifactError: no weights are there, a shard is missing, or a file is broken.
    """
    source = _open(folder, stem)
    try:
        yield source
    finally:
        source.close()


def _open(folder: Path, stem: str) -> Source:
    files = _files(folder, stem, "safetensors")
    if files:
        return SafetensorsSource(folder, files)
    files = _files(folder, {"model": "pytorch_model"}.get(stem, stem), "bin")
    if files:
        return PickleSource(folder, files)
    raise ArtifactError(f"no {stem}*.safetensors here, and no .bin file of theirs.", code="no-weights", where=str(folder))  # fmt: skip


def _files(folder: Path, stem: str, ending: str) -> list[Path]:
    index = folder / f"{stem}.{ending}.index.json"
    if not index.is_file():
        single = folder / f"{stem}.{ending}"
        return [single] if single.is_file() else []
    files = [inside(folder, name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ArtifactError(f"{', '.join(missing)} is missing, which the index names.", code="file-missing", where=str(folder), remedy="Get the file again.")  # fmt: skip
    return files


def _count(spec: TensorSpec) -> int:
    return spec.size * 8 // BITS[spec.dtype]
