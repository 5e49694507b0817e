"""The proof of a converted checkpoint: torch's own reader and transformers give the same model, bit for bit.

No plain library opens such a checkpoint as a model. But torch reads its tensors and transformers takes them, so a process
without luthier makes the model both ways, from the checkpoint and from the folder, and compares every tensor and the logits.
torch unpickles ``.metadata`` freely; it gets there only after ours has read the same bytes as values and found nothing but
the types that describe tensors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts.sharded import METADATA
from luthier.export.find_weights import find_weights
from luthier.export.proof.exports import checked, main_dtype, probe_ids
from luthier.export.proof.prove import Proof
from luthier.export.sharded import prober
from luthier.export.sharded.source import Plan, Weights
from luthier.models.room import free_bytes

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_COPIES = 3  # the tensors as read, the model made of them, and what loading holds for a moment


def prove_converted(weights: Weights, plan: Plan, folder: Path) -> bytes:
    """``proof.json`` of a folder that was made from a sharded checkpoint or a state dict.

    Raises:
        ArtifactError: a tensor or the logits differ.
    """
    free, needed = free_bytes("cpu"), _COPIES * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if free is not None and needed > free:
        return _open_question(f"the model needs {needed / 2**30:.1f} GiB to be opened both ways, and {free / 2**30:.1f} are free, so it was not; every tensor of the architecture is there, and was read back.")  # fmt: skip
    dtype = _DTYPES[main_dtype(folder)]
    request: dict[str, Any] = {
        "folder": str(folder.resolve()), "source": str(weights.path.resolve()), "dtype": dtype, "ids": probe_ids(folder),
        "names": {output.spec.name: output.name for output in plan.outputs}, "threads": torch.get_num_threads(),
        **_reader(weights),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request))
        command = [sys.executable, "-P", str(prober.__file__), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    if done.returncode:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:]
        return _open_question(f"torch's own reader and transformers did not make a model of it here ({last[0][:300] if last else done.returncode}); every tensor of the architecture is there, and was read back.")  # fmt: skip
    return checked(_verdict(json.loads(done.stdout.strip().splitlines()[-1]), len(request["ids"]), dtype), folder)


def _reader(weights: Weights) -> dict[str, Any]:
    if weights.kind == "distcp":
        form = "distcp" if (weights.path / METADATA).is_file() else "safetensors"
        return {"reader": form, "nested": None, "files": []}
    found = find_weights(weights.path)
    found.source.close()
    return {"reader": "torch", "nested": found.source.nested, "files": [str(path.resolve()) for path in found.files]}


def _verdict(told: dict[str, Any], prompts: int, dtype: str) -> Proof:
    compared = f"{told['tensors']} tensors, and logits of {prompts} prompts, with the model that torch's own reader and transformers make of the checkpoint, both in {dtype}; cpu"
    if told["luthier"]:
        says = "the proving process had luthier loaded, so it proves nothing."
        return Proof("failed", False, told["apart"], 0.0, None, compared, says, (says,))
    if told["different"] or told["apart"] != 0:
        names = ", ".join(told["different"][:3]) or "no tensor, but the logits"
        says = f"{len(told['different'])} tensors differ from what torch reads ({names}); logits differ by up to {told['apart']:.3g}."
        return Proof("failed", False, told["apart"], 0.0, None, compared, says, (says,))
    if not told["finite"]:
        says = "equal bits, but the checkpoint's model answers with numbers that are not finite; its training diverged."
        return Proof("inconclusive", False, 0.0, 0.0, None, compared, says)
    return Proof("passed", True, 0.0, 0.0, None, compared, "opened by plain libraries, equal bits in every tensor and in the logits.")  # fmt: skip


def _open_question(says: str) -> bytes:
    return Proof("inconclusive", False, 0.0, 0.0, None, "nothing", says).to_bytes()
