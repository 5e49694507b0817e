"""Opening a base for `luthier.load`: room is looked for first, and a folder without a tokenizer opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from luthier.config.schema import ModelConfig, Precision
from luthier.models.check_folder import pickle_files, read_json, weight_files
from luthier.models.open import Base, Vocabulary, open_base
from luthier.models.precision import resolve_precision
from luthier.models.room import check_room, free_bytes, parameters_in

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")  # fmt: skip
_COMPARED = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class Opening:
    """How something is opened, and who is told what should be known."""

    precision: Precision | None
    device: str
    trust_remote_code: bool
    tell: Callable[[str], None]
    revision: str | None = None
    keep_16bit: tuple[str, ...] = ()
    fp8: Literal["compute", "storage"] = "compute"


def load_base(name: str, how: Opening, *, own_layers: bool = False) -> Base:
    """Open a base by folder, file or hub id.

    Args:
        own_layers: as `open_base` takes it.

    Raises: as ``luthier.models.open.open_base``, and RequestError where it does not fit on the device.
    """
    model = ModelConfig(
        path=name, revision=how.revision, precision=how.precision, trust_remote_code=how.trust_remote_code,
        keep_16bit=list(how.keep_16bit), fp8=how.fp8,
    )  # fmt: skip
    folder, vocabulary = Path(name).expanduser(), None
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        if not read_json(folder / "config.json").get("quantization_config") and not pickle_files(folder):
            parameters = parameters_in(file for file in weight_files(folder) if file.is_file())
            check_room(parameters, resolve_precision(model, how.device), how.device, free_bytes(how.device))
        if not any((folder / file).is_file() for file in _TOKENIZERS):
            vocabulary = Vocabulary(None, (), ())
    base = open_base(model, device=how.device, vocabulary=vocabulary, own_layers=own_layers)
    for note in base.notes:
        how.tell(note)
    return base


def differing_versions(made_with: Mapping[str, str]) -> list[str]:
    """A note for each library whose major or minor version is another than an artefact was made with."""
    notes = []
    for name in _COMPARED:
        try:
            here = version(name)
        except PackageNotFoundError:
            continue
        there = made_with.get(name)
        if there and there.split(".")[:2] != here.split(".")[:2]:
            notes.append(f"This was made with {name} {there}; here is {here}.")
    return notes
