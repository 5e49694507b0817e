"""Where a base model comes from: a folder, a GGUF file, or the hub; decided without reading any weight.

What looks like a path is never sent to the hub, so a mistyped folder name costs no network request and its error
speaks of folders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.config.schema import ModelConfig, three_words
from luthier.errors import RequestError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9_][\w.\-]*)?")
_WEIGHT_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class BaseSource:
    """Where a base lies, and what an adapter trained on it should call it.

    Attributes:
        kind: `folder` (transformers format), `hub` (a repository, cached by huggingface_hub) or `gguf` (one file).
        path: the folder or file on this machine; for the hub, the snapshot folder once it is known, else None.
        name: a hub id, or the absolute path.
        revision: the commit of a hub repository once it is known, else the revision asked for; None for files.
    """

    kind: Literal["folder", "hub", "gguf"]
    path: Path | None
    name: str
    revision: str | None = None


def find_source(model: ModelConfig) -> BaseSource:
    """Tells a folder, a GGUF file and a hub id apart; raises RequestError for what is none of them."""
    path = Path(model.path).expanduser()
    if path.is_dir():
        return _in_folder(path.resolve())
    if path.is_file():
        return _file(path.resolve())
    if not _HUB_ID.fullmatch(model.path) or path.suffix in _WEIGHT_FILES:
        raise RequestError(
            f"there is no file or folder {path}.",
            code="no-such-model",
            where="model.path",
            remedy="Give a folder in transformers format, a .gguf file, or a hub id such as owner/name." + _near(path),
        )
    return BaseSource("hub", None, model.path, model.revision)


def _in_folder(folder: Path) -> BaseSource:
    if (folder / "config.json").is_file():
        return BaseSource("folder", folder, str(folder))
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _file(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs[:6])
        raise RequestError(
            f"{folder} holds {len(ggufs)} GGUF files ({names}).",
            code="which-gguf",
            where="model.path",
            remedy="Name the one to open, with its file name.",
        )
    if (folder / "adapter_config.json").is_file():
        raise RequestError(
            f"{folder} is an adapter, not a base model: it has an adapter_config.json and no config.json.",
            code="adapter-as-base",
            where="model.path",
            remedy=f"Name the base model it was trained on (base_model_name_or_path in that file). {three_words(str(folder))}",
        )
    raise RequestError(
        f"{folder} has no config.json, so it is not a model in transformers format.",
        code="not-a-model",
        where="model.path",
        remedy="Give the folder that holds config.json and the *.safetensors files, or a .gguf file." + _inside(folder),
    )


def _file(path: Path) -> BaseSource:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return BaseSource("gguf", path, str(path))
    if path.suffix == ".gguf":
        raise RequestError(
            f"{path} does not begin with GGUF's signature, so it is not a GGUF file.",
            code="not-gguf",
            where="model.path",
            remedy="Fetch the file again; a few kilobytes of text are usually a download page or a Git LFS pointer.",
        )
    raise RequestError(
        f"{path} is a single file that is no GGUF.",
        code="not-a-model",
        where="model.path",
        remedy=f"Give the folder that holds it, {path.parent}, if that has a config.json.",
    )


def _near(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return ""
    others = sorted(entry.name for entry in parent.iterdir() if (entry / "config.json").is_file())
    return f" Models in {parent}: {', '.join(others[:6])}." if others else ""


def _inside(folder: Path) -> str:
    inner = sorted(str(file.parent) for file in folder.glob("*/config.json"))
    return f" There is a config.json in {inner[0]}." if inner else ""
