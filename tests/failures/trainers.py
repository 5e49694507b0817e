"""Folders by the real trainers: transformers' Trainer and TRL's SFTTrainer, a few steps long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from rows import IDS, lora, plain
from transformers import AutoTokenizer, Trainer, TrainingArguments

TEXTS = ["My order has not arrived yet.", "The capital is Paris.", "One two three four five six.", "I am sorry."]


def _arguments(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_cpu": True, "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1, "seed": 0,
    }  # fmt: skip


def by_trainer(base: Path, folder: Path, model: Any = None, steps: int = 2, resume: Path | None = None) -> Trainer:
    """A trainer that has trained a whole model, or the one given; its output folder holds a checkpoint of each step."""
    rows = [{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 4
    trainer = Trainer(
        model=model if model is not None else plain(base),
        args=TrainingArguments(**_arguments(folder, steps)),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def by_trl(base: Path, folder: Path, steps: int = 2, **adapter: Any) -> Any:
    """The same by TRL, with a LoRA of its own making."""
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=plain(base),
        args=SFTConfig(**_arguments(folder, steps), max_length=64, bf16=False),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora(**adapter),
    )
    trainer.train()
    return trainer
