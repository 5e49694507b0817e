"""What a run folder says about itself, read once for the page and the model card; whatever is missing stays empty."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from luthier.errors import ArtifactError
from luthier.report.metrics import read_metrics

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The files of a run folder, parsed. See docs/architecture.md for the records of ``metrics.jsonl``."""

    run: Path
    config: Mapping[str, Any]
    """run.yaml."""
    records: list[Record]
    """metrics.jsonl."""
    facts: Mapping[str, Any]
    """facts.json: ``summary``, ``model``, ``data``, ``device``, ``versions``, ``total_steps``, ``parents``."""
    proof: Mapping[str, Any]
    """final/proof.json: ``passed``, ``verdict``, ``max_difference``, ``bound``, ``compared``, ``says``."""
    parents: list[Mapping[str, Any]]
    """What the run was made from: ``kind``, ``name``, ``fingerprint``."""
    finished: bool
    """Whether there is a final folder."""

    def of(self, kind: str) -> list[Record]:
        """Return the records of one kind, in order."""
        return [record for record in self.records if record.get("kind") == kind]

    @cached_property
    def steps(self) -> list[Record]:
        return self.of("train")

    @cached_property
    def base_evaluation(self) -> Record | None:
        """The base model's measurement before the first step."""
        return next((record for record in self.of("eval") if record.get("base")), None)

    @cached_property
    def evaluations(self) -> list[Record]:
        """Measurements of the model as trained."""
        return [record for record in self.of("eval") if not record.get("base")]

    @cached_property
    def best_evaluation(self) -> Record | None:
        measured = [record for record in self.evaluations if record.get("eval_loss") is not None]
        return min(measured, key=lambda record: record["eval_loss"], default=None)

    @property
    def name(self) -> str:
        return self.run.resolve().name

    @property
    def base(self) -> str:
        """The base model as the run file names it."""
        return str(self.setting("model.path") or "")

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def total_steps(self) -> int | None:
        return self.facts.get("total_steps")

    @cached_property
    def seconds(self) -> float:
        """Time from the first record to the last, without the pauses in which no process was at work."""
        times = [record["time"] for record in self.records if record.get("time") is not None]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times) if later > earlier]
        if not gaps:
            return 0.0
        pause = max(600.0, 50 * statistics.median(gaps))
        return sum(gap for gap in gaps if gap < pause)

    def setting(self, key: str) -> Any:
        """Return the value of a dotted key of run.yaml, or None."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(part)
        return value


def read_run_files(run: Path, final: Path | None = None) -> RunFiles:
    """Read what there is in a run folder.

    Args:
        final: where the final folder's files lie while it has not yet got its name; ``run/final`` if left out.

    Raises ArtifactError naming the file when one cannot be parsed.
    """
    run = Path(run)
    metrics = run / "metrics.jsonl"
    final = final or run / "final"
    facts = _json(run / "facts.json")
    parents = _json(final / "luthier.json").get("parents") or facts.get("parents")
    return RunFiles(
        run=run,
        config=_yaml(run / "run.yaml"),
        records=read_metrics(metrics) if metrics.exists() else [],
        facts=facts,
        proof=_json(final / "proof.json"),
        parents=[parent for parent in parents if isinstance(parent, Mapping)] if isinstance(parents, list) else [],
        finished=(run / "final").is_dir(),
    )


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    return _mapping(path, content or {})


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise _unreadable(path, error) from error
    return _mapping(path, content)


def _mapping(path: Path, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise _unreadable(path, f"a mapping was expected, found {type(content).__name__}")
    return content


def _unreadable(path: Path, reason: object) -> ArtifactError:
    return ArtifactError(
        f"the file cannot be read ({reason}).",
        code="run-file-broken",
        where=str(path),
        remedy="Put the file of that run back, or remove it: it is only missed in the report.",
    )
