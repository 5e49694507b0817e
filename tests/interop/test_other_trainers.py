"""What `luthier.load` gives is an ordinary model: other people's training loops train it, and what they save opens plainly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tiny import make_llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import luthier

TEXTS = [
    "My order has not arrived yet.",
    "The capital is Paris.",
    "One two three four five six.",
    "I am sorry to hear that.",
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A model's folder, and an adapter on it that was trained before, as peft saves it."""
    home = tmp_path_factory.mktemp("sources")
    base = make_llama(home / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(home / "adapter")
    return {"full": base, "adapter": home / "adapter"}


def _arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "seed": 0,
    }  # fmt: skip


def with_trainer(model: Any, tokenizer: Any, folder: Path) -> Path:
    rows = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text)["input_ids"][:6] for text in TEXTS)]
    trainer = Trainer(model=model, args=TrainingArguments(**_arguments(folder)), train_dataset=rows)
    trainer.train()
    return folder / "checkpoint-2"


def with_trl(model: Any, tokenizer: Any, folder: Path) -> Path:
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(**_arguments(folder), max_length=64, bf16=False)
    data = Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return folder / "checkpoint-2"


def with_a_plain_loop(model: Any, tokenizer: Any, folder: Path) -> Path:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    with luthier.Checkpoints(folder, tokenizer=tokenizer) as checkpoints:
        for step in (1, 2):
            batch = tokenizer(TEXTS[step], return_tensors="pt")
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpoints.save(step, model, optimizer)
    inner = folder / "checkpoints" / "step-00000002"
    return inner / ("adapter" if (inner / "adapter").is_dir() else "model")


@torch.no_grad()
def _logits(model: Any, tokenizer: Any) -> torch.Tensor:
    return model.eval()(**tokenizer(TEXTS[0], return_tensors="pt")).logits


@pytest.mark.parametrize("loop", [with_trainer, with_trl, with_a_plain_loop])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_loaded_model_trains_in_another_loop_and_what_that_saves_opens_plainly(
    sources: dict[str, Path], tmp_path: Path, kind: str, loop: Callable[[Any, Any, Path], Path]
) -> None:
    model, tokenizer = luthier.load(sources[kind], trainable=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = loop(model, tokenizer, tmp_path / "out")

    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed <= trained
    if kind == "adapter":
        assert all("lora_" in name for name in trained)

    opener = AutoPeftModelForCausalLM if kind == "adapter" else AutoModelForCausalLM
    plain = opener.from_pretrained(saved)
    assert torch.equal(_logits(plain, tokenizer), _logits(model, tokenizer))

    again, _ = luthier.load(saved, trainable=True)  # Trainer saves no tokenizer unless it is given one
    assert torch.equal(_logits(again, tokenizer), _logits(model, tokenizer))
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained
