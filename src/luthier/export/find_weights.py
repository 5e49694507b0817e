"""Finding the tensors of a folder that may be damaged, or of one file, for mending.

An export trusts an index and refuses what contradicts it (`source.open_source`). Mending takes whatever weights lie
there, under any name, and tells what the index says besides; how they are then read and written is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from luthier.artifacts.files import inside
from luthier.errors import ArtifactError
from luthier.export.source import MemorySource, PickleSource, SafetensorsSource, Source

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(safetensors|bin)")
PICKLES = (".bin", ".pt", ".pth")
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler", "random_states")


@dataclass
class Found:
    """The tensors of a folder by the names its files give them, the files, and their index if there is one."""

    source: Source
    files: list[Path]
    index: Path | None = None

    @property
    def pickled(self) -> bool:
        return any(path.suffix in PICKLES for path in self.files)


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


def find_weights(path: Path) -> Found:
    """Find the tensors of a folder or of one file; the caller closes the source.

    Raises:
        RequestError: a pickle wants more than tensors.
        ArtifactError: a file is broken or missing, or two files hold one tensor.
    """
    folder, files = (path.parent, [path]) if path.is_file() else (path, weight_files(path))
    if path.is_dir():
        _check_shards(path, files)
    if not files:
        return Found(MemorySource(folder, {}), files)
    pickled = files[0].suffix in PICKLES
    found = Found(PickleSource(folder, files, nested=True) if pickled else SafetensorsSource(folder, files), files)
    if path.is_dir():
        kind = "bin" if pickled else "safetensors"
        stems = {match["stem"] if (match := SHARD.fullmatch(file.name)) else file.stem for file in files}
        there = [index for stem in sorted(stems) if (index := path / f"{stem}.{kind}.index.json").is_file()]
        found.index = there[0] if there else None
        _check_index(path, found)
    return found


def _check_shards(path: Path, files: Iterable[Path]) -> None:
    groups: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := SHARD.fullmatch(file.name):
            groups.setdefault((match["stem"], int(match["count"])), set()).add(int(match["number"]))
    if len(groups) > 1:
        raise ArtifactError(f"shards of {len(groups)} different saves lie here: " + ", ".join(f"{stem} of {count}" for stem, count in sorted(groups)) + ".", code="twice", where=str(path), remedy="Move away those that belong to another save.")  # fmt: skip
    for (stem, count), numbers in groups.items():
        missing = sorted(set(range(1, count + 1)) - numbers)
        if missing:
            raise ArtifactError(f"shard {missing[0]} of {count} of {stem} is missing, and nothing can rebuild its tensors.", code="file-missing", where=str(path), remedy="Get that file again.")  # fmt: skip


def _check_index(path: Path, found: Found) -> None:
    """What an index promises must be in some file, whatever it says about which."""
    for name in sorted(indexed(found.index)):
        if name not in found.source.specs:
            raise ArtifactError(f"{name}, which {found.index.name if found.index else 'the index'} lists, is in no file.", code="tensor-missing", where=str(path), remedy="Get the files again; nothing can rebuild a tensor.")  # fmt: skip


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
