"""Folders written byte for byte as tools leave them that are not installed here: Unsloth, LLaMA-Factory, axolotl, torchtune, accelerate.

Weights are real (peft's or transformers' own, of small models); the files around them, their names and their JSON are the tool's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rows import ADAPTER, edit
from safetensors.torch import load_file, save_file

PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def trainer_state(step: int) -> dict[str, Any]:
    return {
        "best_global_step": None, "best_metric": None, "best_model_checkpoint": None, "epoch": 1.0, "eval_steps": 500,
        "global_step": step, "is_hyper_param_search": False, "is_local_process_zero": True, "is_world_process_zero": True,
        "log_history": [], "logging_steps": 10, "max_steps": step, "num_input_tokens_seen": 0, "num_train_epochs": 1,
        "save_steps": 500, "stateful_callbacks": {}, "total_flos": 1.0, "train_batch_size": 1, "trial_name": None, "trial_params": None,
    }  # fmt: skip


def training_args(file: Path) -> None:
    """A pickled TrainingArguments stands here in real folders; nothing may open it, so this one holds plain numbers."""
    torch.save({"seed": 0}, file)


def as_unsloth(folder: Path, base: str) -> Path:
    """peft's adapter as Unsloth leaves it: its mirror as base, targets as one pattern, its mark in `auto_mapping`."""
    edit(
        folder / "adapter_config.json",
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        auto_mapping={
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        target_modules=(
            r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|down_proj).*?)"
            r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|down_proj)))"
        ),
    )
    (folder / "README.md").write_text(f"---\nbase_model: {base}\nlibrary_name: peft\ntags:\n- unsloth\n---\n")
    return folder


def as_llama_factory(folder: Path, tokenizer: Any) -> Path:
    """The output folder itself holds the adapter, the tokenizer and the Trainer's state without an optimiser."""
    tokenizer.save_pretrained(folder)
    results = {"epoch": 1.0, "total_flos": 1.0, "train_loss": 1.5, "train_runtime": 2.0}
    for name in ("all_results.json", "train_results.json"):
        (folder / name).write_text(json.dumps(results, indent=4))
    (folder / "trainer_state.json").write_text(json.dumps(trainer_state(2), indent=2))
    (folder / "trainer_log.jsonl").write_text('{"current_steps": 2, "total_steps": 2, "loss": 1.5}\n')
    (folder / "README.md").write_text("---\nlibrary_name: peft\nlicense: other\ntags:\n- llama-factory\n- lora\n---\n")
    (folder / "training_loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    training_args(folder / "training_args.bin")
    return folder


def as_axolotl(folder: Path, base: Path, tokenizer: Any) -> Path:
    """The adapter with the base's config.json beside it, and a `merged` folder within."""
    tokenizer.save_pretrained(folder)
    shutil.copy(base / "config.json", folder)
    (folder / "README.md").write_text("---\nlibrary_name: peft\ntags:\n- axolotl\n---\n")
    (folder / "debug.log").write_text("axolotl\n")
    return folder


def as_torchtune(folder: Path, base: Path, merged: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """`epoch_0` of a LoRA recipe: the merged model in shards, the adapter beside it twice, the base's small files."""
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    names = sorted(merged)
    index: dict[str, str] = {}
    for number in range(shards):
        part = {name: merged[name] for name in names[number::shards]}
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file_name, {"format": "pt"})
        index |= dict.fromkeys(part, file_name)
    size = sum(tensor.nbytes for tensor in merged.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    )
    torch.save(load_file(folder / ADAPTER), folder / "adapter_model.pt")
    config = json.loads((folder / "adapter_config.json").read_text())
    kept = ("r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path")
    (folder / "adapter_config.json").write_text(json.dumps({key: config[key] for key in kept}))
    return folder


def as_accelerate_fsdp(folder: Path, state: dict[str, torch.Tensor], step: int = 2) -> Path:
    """`checkpoint-N` with FULL_STATE_DICT: the whole state in one pickle, named after accelerate."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "pytorch_model_fsdp.bin")
    (folder / "trainer_state.json").write_text(json.dumps(trainer_state(step)))
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")
    training_args(folder / "training_args.bin")
    return folder


def sharded_by_torch(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    """A state dict by torch's own checkpoint writer."""
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=str(folder))
    return folder
