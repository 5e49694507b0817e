"""Writing bare weights (a sharded checkpoint, a state dict) as a transformers folder, checked against the architecture."""

from __future__ import annotations

import shutil
from pathlib import Path

from luthier.artifacts import publish
from luthier.export import exported_folder as folders
from luthier.export.architecture import check_architecture
from luthier.export.sharded_source import Weights, base_folder, open_bare
from luthier.export.stream import write_stream


def export_bare(
    weights: Weights, out: Path, *, base: Path | None, dtype: str | None, shard_bytes: int
) -> tuple[str, list[str]]:
    """Write and publish the folder; returns the class that opens it, and what is to be said.

    Raises:
        RequestError: no base is known, or ``out`` exists.
        ArtifactError: the weights are not whole, or are not what the config says.
    """
    folders.check_target(out, [weights.home, base_folder(weights, base)])
    with open_bare(weights, base, dtype) as plan:
        partial = publish.begin(out)
        try:
            written = write_stream(partial, plan.outputs, plan.small, stem="model", kind="model", metadata={"format": "pt"}, shard_bytes=shard_bytes)  # fmt: skip
            opens = check_architecture(partial, weights.path)
            parents = [{"kind": weights.kind, "name": str(weights.path.resolve())}]
            folders.publish_folder(partial, out, written.manifest, {"parents": parents}, config=plan.config, late={})
        finally:
            if partial.exists():
                shutil.rmtree(partial)
    return opens, plan.notes
