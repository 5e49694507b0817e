"""The other side of ``against_trainer.py``: transformers' Trainer with peft, as its documentation sets it up.

    python benchmarks/trainer_side.py SETTINGS.json

Its best case: tokens lie ready in one array, nothing is evaluated or reported, and it saves once, at the end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    """Notes when the first step has ended, and the losses."""

    def __init__(self) -> None:
        self.noted: dict = {"losses": []}

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            self.noted |= {"first_step_at": time.time(), "first_step_cpu": time.process_time()}

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            self.noted["losses"].append(float(logs["loss"]))


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    if settings["lora"]:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    rows = torch.from_numpy(np.load(settings["rows"]))
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=settings["output"], use_cpu=True, max_steps=settings["steps"], per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["accumulate"], learning_rate=2e-4, lr_scheduler_type="cosine", warmup_steps=1,
        max_grad_norm=1.0, weight_decay=0.0, optim="adamw_torch_fused", train_sampling_strategy="sequential", logging_steps=1,
        save_strategy="steps", save_steps=settings["steps"], report_to="none", disable_tqdm=True,
    )  # fmt: skip
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[clock]).train()
    Path(settings["noted"]).write_text(json.dumps(clock.noted))


if __name__ == "__main__":
    main()
