"""Tiny models of the architectures that llama.cpp knows, with weights that make every part of them show."""

import json
from pathlib import Path

import tiny
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SMALL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096, "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}  # fmt: skip
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}

MODELS = {
    "llama": ("llama", {}),
    "llama, llama3 rope, untied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama, biases, wide heads": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3, every third": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}}),
    "phi3": ("phi3", {}),
    "phi3, long rope": ("phi3", {"rope_parameters": LONG, "max_position_embeddings": 8192, "original_max_position_embeddings": 4096}),
}  # fmt: skip


def make_model(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """The model of that name as a transformers folder with the tokenizer of `tiny`."""
    kind, settings = MODELS[name]
    config = AutoConfig.for_model(kind, **{**SMALL, **settings, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "norm" in part:
                weight.add_(0.3 * torch.randn_like(weight))
            else:
                weight.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    tiny.make_tokenizer(folder)
    return folder


def make_sentencepiece(folder: Path, *, prepend: bool = False, metaspace: bool = False) -> None:
    """A tokenizer in SentencePiece's form, of 600 tokens at most, in a model's folder."""
    spaces = normalizers.Replace(" ", "▁")
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.normalizer, trained.pre_tokenizer = spaces, pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(tiny.CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    content = json.loads(tokenizer.to_str())
    content["model"] |= {"vocab": model["vocab"], "merges": model["merges"]}
    finished = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    finished.save_pretrained(folder)
