"""What lies in a folder, looked at once: its entries by kind, its JSON files, and the headers of its weight files.

Everything else that tells what a folder is and what is wrong with it asks this. No weights are read, each header is
read once, and nothing that could run code or wait for ever (a pickle, a pipe, a device) is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.artifacts.files import inside
from luthier.artifacts.json_file import read_object
from luthier.artifacts.manifest import Problem
from luthier.artifacts.tensorfile import Place, read_header
from luthier.errors import ArtifactError

ADAPTER_CONFIG, CONFIG = "adapter_config.json", "config.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.(?P<ending>safetensors|bin)")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What other tools put beside weights in pickles: never weights, never opened.
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|.*optim_states|recipe_state)\.(bin|pt|pth|pkl)")  # fmt: skip
_ZIP, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_OLD_PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True)
class Header:
    """A tensor file's header; `expected` is the size in bytes that it gives the file, `actual` the file's."""

    places: Mapping[str, Place]
    metadata: Mapping[str, str]
    expected: int
    actual: int


@dataclass
class Contents:
    """A folder's entries, and what its small files and headers say; `problems` grows as they are read."""

    path: Path
    files: dict[str, int] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    _json: dict[str, dict[str, Any]] = field(default_factory=dict)
    _headers: dict[str, Header | None] = field(default_factory=dict)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's object; empty where there is no such file, or it is broken, which is noted."""
        if name not in self._json:
            self._json[name] = {}
            if name in self.files:
                try:
                    self._json[name] = read_object(self.path / name, unique=name.endswith(".index.json"))
                except ArtifactError as error:
                    self.problems.append(Problem(error.code, f"{name} {error.message}", error.remedy))
        return self._json[name]

    def header(self, name: str) -> Header | None:
        """A safetensors file's header, read once; None where it is broken, which is noted."""
        if name not in self._headers:
            self._headers[name] = None
            path = self.path / name
            try:
                places, metadata, expected = read_header(path)
                self._headers[name] = Header(places, metadata, expected, self.files[name])
            except ArtifactError as error:
                self.problems.append(Problem(error.code, f"{name}: {error.message}", error.remedy))
        return self._headers[name]

    @cached_property
    def indices(self) -> dict[str, dict[str, str]]:
        """Index file to its map from tensor to file; broken ones are noted and left out."""
        found = {}
        for name in sorted(self.files):
            if name.endswith((".safetensors.index.json", ".bin.index.json")):
                weight_map = self._weight_map(name)
                if weight_map:
                    found[name] = weight_map
        return found

    def _weight_map(self, name: str) -> dict[str, str]:
        before = len(self.problems)
        value = self.json(name).get("weight_map")
        if len(self.problems) > before:
            return {}
        again = "Get the file again, or write it anew: luthier mend SRC DST."
        if not isinstance(value, dict) or not value or not all(isinstance(file, str) for file in value.values()):
            self.problems.append(Problem("broken-index", f"{name} has no map from tensors to files.", again))
            return {}
        for file in sorted(set(value.values())):
            try:
                inside(self.path, file)
            except ArtifactError as error:
                self.problems.append(Problem(error.code, f"{name} {error.message}", error.remedy))
                return {}
        return value

    @cached_property
    def safetensors(self) -> list[str]:
        """The safetensors files that make up what lies here: the index's, else one set's; not other forms beside it."""
        for name in sorted(self.indices, reverse=True):  # model. before adapter_model., whose folder has a config
            if name.endswith(".safetensors.index.json"):
                return sorted({file for file in self.indices[name].values() if file in self.files})
        names = sorted(name for name in self.files if name.endswith(".safetensors"))
        for single in ("adapter_model.safetensors", "model.safetensors"):
            if single in names:
                return [single]
        shards = [name for name in names if SHARD.fullmatch(name)]
        return shards or names

    @cached_property
    def model_safetensors(self) -> list[str]:
        """Safetensors files of whole models, by their names' form, where an adapter may lie beside them."""
        return [n for n in sorted(self.files) if n.endswith(".safetensors") and not n.startswith("adapter_")]

    @cached_property
    def pickles(self) -> list[str]:
        """Files that torch.save wrote, by their first bytes, without the ones that hold no weights."""
        named = sorted(n for n in self.files if n.endswith(PICKLES) and not NO_WEIGHTS.fullmatch(n))
        return [name for name in named if is_torch_file(self.path / name) or self.is_pointer(name)]

    def is_pointer(self, name: str) -> bool:
        """Whether a file is what git leaves in place of one that it did not fetch."""
        return self.files.get(name, 1 << 20) < 1024 and first_bytes(self.path / name, 24).startswith(b"version https://git-lfs")  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, Place]]:
        """Every tensor of `safetensors`, with its file."""
        for file in self.safetensors:
            header = self.header(file)
            if header is not None:
                yield from ((file, place) for place in header.places.values())


def look(path: Path) -> Contents:
    """List a folder. Links that lead out of it are noted and not followed.

    Raises:
        ArtifactError: the folder cannot be read.
    """
    contents = Contents(path)
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise ArtifactError(f"cannot be listed: {error.strerror}.", code="unreadable", where=str(path)) from None
    for entry in entries:
        try:
            if entry.is_symlink():
                inside(path, entry.name)
            if entry.is_dir():
                contents.folders.add(entry.name)
            elif entry.is_file():
                contents.files[entry.name] = entry.stat().st_size
            elif entry.name.endswith((".safetensors", ".json", *PICKLES)):
                contents.problems.append(Problem("unreadable", f"{entry.name} is no regular file.", "Put the file itself there."))  # fmt: skip
        except ArtifactError as error:
            contents.problems.append(Problem(error.code, f"{entry.name} {error.message}", error.remedy))
        except OSError as error:
            contents.problems.append(Problem("unreadable", f"{entry.name} cannot be read: {error.strerror}.", "Put the file itself there."))  # fmt: skip
    contents.problems += [
        Problem("unreadable", f"{name} is a folder, not a file.", "Put the file itself there.")
        for name in sorted(contents.folders)
        if name.endswith((".safetensors", ".json"))
    ]
    return contents


def first_bytes(path: Path, count: int) -> bytes:
    """The beginning of a regular file; nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError:
        return b""


def is_torch_file(path: Path) -> bool:
    """Whether torch.save wrote a file: its zip archive begins with data.pkl; the old form with torch's own number."""
    start = first_bytes(path, 512)
    return start.startswith(_OLD_PICKLE) or (start.startswith(_ZIP) and b"data.pkl" in start)


def is_cut(path: Path) -> bool:
    """Whether a zip archive of torch.save lacks its end."""
    if not first_bytes(path, 4).startswith(_ZIP):
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 65_600))
        return _ZIP_END not in file.read()
