"""The names inside a run's folder: which checkpoints it has, and where each lies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FAILED_PROOF = "proof-failed.json"  # beside run.yaml, where a run's result was not what was trained
_STAGE = re.compile(r"(\d+)-.+")
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Found:
    """A published checkpoint."""

    step: int
    path: Path


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def published(run: Path) -> list[Found]:
    """All checkpoints under their names, oldest first; whether they are whole is not looked at."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((Found(int(match[1]), path) for match, path in found if match), key=lambda item: item.step)


def stages_of(run: Path) -> list[Path]:
    """The folders of the stages inside the output of a run file with several, in their order; empty for any other run."""
    if (run / "checkpoints").exists() or not (run / "run.yaml").is_file():
        return []
    found = [(_STAGE.fullmatch(path.name), path) for path in run.iterdir() if (path / "run.yaml").is_file()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]
