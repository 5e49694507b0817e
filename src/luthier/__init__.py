"""Luthier fine-tunes language models and proves that what was trained can be opened, resumed and served.

Importing this imports nothing heavy: names are loaded when they are first used.
"""

from __future__ import annotations

from luthier.errors import ArtifactError, LuthierError, RequestError, Stopped

TYPE_CHECKING = False  # typing takes longer to import than this package; type checkers know the name
if TYPE_CHECKING:
    from typing import Any

    from luthier.api import combine, describe, export, load, mend, push, resume, save, train
    from luthier.checkpoint.checkpoints import Checkpoints
    from luthier.config.schema import RunConfig

__version__ = "0.1.0"

_HOMES = {
    "combine": "luthier.api",
    "load": "luthier.api",
    "save": "luthier.api",
    "train": "luthier.api",
    "resume": "luthier.api",
    "mend": "luthier.api",
    "push": "luthier.api",
    "describe": "luthier.api",
    "export": "luthier.export",
    "Checkpoints": "luthier.checkpoint.checkpoints",
    "RunConfig": "luthier.config.schema",
}

__all__ = ["ArtifactError", "Checkpoints", "LuthierError", "RequestError", "RunConfig", "Stopped", "combine", "describe", "export", "load", "mend", "push", "resume", "save", "train"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    from importlib import import_module

    home = import_module(_HOMES[name])
    return home if name == "export" else getattr(home, name)  # that package is the function, too
