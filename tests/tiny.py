"""Makers of tiny but real models and tokenizers: real files in real formats, deterministic, well below a second each."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = (
    "system user assistant You are a helpful assistant. What is the capital of France? The capital is Paris.",
    "My order has not arrived yet, please help me. I am sorry to hear that; let me look into it.",
    '{"category": "delivery", "urgent": true, "product": "lamp", "count": 12}',
    "Write a short story about a violin maker who lives by the sea and works in the morning.",
    "One two three four five six seven eight nine ten; 0 1 2 3 4 5 6 7 8 9.",
    "你好，请帮我查一下订单。谢谢！",
)


@functools.cache
def _trained(vocab: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def make_tokenizer(
    folder: Path | str | None = None, *, vocab: int = 320, template: str | None = CHATML, pad: str | None = PAD
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's special tokens, saved to `folder` if one is given.

    `vocab` is the number of tokens at most (from 259 on); without `pad` the tokenizer has no padding token.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab)),
        eos_token=END,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(START, special=True)]})
    tokenizer.chat_template = template
    tokenizer.model_max_length = 256
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def make_llama(
    folder: Path | str,
    *,
    vocab: int = 320,
    tie: bool = True,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    dropout: float = 0.0,
    shard: str = "5GB",
    tokenizer: bool = True,
) -> Path:
    """A Llama of about 30 thousand parameters as a transformers folder; `shard` is the largest file's size ("40KB" makes several)."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _write(LlamaForCausalLM, config, Path(folder), dtype, seed, shard, vocab if tokenizer else None)


def make_qwen3_moe(
    folder: Path | str,
    *,
    vocab: int = 320,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    layers: int = 2,
    experts: int = 4,
    seed: int = 0,
    dropout: float = 0.0,
    shard: str = "5GB",
    tokenizer: bool = True,
) -> Path:
    """A mixture of `experts` experts, two at work per token, in Qwen3-MoE's shape, as a transformers folder."""
    config = Qwen3MoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _write(Qwen3MoeForCausalLM, config, Path(folder), dtype, seed, shard, vocab if tokenizer else None)


def _write(kind, config, folder: Path, dtype: torch.dtype, seed: int, shard: str, vocab: int | None) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).to(dtype)
        with torch.no_grad():  # far from zero, so that logits differ and a lost tensor shows
            for name, weight in model.named_parameters():
                if "norm" not in name:
                    weight.normal_(0.0, 0.2)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shard)
    if vocab is not None:
        make_tokenizer(folder, vocab=vocab)
    return folder


def make_mllama(folder: Path | str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A Llama-3.2-Vision in miniature as a transformers folder, with its processor's files."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    text = MllamaTextConfig(
        vocab_size=328, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=[1], max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_global_layers=1, attention_heads=4, image_size=28,
        patch_size=14, max_num_tiles=2, vision_output_dim=64, intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
    )  # fmt: skip
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=320)
    made = _write(MllamaForConditionalGeneration, config, Path(folder), dtype, seed, "5GB", 320)
    (made / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "MllamaImageProcessor", "size": {"height": 28, "width": 28}, "max_image_tiles": 2}))  # fmt: skip
    (made / "processor_config.json").write_text(json.dumps({"processor_class": "MllamaProcessor"}))
    return made


def make_gguf(path: Path | str, *, seed: int = 0, rule: str = "smollm", architecture: str = "llama") -> Path:
    """The model of `make_llama(seed=seed)` as a GGUF file with its tokenizer, weights in fp32.

    Queries and keys are permuted as llama.cpp wants them for its way of rotating.
    """
    path = Path(path)
    folder = path.parent / f"{path.stem}-original"
    make_llama(folder, seed=seed)
    tokenizer = make_tokenizer()
    weights = load_file(folder / "model.safetensors")
    config = LlamaConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.all_special_tokens)
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
