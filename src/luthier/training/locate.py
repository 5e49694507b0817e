"""What a path means: a run's final folder, its newest or best checkpoint, or the artefact that lies there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from luthier.artifacts import identify as artifacts
from luthier.artifacts import manifest as manifests
from luthier.artifacts.run_folder import folder_of
from luthier.checkpoint.retain import newest_whole
from luthier.errors import RequestError
from luthier.training.finish import best_checkpoint


@dataclass(frozen=True)
class Location:
    """An artefact that a path, a RUN, or RUN@best means, and the run it belongs to."""

    path: Path
    kind: str
    run: Path | None = None


def locate(path: str | os.PathLike[str]) -> Location:
    """Find what a path means: a RUN its ``final/``, else its newest whole checkpoint; RUN@best, RUN@newest.

    Raises:
        RequestError: nothing is there, or nothing was saved yet.
        ArtifactError: it is not whole.
    """
    text = os.fspath(path)
    name, _, wanted = text.rpartition("@") if text.endswith(("@best", "@newest", "@final")) else (text, "", "")
    artifact = artifacts.identify(name)
    if artifact.kind == "run":
        return _in_run(artifact.path, wanted)
    if wanted:
        raise RequestError(f"@{wanted} belongs behind a run's folder, and this is of kind {artifact.kind}.", code="not-a-run", where=name)  # fmt: skip
    if not artifact.whole and artifact.kind in ("checkpoint", "adapter", "base", "merged"):
        serious = [problem for problem in artifact.problems if problem.code != "base-missing"]
        manifests.raise_problems(artifact.path, serious)
    run = next((p for p in (artifact.path.parent, artifact.path.parent.parent) if (p / "run.yaml").is_file()), None)
    return Location(artifact.path, artifact.kind, run)


def _in_run(run: Path, wanted: str) -> Location:
    if wanted == "best":
        found = best_checkpoint(run)
        if found is None:
            raise RequestError("no kept checkpoint of this run was evaluated.", code="no-best", where=str(run), remedy="Set checkpoint.best: eval_loss and data.eval before training.")  # fmt: skip
        return Location(folder_of(run, found.step), "checkpoint", run)
    final = run / "final"
    if wanted != "newest" and final.is_dir():
        return Location(final, artifacts.identify(final).kind, run)
    newest = newest_whole(run, lambda text: None)
    if newest is None:
        raise RequestError("this run has saved nothing yet.", code="nothing-saved", where=str(run), remedy="Train first: luthier resume on this folder.")  # fmt: skip
    return Location(newest[0].path, "checkpoint", run)
