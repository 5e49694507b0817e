"""The proof of a merge or a copy that no memory here can hold: every tensor on slices, a merged one against peft's own layer.

It shows less than logits do (nothing of the architecture, nothing of what lies between the slices) and says so; every byte
of the files is read back against its digest besides.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from luthier.errors import ArtifactError
from luthier.export.proof import slice_prober
from luthier.export.proof.prove import MARGIN, Proof

ROWS = 16  # of each of four blocks a tensor
STEPS = 1.0
"""Roundings of its dtype that an element may be off; sums in another order fall on the other side of a half."""


def prove_slices(merged: Path, base: Path, adapter: Path | None) -> Proof:
    """Compare on slices, in a process without luthier.

    Args:
        merged: what was written.
        base: what it was made from; with ``adapter``, a LoRA, merged into it.

    Raises:
        ArtifactError: a folder does not open there.
    """
    return judged(_asked(merged, base, adapter), adapter is not None)


def judged(told: dict[str, Any], with_adapter: bool) -> Proof:
    """The verdict on what was counted."""
    layers: dict[str, dict[str, Any]] = told["layers"]
    wrong = sorted(
        name for name, one in layers.items() if one["farthest"] > STEPS or one["off"] > one["elements"] / 100
    )
    wrong += [name for name in told["different"]]
    farthest = max((one["farthest"] for one in layers.values()), default=0.0)
    changed = sum(one["changed"] for one in layers.values())
    off = sum(one["off"] for one in layers.values())
    compared = (
        f"{len(layers)} adapted layers with peft's, and {told['equal']} slices of other tensors bit for bit; {told['elements']:,} numbers, "
        f"up to four blocks of {ROWS} rows a tensor; not the logits, for which this machine has no memory"
    )
    if wrong:
        rest = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        says = f"{', '.join(wrong[:3])}{rest}: other numbers than {'base and adapter give in peft' if with_adapter else 'the source holds'}."
        return Proof("failed", False, farthest, STEPS, None, compared, says, (says,))
    if told["not_covered"]:
        left = told["not_covered"]
        rest = f" and {len(left) - 3} more" if len(left) > 3 else ""
        says = f"too large for this machine's memory, and slices of {', '.join(left[:3])}{rest} have no counterpart to be compared with."
        return Proof("inconclusive", False, farthest, STEPS, None, compared, says)
    if not with_adapter:
        return Proof("passed", True, 0.0, 0.0, None, compared, "every tensor holds the source's numbers, on slices: the model is too large for this machine's memory.")  # fmt: skip
    effect = changed / max(1, off)
    if not changed or changed < MARGIN * off:
        says = f"merging changed {changed:,} of the compared numbers and {off:,} are one rounding off, so this would not tell the merged model from its base."
        return Proof("inconclusive", False, farthest, STEPS, effect, compared, says)
    says = (
        f"every tensor is what peft makes of base and adapter, on slices: the model is too large for this machine's memory. Merging changed "
        f"{changed:,} of the compared numbers; {off:,} are one rounding off."
    )
    return Proof("passed", True, farthest, STEPS, effect, compared, says)


def _asked(merged: Path, base: Path, adapter: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answer.json"
        folders = {"merged": merged, "base": base, "adapter": adapter}
        request = {name: None if folder is None else str(folder.resolve()) for name, folder in folders.items()}
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps({**request, "rows": ROWS, "threads": torch.get_num_threads(), "out": str(out)}))
        command = [sys.executable, "-P", str(slice_prober.__file__), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=scratch)
        if done.returncode != 0:
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
            raise ArtifactError(
                f"plain libraries cannot read it: {last[0] if last else f'exit code {done.returncode}'}",
                code="does-not-open",
                where=str(merged),
                remedy="Run again with --debug for that process's whole output.",
            ) from RuntimeError(done.stderr)
        told: dict[str, Any] = json.loads(out.read_text())
    if told["luthier"]:
        raise ArtifactError("the proving process had luthier loaded, so it proves nothing.", code="proof", where=str(merged))  # fmt: skip
    return told
