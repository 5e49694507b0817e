"""Writing bare weights (a sharded checkpoint, a state dict) as a transformers folder, checked against the architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.artifacts.manifest import Manifest
from luthier.export import exported_folder as folders
from luthier.export.architecture import check_architecture
from luthier.export.read_back import check_written
from luthier.export.sharded.proof import prove_converted
from luthier.export.sharded.source import Plan, Weights, base_folder, open_bare
from luthier.export.stream import write_stream
from luthier.export.unfinished import unfinished


def export_bare(
    weights: Weights, out: Path, *, base: Path | None, dtype: str | None, shard_bytes: int, prove: bool = True
) -> tuple[str, list[str]]:
    """Write, check, prove and publish the folder; returns the class that opens it, and what is to be said.

    Args:
        base: the folder with config, tokenizer and processor; where None, the one the weights or their training name.
        prove: read it back, and let plain libraries open it beside the checkpoint.

    Raises:
        RequestError: no base is known, or ``out`` exists.
        ArtifactError: the weights are not whole, or are not what the config says, or the proof failed.
    """
    opens = ""

    def check(folder: Path, manifest: Manifest) -> str:
        nonlocal opens
        said = check_written(folder, manifest) if prove else "not read back"
        opens = check_architecture(folder, weights.path)
        return said

    def proven(plan: Plan, folder: Path) -> bytes:
        return prove_converted(weights, plan, folder)

    options: dict[str, Any] = {"base": base, "dtype": dtype, "shard_bytes": shard_bytes}
    said = stream_bare(weights, out, **options, check=check, prove=proven if prove else None)
    return opens, said


def stream_bare(
    weights: Weights,
    out: Path,
    *,
    base: Path | None,
    dtype: str | None,
    shard_bytes: int,
    check: Callable[[Path, Manifest], str] | None = None,
    prove: Callable[[Plan, Path], bytes] | None = None,
) -> list[str]:
    """Write and publish the folder in the memory of a few stretches; returns what is to be said.

    Args:
        check: is given the folder before it has its name, returns a sentence, and raises where something is wrong.
        prove: is given the plan and the folder then, and returns ``proof.json``.

    Raises: as `export_bare`.
    """
    folders.check_target(out, [weights.home if weights.path.is_dir() else weights.path, base_folder(weights, base)])
    said: list[str] = []
    with open_bare(weights, base, dtype) as plan:
        options = ["transformers", dtype, shard_bytes]
        with unfinished(out, [weights.path, weights.home, plan.base], options, said.append) as (partial, journal):
            written = write_stream(
                partial, plan.outputs, plan.small, stem="model", kind="model", metadata={"format": "pt"},
                shard_bytes=shard_bytes, journal=journal,
            )  # fmt: skip
            if check is not None:
                said.append(check(partial, written.manifest))
            late = {"proof.json": prove(plan, partial)} if prove is not None else {}
            parents = [{"kind": weights.kind, "name": str(weights.path.resolve())}]
            folders.publish_folder(partial, out, written.manifest, {"parents": parents}, config=plan.config, late=late)
    return [*plan.notes, *said]
