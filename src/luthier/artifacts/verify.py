"""What ``luthier verify`` does: read everything back, of one folder or of a whole run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import readable_size
from luthier.artifacts.manifest import Problem
from luthier.artifacts.run_folder import published
from luthier.errors import ArtifactError, RequestError


@dataclass(frozen=True)
class Verified:
    """One folder that was read back."""

    path: Path
    files: int
    size: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Outcome:
    """All folders that were read back."""

    folders: tuple[Verified, ...]

    @property
    def whole(self) -> bool:
        return not any(folder.problems for folder in self.folders)

    def as_dict(self) -> dict[str, Any]:
        return {
            "whole": self.whole,
            "folders": [
                {"path": str(f.path), "files": f.files, "bytes": f.size, "problems": [p.as_dict() for p in f.problems]}
                for f in self.folders
            ],
        }

    def __str__(self) -> str:
        lines = []
        for folder in self.folders:
            if folder.problems:
                lines += [f"{folder.path}: BROKEN", *(f"  {p.message} {p.remedy} [{p.code}]" for p in folder.problems)]
            else:
                lines.append(f"{folder.path}: whole, {folder.files} files, {readable_size(folder.size)} read back")
        return "\n".join(lines)


def verify_all(path: str | Path) -> Outcome:
    """Read a folder of ours back against its manifest; of a run: its base, every checkpoint, and the final folder.

    Raises:
        RequestError: there is nothing.
        ArtifactError: the run has saved nothing yet.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise RequestError("there is nothing here.", code="no-such-path", where=str(path), remedy="Check the path.")
    if path.is_file():
        raise RequestError(
            "this is a file; what verify reads back is a folder of Luthier's with its luthier.json.",
            code="not-ours",
            where=str(path),
            remedy="`luthier inspect` checks what a file alone can tell.",
        )
    if not (path / "run.yaml").is_file():
        return Outcome((_verify(path),))
    folders = [path / "base", *(found.path for found in published(path)), path / "final"]
    there = [folder for folder in folders if folder.is_dir()]
    if not there:
        raise ArtifactError("this run has saved nothing yet.", code="nothing-saved", where=str(path), remedy="Train first: luthier resume on this folder.")  # fmt: skip
    return Outcome(tuple(_verify(folder) for folder in there))


def _verify(folder: Path) -> Verified:
    manifests.forget(folder)
    manifest, problems = manifests.verify(folder)
    files, size = (len(manifest.files), manifest.size) if manifest else (0, 0)
    return Verified(folder, files, size, tuple(problems))
