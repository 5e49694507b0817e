"""Runs on quantised bases, cut back and resumed by whole processes on this machine's accelerator: which end in the same bits?

    PYTHONPATH=tests:tests/robustness python benchmarks/quantised_resume.py WORK [--forms nf4 int8 fp8] [--states 32bit 8bit]

Each run trains LoRA on a small Llama for 6 steps by `luthier train`, evaluates and saves at every step, and is proven. Copies of it that were cut
back to steps 1 and 4 are resumed by `luthier resume`, and weights, optimiser, counters and measurements compared. (The tests do this on a CPU in
forked processes, which CUDA does not allow.) Prints one line of JSON a run; ends with 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from harness import assert_same_run, by_command, cut_back, make_setup
from tiny import make_llama

STEPS = 6


def run(home: Path, form: str, states: str) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "model.precision": form, "model.dropout": 0.0, "data.eval": 0.2, "evaluate.every": 1, "train.steps": STEPS,
        "checkpoint.every": 1, "checkpoint.keep": STEPS, "adapter.r": 64,
    }  # fmt: skip
    if states != "32bit":
        changes["optim.states"] = states
    setup = make_setup(home, changes=changes)
    make_llama(home / "base", hidden=64)
    done = by_command(setup, "train", str(setup.run_file))
    told: dict[str, Any] = {"form": form, "states": states, "code": done.code}
    if done.code:
        return told | {"says": done.text[-600:]}
    told["proof"] = json.loads((setup.run / "final/proof.json").read_text())["says"]
    for step in (1, 4):
        copy = cut_back(setup.run, step, home / f"from-{step}")
        resumed = by_command(setup, "resume", str(copy))
        try:
            assert resumed.code == 0, resumed.text[-600:]
            assert_same_run(copy, setup.run, step=STEPS)
        except AssertionError as error:
            told[f"from {step}"] = str(error)[:600]
        else:
            told[f"from {step}"] = "equal bits"
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--forms", nargs="+", default=["nf4", "int8", "fp8"])
    parser.add_argument("--states", nargs="+", default=["32bit", "8bit"])
    options = parser.parse_args()
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", flush=True)
    found = []
    for states in options.states:
        for form in options.forms:
            found.append(run(options.work.resolve() / f"{form}-{states}", form, states))
            print(json.dumps(found[-1]), flush=True)
    sys.exit(not all(one.get("from 1") == one.get("from 4") == "equal bits" for one in found))


if __name__ == "__main__":
    main()
