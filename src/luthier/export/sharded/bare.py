"""Writing bare weights (a sharded checkpoint, a state dict) as a transformers folder, checked against the architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from luthier.artifacts.manifest import Manifest
from luthier.export import exported_folder as folders
from luthier.export.architecture import check_architecture
from luthier.export.read_back import check_written
from luthier.export.sharded.source import Weights, base_folder, open_bare
from luthier.export.stream import write_stream
from luthier.export.unfinished import unfinished


def export_bare(
    weights: Weights, out: Path, *, base: Path | None, dtype: str | None, shard_bytes: int, read_back: bool = True
) -> tuple[str, list[str]]:
    """Write, read back, check and publish the folder; returns the class that opens it, and what is to be said.

    Args:
        base: the folder with config, tokenizer and processor; where None, the one the weights or their training name.

    Raises:
        RequestError: no base is known, or ``out`` exists.
        ArtifactError: the weights are not whole, or are not what the config says.
    """
    opens = ""

    def check(folder: Path, manifest: Manifest) -> str:
        nonlocal opens
        said = check_written(folder, manifest) if read_back else "not read back"
        opens = check_architecture(folder, weights.path)
        return said

    said = stream_bare(weights, out, base=base, dtype=dtype, shard_bytes=shard_bytes, check=check)
    return opens, said


def stream_bare(
    weights: Weights,
    out: Path,
    *,
    base: Path | None,
    dtype: str | None,
    shard_bytes: int,
    check: Callable[[Path, Manifest], str] | None = None,
) -> list[str]:
    """Write and publish the folder in the memory of a few stretches; returns what is to be said.

    Args:
        check: is given the folder before it has its name, returns a sentence, and raises where something is wrong.

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
            parents = [{"kind": weights.kind, "name": str(weights.path.resolve())}]
            folders.publish_folder(partial, out, written.manifest, {"parents": parents}, config=plan.config, late={})
    return [*plan.notes, *said]
