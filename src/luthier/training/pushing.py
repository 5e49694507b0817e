"""``push`` of the run file: what can be known to be wrong before the first step, and the upload after the proof."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from luthier.artifacts.machine_paths import is_path, snapshot
from luthier.config.schema import RunConfig
from luthier.errors import LuthierError
from luthier.export.push.outbound import named_by_path
from luthier.export.push.push import command, push
from luthier.export.push.upload import check_login, default_endpoint
from luthier.report.metrics import MetricsLog
from luthier.report.page import write_report

Say = Callable[[str], None]


def check(config: RunConfig) -> list[str]:
    """Notes on what would stop the upload after the training and can still be mended until then.

    Raises:
        RequestError: the upload would be refused for certain: the base under the adapter has no name on the hub.
    """
    wanted = config.push
    if wanted is None:
        return []
    base = config.model.path
    if config.adapter is not None and base and wanted.base is None and is_path(base) and snapshot(base) is None:
        raise named_by_path(base, "push.base", "push: {id: …, base: OWNER/NAME}")
    notes = []
    if (
        config.adapter is not None
        and wanted.base is None
        and (config.model.new_tokens or config.adapter.then == "merge")
    ):
        notes.append("push: the adapter will rest on this run's own base/, which has to be on the hub for anybody to open the adapter. Push that folder after the training, then the adapter with --base, or set push.base to the name it will have.")  # fmt: skip
    try:
        check_login(wanted.id, default_endpoint())
    except LuthierError as error:
        notes.append(f"push: {error.message} {error.remedy} Training goes on; without it the result stays here.")
    return notes


def how(config: RunConfig, final: Path) -> str:
    """The command that pushes a final folder as the run file says."""
    wanted = config.push
    assert wanted is not None
    return command(final, wanted.id, private=wanted.private, revision=wanted.revision, base=wanted.base)


def push_final(config: RunConfig, run: Path, step: int, say: Say) -> None:
    """Upload the proven final folder where the run file asks for it; whatever goes wrong is said and costs nothing else."""
    wanted = config.push
    if wanted is None:
        return
    final = run / "final"
    try:
        made = push(final, wanted.id, private=wanted.private, revision=wanted.revision, base=wanted.base, say=say)
        _note(run, step, f"pushed: {made}".replace("\n", "; "), say)
    except KeyboardInterrupt:
        _note(run, step, f"the push was interrupted; the result is in {final}. Go on with: {how(config, final)}", say)
    except Exception as error:  # the run is done and proven: nothing that an upload does may change that
        why = " ".join(str(error).split())
        _note(run, step, f"not pushed: {why} The result is in {final}. Push it with: {how(config, final)}", say)


def _note(run: Path, step: int, message: str, say: Say) -> None:
    """Say it, and keep it in the metrics and on the page."""
    say(message)
    try:
        log = MetricsLog(run / "metrics.jsonl")
        try:
            log.append({"kind": "note", "step": step, "time": time.time(), "message": message})
        finally:
            log.close()
        write_report(run)
    except Exception as error:  # said already; a full disk must not fail a run that is done
        say(f"report.html could not be written: {error}")
