"""Tiny stages: a first adapter on a tiny model, and run files that start from it."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny import make_llama

import luthier
from luthier.training import finish

WORDS = ["order", "lamp", "red", "blue", "help", "late", "paid", "lost", "ship", "box", "morning", "sea", "violin"]


def write_data(path: Path, samples: int = 24) -> Path:
    chosen = random.Random(5)
    with open(path, "w") as file:
        for _ in range(samples):
            said = [" ".join(chosen.choices(WORDS, k=chosen.randint(2, 7))) for _ in range(2)]
            roles = zip(("user", "assistant"), said, strict=True)
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}) + "\n")
    return path


class Home:
    """A folder with a base and data; runs are made in it."""

    def __init__(self, folder: Path, **model: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        make_llama(folder / "base", **model)
        write_data(folder / "data.jsonl")
        self.said: list[str] = []

    def file(self, output: str, **more: Any) -> dict[str, Any]:
        config: dict[str, Any] = {
            "model": {"path": str(self.folder / "base")},
            "data": {"train": str(self.folder / "data.jsonl")},
            "adapter": {"type": "lora", "r": 4, "dropout": 0.1},
            "optim": {"lr": 0.01},
            "train": {"steps": 6, "batch_samples": 4, "max_length": 96},
            "checkpoint": {"every": 1, "keep": 20},
            "output": str(self.folder / output),
        }
        for key, value in more.items():
            config[key] = {**config[key], **value} if key in ("train", "optim", "checkpoint") else value
        return {key: value for key, value in config.items() if value is not None}

    def train(self, output: str, *, prove: bool = False, **more: Any) -> Path:
        """Train to the end; without `prove` the proof's own process is spared, and final/ is made all the same."""
        self.said.clear()
        with contextlib.nullcontext() if prove else unproven():
            luthier.train(self.file(output, **more), say=self.said.append)
        return self.folder / output

    def resume(self, run: Path, *overrides: str) -> None:
        self.said.clear()
        with unproven():
            luthier.resume(run, list(overrides), say=self.said.append)

    def said_text(self) -> str:
        return "\n".join(self.said)

    def stage(self, output: str, start: str, then: str, *, prove: bool = False, adapter: dict[str, Any] | None = None, **more: Any) -> Path:  # fmt: skip
        """Train a stage from another run of this home, its base left to it."""
        origin = {"from": start if start.startswith("/") else str(self.folder / start), "then": then, **(adapter or {})}
        return self.train(output, prove=prove, **{"model": None, **more, "adapter": origin})


@contextlib.contextmanager
def unproven():
    """The final folder without the process that proves it: what it would answer is taken from the live model."""
    from unittest import mock

    from luthier.export import final

    answers = []

    def live(model, tokenizer, probe):
        found = real(model, tokenizer, probe)
        answers.append(found)
        found.plain = [tensor + 1 for tensor in found.logits]
        return found

    real = finish.live_answers
    with (
        mock.patch.object(finish, "live_answers", live),
        mock.patch.object(final, "plain_answers", lambda *_, **__: answers[-1]),
    ):
        yield


def logits(path: Path) -> torch.Tensor:
    """What plain peft or transformers compute from a folder."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    kind = AutoPeftModelForCausalLM if (path / "adapter_config.json").is_file() else AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 81, 33, 190, 7, 44, 260]])).logits
