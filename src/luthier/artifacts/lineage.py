"""What an artefact was made from, as far as manifests tell: a tree of parents."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.artifacts import manifest as manifests
from luthier.errors import ArtifactError

DEEPEST = 16
MOST = 200


@dataclass
class Ancestor:
    """One artefact of a lineage; `note` says why its own parents are not followed, where it has some."""

    kind: str
    name: str
    fingerprint: str | None
    parents: list[Ancestor] = field(default_factory=list)
    note: str = ""


def lineage(parents: list[dict[str, Any]], home: Path) -> list[Ancestor]:
    """The parents with theirs, followed through every folder of ours that is still where it was.

    Args:
        home: the folder whose parents these are; relative paths start there, and meeting it again ends a circle.
    """
    return _Walk().follow(parents, home, {_key(home)})


class _Walk:
    def __init__(self) -> None:
        self.left = MOST

    def follow(self, parents: list[dict[str, Any]], home: Path, above: set[str]) -> list[Ancestor]:
        found = []
        for parent in parents:
            if self.left <= 0:
                break
            self.left -= 1
            found.append(self._one(parent, home, above))
        return found

    def _one(self, parent: dict[str, Any], home: Path, above: set[str]) -> Ancestor:
        name = parent.get("path") or parent.get("name") or ""
        ancestor = Ancestor(str(parent.get("kind") or "artefact"), str(parent.get("name") or name), parent.get("fingerprint"))  # fmt: skip
        try:
            folder = next((f for f in (home / name, home / name / "final") if (f / manifests.NAME).is_file()), None)
            if not name or folder is None:
                return ancestor
            key = _key(folder)
            if key in above:
                ancestor.note = "itself again"
                return ancestor
            if len(above) > DEEPEST:
                ancestor.note = "and further"
                return ancestor
            facts = manifests.read(folder).facts
        except (ArtifactError, OSError, ValueError) as error:
            ancestor.note = "its manifest is damaged" if isinstance(error, ArtifactError) else "cannot be read"
            return ancestor
        now = facts.get("fingerprint")
        if ancestor.fingerprint and now and now != ancestor.fingerprint:
            ancestor.note = "something else lies there now"
            return ancestor
        ancestor.parents = self.follow(facts.get("parents", []), folder, above | {key})
        return ancestor


def _key(folder: Path) -> str:
    return str(folder.resolve())
