"""A callback for run files: notes when the first step has ended, what the proof took, and how fast memory copies.

Everything goes into ``RUN.clock.json`` beside the run's folder.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def note(event: Any) -> None:
    """The first step's end, and at the end the processor time of child processes: the proof's."""
    if event.kind == "step" and event.step == 1:
        _add(event.run, first_step_at=time.time(), first_step_cpu=time.process_time())
    elif event.kind == "end":
        times = os.times()
        _add(event.run, proof_cpu=times.children_user + times.children_system)


def copy(event: Any) -> None:
    """After each checkpoint, and in the same process: copy as many bytes, in tensors of the same sizes, into memory used before."""
    if event.kind != "checkpoint":
        return
    import torch
    from safetensors import safe_open

    sizes = []
    for file in event.path.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            sizes += [opened.get_tensor(name).numel() for name in opened.keys()]  # noqa: SIM118 - no mapping
    source, target = ([torch.ones(size) for size in sizes] for _ in range(2))
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        for left, right in zip(target, source, strict=True):
            left.copy_(right)
        seconds.append(time.perf_counter() - begun)
    _add(event.run, **{f"copy_{event.step}": sorted(seconds)[1]})


def _add(run: Path, **values: float) -> None:
    path = run.with_name(f"{run.name}.clock.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}))
