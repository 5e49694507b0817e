"""A sharded checkpoint whose `.metadata` is a pickle with code. torch's own reader and converter run it."""

from __future__ import annotations

import pickle
from pathlib import Path

from common import Payload


def build(folder: Path, marker: Path) -> Path:
    import torch
    import torch.distributed.checkpoint as dcp

    folder.mkdir(parents=True, exist_ok=True)
    dcp.save({"model": {"model.norm.weight": torch.ones(4)}}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    path = folder / ".metadata"
    content = pickle.loads(path.read_bytes())
    content.planner_data["payload"] = Payload(marker)
    path.write_bytes(pickle.dumps(content))
    return path


if __name__ == "__main__":
    from common import run

    run(build)
