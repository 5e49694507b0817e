"""Weights in torch's own files, read as data: nothing in them is run, and what would need running is refused by name."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from luthier.errors import ArtifactError, RequestError

_GLOBAL = re.compile(r"GLOBAL\s+([A-Za-z_][\w.]*)")  # torch names builtins without their module

_REASON = re.compile(r"WeightsUnpickler error:\s*")
_NESTS = ("state_dict", "model_state_dict", "model", "module")


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch file, mapped from disk where its form allows, by name.

    Raises:
        RequestError: the file wants more than tensors; it names what it wants.
        ArtifactError: the file is cut off, damaged, or holds no tensors by name.
    """
    return _tensors(_load(path), path)


def read_nested(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """The same of a file whose tensors lie under a key such as ``state_dict``; that key comes second, None if there is none.

    What lies beside the key is left alone. Raises: as `read_pickle`.
    """
    content, nest = _load(path), None
    while isinstance(content, dict):
        key = next((key for key in _NESTS if isinstance(content.get(key), dict)), None)
        if key is None:
            break
        nest, content = key, content[key]
    return _tensors(content, path), nest


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = _GLOBAL.search(str(error))
        if wanted is None:
            raise _damaged(path, error) from error
        raise RequestError(
            f"{path} is more than tensors: it wants to call {wanted.group(1)}, and opening it so would run code.",
            code="pickle-code",
            where=str(path),
            remedy="If you trust where it came from, load it there and save the tensors alone, as safetensors.",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(path, error) from error


def _tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ArtifactError(
            "holds no plain set of tensors by name.",
            code="no-tensors",
            where=str(path),
            remedy="Save the model's or the adapter's state dict alone.",
        )
    return {str(name): tensor.detach() for name, tensor in content.items()}


def _damaged(path: Path, error: Exception) -> ArtifactError:
    said = _REASON.split(str(error))[-1]  # what comes before it advises to load the file by running it
    said = " ".join(said.partition("Check the documentation")[0].split())[:200]
    return ArtifactError(f"cannot be read: {said}", code="unreadable", where=str(path), remedy="Get the file again.")
