"""Tiny adapters of every kind, with weights far from zero, saved by peft itself."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
)

PROBE = torch.arange(3, 43)[None] * 7 % 320


def make_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """A GPT-2, whose layers hold their weights transposed (Conv1D) and whose head is tied."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def make_gpt_oss(folder: Path) -> Path:
    """A GPT-OSS, whose experts are fused, hold their weights transposed and have biases."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, pad_token_id=0, eos_token_id=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, seed: int = 1, grow: int = 0, **settings) -> Path:
    """An adapter on `base` whose every own tensor is random; `grow` adds rows to the vocabulary first."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if grow:
        model.resize_token_embeddings(model.config.vocab_size + grow, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                spread = 0.05 * torch.randn_like(parameter)
                parameter.copy_(parameter.abs() * (1 + spread) if "magnitude" in name else parameter + spread)
    adapted.save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits


def opened(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
