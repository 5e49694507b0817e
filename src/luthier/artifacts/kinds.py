"""The kinds of artefact, and what in a folder or file makes it one. Never the path's own name."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from luthier.artifacts import manifest as manifests
from luthier.artifacts.contents import ADAPTER_CONFIG, CONFIG, Contents, first_bytes, is_torch_file
from luthier.artifacts.names import is_adapters

SHARDED_BY_TORCH = "DCP_SHARDING_INFO"  # what torch's checkpoint writer puts into safetensors files of one rank
_CHECKPOINT_N = re.compile(r"checkpoint-(\d+)")


def kind_of_file(path: Path) -> str:
    """``gguf``, ``safetensors``, ``state_dict`` or ``unknown``, by the first bytes."""
    start = first_bytes(path, 16)
    if start.startswith(b"GGUF"):
        return "gguf"
    if is_torch_file(path):
        return "state_dict"
    return "safetensors" if start[8:9] == b"{" else "unknown"


def kind_of_folder(contents: Contents) -> str:
    """The kind of a folder; ``merged`` is told later, from the manifest's parents."""
    files, folders = contents.files, contents.folders
    if "run.yaml" in files:
        return "run"
    if "trainer" in folders and folders & {"adapter", "model"}:
        return "checkpoint"
    if "trainer_state.json" in files:
        return "trainer_checkpoint"
    if _is_sharded_by_torch(contents):
        return "distcp"
    if ADAPTER_CONFIG in files:
        return "adapter" if has_adapter_weights(contents) or not has_model_weights(contents) else "base"
    if has_adapter_weights(contents) or (has_model_weights(contents) and holds_only_an_adapter(contents)):
        return "adapter"
    if manifests.NAME in files and (CONFIG in files or not _ggufs(files)):
        return "base"
    if CONFIG in files and (has_model_weights(contents) or not _inner(contents)):
        return "base"
    if trainer_checkpoints(contents):
        return "trainer_checkpoint"
    if adapters_in_folders(contents):
        return "adapter"
    if contents.pickles or contents.safetensors:
        return "state_dict"
    if "checkpoints" in folders:
        return "run"
    return "gguf" if _ggufs(files) else "unknown"


def _ggufs(files: Collection[str]) -> list[str]:
    return [name for name in files if name.endswith(".gguf")]


def has_adapter_weights(contents: Contents) -> bool:
    """Whether there are weights under the names that peft gives an adapter's."""
    return any(name.startswith("adapter_model") and name.endswith((".safetensors", ".bin")) for name in contents.files)


def has_model_weights(contents: Contents) -> bool:
    """Whether there are weights that are not an adapter's by their file's name."""
    return bool(contents.model_safetensors or [n for n in contents.pickles if not n.startswith("adapter_")])


def holds_only_an_adapter(contents: Contents) -> bool:
    """Whether the tensors in weights without a config are an adapter's, one and all."""
    names = [place.spec.name for _, place in contents.tensors()] if CONFIG not in contents.files else []
    return bool(names) and all(is_adapters(name) for name in names)


def adapters_in_folders(contents: Contents) -> list[str]:
    """Names of sub-folders that are adapters: a peft model with several is saved so."""
    return sorted(name for name in contents.folders if (contents.path / name / ADAPTER_CONFIG).is_file())


def trainer_checkpoints(contents: Contents) -> list[str]:
    """Sub-folders that transformers' Trainer wrote as checkpoints, oldest first."""
    found = [(int(match[1]), name) for name in contents.folders if (match := _CHECKPOINT_N.fullmatch(name))]
    return [name for _, name in sorted(found) if (contents.path / name / "trainer_state.json").is_file()]


def _inner(contents: Contents) -> list[str]:
    return trainer_checkpoints(contents) or adapters_in_folders(contents)


def _is_sharded_by_torch(contents: Contents) -> bool:
    if any(name.endswith(".distcp") for name in contents.files):
        return True
    if not contents.safetensors:
        return False
    header = contents.header(contents.safetensors[0])
    return header is not None and SHARDED_BY_TORCH in header.metadata
