"""Which base an adapter belongs on: the one it names, one that lies next to it, or the one given; and whether it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from luthier.artifacts import fingerprint
from luthier.artifacts import manifest as manifests
from luthier.artifacts.tensorfile import read_header
from luthier.errors import ArtifactError, RequestError
from luthier.models.adapter_names import holdable
from luthier.models.check_folder import read_json
from luthier.models.source import BaseSource

_QUANTISED = re.compile(r"(-unsloth)?-bnb-(4|8)bit$", re.IGNORECASE)
FINGERPRINT = "luthier.base"


def adapters_in(folder: Path) -> dict[str, Path]:
    """The adapters that lie in sub-folders, by the names they get in memory; ``default`` first, then by name."""
    found = {holdable(file.parent.name): file.parent for file in folder.glob("*/adapter_config.json")}
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "default", name))}


def base_name(folder: Path, *, named: str | None, own: Path | None) -> tuple[str, list[str]]:
    """The base of the adapter in a folder, and what was decided on the way.

    Args:
        named: what the adapter's manifest says, else its config is asked.
        own: the ``base/`` of the run that the adapter belongs to, if that is there.

    Raises:
        RequestError: the adapter names none, or one that is not there, and none lies next to it.
    """
    name = named or read_json(folder / "adapter_config.json").get("base_model_name_or_path") or ""
    if own is not None and not Path(name).exists():
        return str(own), []
    if name and not Path(name).is_absolute():
        plain = _QUANTISED.sub("", name)
        note = (
            f"The adapter was trained on the quantised mirror {name}; base={plain!r} puts it on the unquantised model."
        )
        return name, [note] if plain != name else []
    if name and Path(name).exists():
        return name, []
    nearby = _nearby(folder, Path(name).name)
    if nearby is not None:
        return str(nearby), [
            f"The base it names, {name or 'none'}, is not there; {nearby}, next to the adapter, is taken."
        ]
    raise RequestError(
        f"the base this adapter names, {name}, is not there." if name else "this adapter names no base.",
        code="base-missing",
        where=str(folder),
        remedy="Give it: luthier.load(path, base=…), or --base on the command line.",
    )


def check_base(folder: Path, home: Path, source: BaseSource, *, insisted: bool) -> list[str]:
    """Compare a base with the one whose fingerprint lies with the adapter: in its manifest, else in its file.

    Args:
        home: where the adapter's manifest is, if there is one.

    Returns:
        A note where they differ and the base was insisted on.

    Raises:
        ArtifactError: they differ.
    """
    expected = expected_base(folder, home)
    if expected is None or source.path is None or _fingerprint(source.path) in (None, expected):
        return []
    if insisted:
        return [f"{source.name} is not the base this adapter was trained on: its weights differ. It was insisted on."]
    raise ArtifactError(
        f"the base at {source.name} is not the one this adapter was trained on: its weights differ.",
        code="other-base",
        where=str(folder),
        remedy="Give the right one with base=…; giving any base by hand insists on it.",
    )


def expected_base(folder: Path, home: Path) -> str | None:
    """The fingerprint of the base an adapter was trained on, if it says."""
    if (home / manifests.NAME).is_file():
        found: Any = manifests.read(home).facts.get("base", {}).get("fingerprint")
        if found:
            return str(found)
    weights = folder / "adapter_model.safetensors"
    return read_header(weights)[1].get(FINGERPRINT) if weights.is_file() else None


def _fingerprint(path: Path) -> str | None:
    if path.is_file():
        return fingerprint.of_file(path)
    return fingerprint.of_folder(path) if any(path.glob("*.safetensors")) else None


def _nearby(folder: Path, name: str) -> Path | None:
    """A base beside the adapter or above it: the only one whose fingerprint is right or, where none is known, whose name is."""
    expected = expected_base(folder, folder)
    around = [folder.parent, *sorted(folder.parent.iterdir()), *sorted(folder.parent.parent.iterdir())]
    bases = {each.resolve() for each in around if _is_base(each)}
    if expected is not None:
        fitting = [base for base in bases if _fingerprint(base) == expected]
    else:
        fitting = [base for base in bases if base.name == name]
    return fitting[0] if len(fitting) == 1 else None


def _is_base(folder: Path) -> bool:
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return False
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
