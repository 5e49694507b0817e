"""Every method of peft on a tiny Llama: settings that train something, and folders saved by plain peft."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

TWO = ["q_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"target_modules": TWO, "init_r": 4, "target_r": 2, "total_step": 10},
    "ADAMSS": {"target_modules": TWO, "r": 8, "num_subspaces": 2, "subspace_rank": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BEFT": {"target_modules": TWO},
    "BOFT": {"target_modules": TWO, "boft_block_size": 4},
    "C3A": {"target_modules": TWO, "block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4, "num_frozen_tokens": 1},
    "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 2]},
    "DEFT": {"target_modules": TWO, "r": 4},
    "DELORA": {"target_modules": TWO, "r": 4},
    "FOURIERFT": {"target_modules": TWO, "n_frequency": 20},
    "FROD": {"target_modules": TWO},
    "GLORA": {"target_modules": TWO, "r": 4},
    "GRALORA": {"target_modules": TWO, "r": 4, "gralora_k": 2, "hybrid_r": 2},
    "HIRA": {"target_modules": TWO, "r": 4},
    "HRA": {"target_modules": TWO, "r": 4},
    "IA3": {"target_modules": TWO, "feedforward_modules": ["down_proj"]},
    "LILY": {"target_modules": TWO, "r": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"target_modules": TWO, "r": 4},
    "LOKR": {"target_modules": TWO, "r": 2, "decompose_factor": 4},
    "LORA": {"target_modules": TWO, "r": 4},
    "MISS": {"target_modules": TWO, "r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2, "num_ranks": 1},
    "OFT": {"target_modules": TWO, "oft_block_size": 4},
    "OSF": {"target_modules": TWO, "effective_rank": 4},
    "PEANUT": {"target_modules": TWO, "r": 4},
    "POLY": {"target_modules": TWO, "r": 4, "n_tasks": 2, "n_skills": 2, "n_splits": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"target_modules": TWO, "r": 4},
    "PVERA": {"target_modules": TWO, "r": 8},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {"target_modules": TWO, "r": 4},
    "ROAD": {"target_modules": TWO, "group_size": 8},
    "SHADOW": {"r": 4},
    "SHIRA": {"target_modules": TWO, "r": 4},
    "SUPERTUNING": {"target_modules": TWO},
    "TINYLORA": {"target_modules": TWO},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [21, 28, 35]},
    "UNILORA": {"target_modules": TWO, "r": 4, "theta_d_length": 64},
    "VBLORA": {"target_modules": TWO, "r": 4, "num_vectors": 8, "vector_length": 8},
    "VERA": {"target_modules": TWO, "r": 8},
    "WAVEFT": {"target_modules": TWO, "n_frequency": 20},
    "XLORA": {"hidden_size": 32},  # and `adapters`, on a base whose config has use_cache: false
}


def methods() -> list[str]:
    """Every method that the installed peft has a config for; those without settings here fail the tests."""
    return sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def make_method(base: Path, folder: Path, method: str, **more: Any) -> Any:
    """An adapter of `method` on `base` as if it had been trained, saved by peft; returns the live model in evaluation mode."""
    config_class = next(config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value == method)
    config = config_class(task_type="CAUSAL_LM", **{**SETTINGS[method], **more})
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def fields_of(method: str) -> set[str]:
    """The keys that a method's config has."""
    config_class = next(config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value == method)
    return {field.name for field in dataclasses.fields(config_class)}
