"""What the rows of the table of failures share: real adapters by peft, and what a folder must show once it is opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import luthier
from luthier.artifacts.identify import identify

IDS = torch.tensor([[5, 81, 33, 190, 7, 44, 260, 12, 99]])
ADAPTER = "adapter_model.safetensors"


def plain(folder: Path) -> Any:
    """The model in a folder, by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def plain_adapter(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(plain(base), folder)


def adapted(base: Path | Any, config: Any = None, seed: int = 1) -> Any:
    """A peft model whose adapter does something in every tensor it trains."""
    model = get_peft_model(plain(base) if isinstance(base, Path) else base, config or lora())
    disturb(model, seed)
    return model


def lora(**more: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**(settings | more))


@torch.no_grad()
def disturb(model: Any, seed: int = 1) -> None:
    """Move every trained tensor, as training would."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.05)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def changed_by_a_step(model: Any) -> set[str]:
    """The parameters that differ after one step of an optimiser that is given the whole model."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def opens_and_trains(folder: Path, wanted: torch.Tensor, names: Iterable[str], **how: Any) -> Any:
    """The folder opens with exactly these logits, and a step changes exactly these parameters; gives the model."""
    frozen, _ = luthier.load(folder, device="cpu", **how)
    assert torch.equal(logits(frozen), wanted)
    assert trained(frozen) == set()
    model, _ = luthier.load(folder, device="cpu", trainable=True, **how)
    assert torch.equal(logits(model), wanted)
    model.train()
    assert trained(model) == set(names)
    assert changed_by_a_step(model) == set(names)
    return model


def said(folder: Path) -> tuple[str, set[str]]:
    """What `luthier inspect --json` says of a folder: its kind, and the codes of its problems."""
    found = json.loads(json.dumps(identify(folder).as_dict()))
    for problem in found["problems"]:
        assert problem["message"] and problem["remedy"], problem
    return found["kind"], {problem["code"] for problem in found["problems"]}


def remedies(folder: Path) -> str:
    return " ".join(problem.remedy for problem in identify(folder).problems)


def mended(folder: Path, target: Path, **given: Any) -> Path:
    """The copy that `luthier mend` writes, in which nothing is left to repair."""
    assert "luthier mend" in remedies(folder)
    luthier.mend(folder, target, prove=False, **given)
    assert "luthier mend" not in remedies(target), remedies(target)
    return target


def without(folder: Path, target: Path, *names: str) -> Path:
    """A copy of a folder that lacks some files."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*names)))


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
