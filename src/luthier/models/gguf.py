"""A GGUF file as a trainable model: its blocks unpacked into a plain dense transformers model.

The common dense architectures are unpacked here: transformers reads a file three times through a slow parser for
them, regards the result as quantised (so that it can neither be trained nor saved), and leaves out silently what it
has no place for. The other architectures go through transformers, and the traces are removed afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from luthier.artifacts.gguf_header import GgufHeader, GgufTensor
from luthier.errors import ArtifactError, RequestError
from luthier.models.coverage import check_coverage
from luthier.models.source import BaseSource

DENSE = ("llama", "qwen2", "qwen3")
_KEYS = {  # GGUF's keys (after the architecture's name) to config names
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
ROPE_FREQS = "rope_freqs.weight"
_OWN_SCALING = ("gpt-oss", "gpt_oss")  # architectures whose scaling transformers takes over from the file


def gguf_config(source: BaseSource, header: GgufHeader) -> PreTrainedConfig:
    """The config that the file's metadata amount to.

    Raises:
        RequestError: the architecture cannot be opened, or scales its positions in a way that would get lost.
    """
    rope = _dense_rope(source, header) if _is_dense(header) else None
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    scaled = "rope_freqs.weight" in header.tensors or (scaling != "none" and header.architecture not in _OWN_SCALING)
    if scaled and rope is None:
        raise RequestError(
            f"{source.name} scales its rotary positions, which cannot be taken over from a GGUF.",
            code="gguf-rope",
            where="model.path",
            remedy="Give the model's folder in transformers format instead.",
        )
    if rope is not None:
        return _dense_config(header, rope)
    assert source.path is not None
    try:
        config = AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise RequestError(
            f"{source.name} is a GGUF of architecture {header.architecture!r}, which transformers does not open ({error}).",
            code="gguf-architecture",
            where="model.path",
            remedy="Give the model's folder in transformers format instead.",
        ) from error
    config.name_or_path = ""
    return config


def open_gguf(
    source: BaseSource, header: GgufHeader, config: PreTrainedConfig, dtype: torch.dtype, options: dict[str, Any]
) -> PreTrainedModel:
    """Reads and unpacks the weights in `dtype`; raises ArtifactError where they do not cover the model."""
    assert source.path is not None
    dense = _is_dense(header)
    try:
        if dense:
            model, loading = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=_dense_weights(source, header, config, dtype),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                source.path.parent,
                config=config,
                gguf_file=source.path.name,
                dtype=dtype,
                output_loading_info=True,
                **options,
            )
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ArtifactError(
            f"this GGUF file ({header.architecture}) could not be unpacked: {error}",
            code="broken-gguf",
            where=source.name,
            remedy="Get the file again, or give the model's folder in transformers format.",
        ) from error
    check_coverage(loading, source.name)
    if not dense:
        _forget_quantisation(model)
    model.config.name_or_path = ""
    model.name_or_path = ""
    return model


def _is_dense(header: GgufHeader) -> bool:
    return header.architecture in DENSE and f"{header.architecture}.expert_count" not in header.metadata


def _dense_config(header: GgufHeader, rope: dict[str, Any]) -> PreTrainedConfig:
    data, prefix = header.metadata, header.architecture
    values = {name: data[f"{prefix}.{key}"] for key, name in _KEYS.items() if f"{prefix}.{key}" in data}
    values |= {
        name: data[f"tokenizer.ggml.{key}_token_id"]
        for key, name in _TOKENS.items()
        if f"tokenizer.ggml.{key}_token_id" in data
    }
    if prefix == "llama":
        values["mlp_bias"] = "blk.0.ffn_down.bias" in header.tensors
    if prefix == "llama" and "head_dim" not in values and f"{prefix}.rope.dimension_count" in data:
        values["head_dim"] = data[f"{prefix}.rope.dimension_count"]
    return AutoConfig.for_model(
        prefix,
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        rope_parameters=rope,
        tie_word_embeddings="output.weight" not in header.tensors,
        attention_bias="blk.0.attn_q.bias" in header.tensors,
        architectures=[MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(prefix))].__name__],
        **values,
    )


def _dense_rope(source: BaseSource, header: GgufHeader) -> dict[str, Any] | None:
    """The rotary positions' settings; None where their scaling is of a kind that has no name in transformers."""
    data = {
        key.partition(".rope.")[2]: value
        for key, value in header.metadata.items()
        if key.startswith(f"{header.architecture}.rope.")
    }
    theta, kind = float(data.get("freq_base", 10000.0)), data.get("scaling.type", "none")
    if ROPE_FREQS in header.tensors:
        return _llama3_rope(torch.from_numpy(next(_values(source, {ROPE_FREQS: header.tensors[ROPE_FREQS]}))[1]), theta)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    told = {"rope_type": kind, "rope_theta": theta, "factor": data.get("scaling.factor")}
    if kind == "linear":
        return told
    original = data.get("scaling.original_context_length")
    known = {"type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow", "finetuned"}
    if (
        kind != "yarn"
        or not original
        or {key.removeprefix("scaling.") for key in data if key.startswith("scaling.")} - known
    ):
        return None
    betas = {key: data[f"scaling.yarn_{key}"] for key in ("beta_fast", "beta_slow") if f"scaling.yarn_{key}" in data}
    return {**told, **betas, "original_max_position_embeddings": original}


def _llama3_rope(factors: torch.Tensor, theta: float) -> dict[str, Any] | None:
    """The settings of transformers' `llama3` scaling that make these factors."""
    for power in range(5, 18):
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1 << power,
        }
        if torch.allclose(llama3_factors(rope, 2 * factors.numel()), factors, rtol=1e-5):
            return rope
    return None


def llama3_factors(rope: Mapping[str, Any], width: int) -> torch.Tensor:
    """What each frequency of `width` rotated elements is divided by, as transformers' `llama3` scaling changes it."""
    low, high, factor = float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), float(rope["factor"])
    original = float(rope["original_max_position_embeddings"])
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    turns = original / (2 * math.pi * float(rope["rope_theta"]) ** exponents)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _dense_weights(
    source: BaseSource, header: GgufHeader, config: PreTrainedConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every tensor of the file under transformers' name; one without a name there keeps its own, and so is reported."""
    names = file_names(header.architecture, config)
    weights = {}
    for name, values in unpacked(source, header):
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        weight = torch.from_numpy(values)
        if header.architecture == "llama" and heads:
            weight = split_halves(weight, heads)
        weights[names.get(name, name)] = weight.to(dtype)
    return weights


def file_names(architecture: str, config: PreTrainedConfig) -> dict[str | None, str]:
    """A dense model's tensors by their names in a GGUF file."""
    with torch.device("meta"):
        expected = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).state_dict()
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    return {table.get_name(name, (".weight", ".bias")): name for name in expected}


def unpacked(source: BaseSource, header: GgufHeader) -> Iterator[tuple[str, numpy.ndarray]]:
    """Every tensor of weights by its name in the file, in fp32."""
    return _values(source, {name: tensor for name, tensor in header.tensors.items() if name != ROPE_FREQS})


def _values(source: BaseSource, tensors: Mapping[str, GgufTensor]) -> Iterator[tuple[str, numpy.ndarray]]:
    data = numpy.memmap(str(source.path), mode="r", dtype=numpy.uint8).view(numpy.ndarray)
    for name, tensor in tensors.items():
        rows = tensor.shape[:-1]
        blocks = data[tensor.offset : tensor.offset + tensor.size].reshape(*rows, -1)
        if tensor.kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            kind = numpy.float32 if tensor.kind == gguf.GGMLQuantizationType.F32 else numpy.float16
            yield name, blocks.view(kind).astype(numpy.float32)
        else:
            yield name, gguf.dequantize(blocks, tensor.kind).reshape(tensor.shape)


def split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries and keys in transformers' order: llama.cpp rotates neighbours, transformers halves of a head."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _forget_quantisation(model: PreTrainedModel) -> None:
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"):
        if name in model.__dict__:
            delattr(model, name)
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
