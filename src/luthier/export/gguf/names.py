"""What llama.cpp calls a transformers model: architecture, hyperparameters, tensors, and how these must be changed.

Only architectures whose every setting has a place in llama.cpp are written; a setting that llama.cpp would pass over, and
that changes what the model computes, is an error or, where it shows on long texts only, a note. Names come from gguf's own
table. Facts of llama.cpp: src/models/*.cpp, the loading of hyperparameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from luthier.artifacts.tensorfile import TensorSpec
from luthier.errors import ArtifactError, RequestError
from luthier.export.gguf.file import GgufTensor
from luthier.models.gguf import ROPE_FREQS, llama3_factors

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3",
    "gemma3_text": "gemma3", "phi3": "phi3",
}  # fmt: skip
NAMES = "Llama, Mistral, SmolLM, Qwen2, Qwen3, Gemma 2, Gemma 3 and Phi-3"
_PARTS = ("vision_tower.", "multi_modal_projector.", "vision_model.")
_BUFFERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "masked_bias", "attention.bias")
_GELU, _SILU = ("gelu_pytorch_tanh", "gelu_fast", "gelu_new"), ("silu", "swish")
_F32 = gguf.GGMLQuantizationType.F32


@dataclass
class Plan:
    """The file's metadata without the tokenizer's, its tensors in fp32, and what the user should know."""

    architecture: str
    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    notes: list[str] = field(default_factory=list)


def architecture_of(config: PreTrainedConfig) -> str:
    """llama.cpp's name of the architecture.

    Raises:
        RequestError: there is none here.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise RequestError(
            f"models of type {config.model_type} are not written as GGUF.",
            code="gguf-architecture",
            where="--to gguf",
            remedy=f"{NAMES} are; for others use llama.cpp's convert_hf_to_gguf.py on the folder.",
        )
    return found


def plan_model(config: PreTrainedConfig, specs: Mapping[str, TensorSpec], where: str) -> Plan:
    """Plan a model's file from its config and the tensors that its folder holds.

    Raises:
        RequestError: llama.cpp has no place for what the config asks for.
        ArtifactError: a tensor is missing, or has no place.
    """
    architecture, text = architecture_of(config), config.get_text_config()
    plan = Plan(architecture, {}, [])
    _hyperparameters(plan, text)
    _tensors(plan, text, specs, where)
    if config.model_type == "gemma3" and any(_part(name) for name in specs):
        plan.notes.append("The vision part is left out: this file answers texts only.")
    return plan


def _hyperparameters(plan: Plan, config: PreTrainedConfig) -> None:
    prefix, heads = plan.architecture, config.num_attention_heads
    gemma = prefix in ("gemma2", "gemma3")
    activation = config.hidden_activation if gemma else config.hidden_act
    if activation not in (_GELU if gemma else _SILU):
        raise _no_place(f"the activation {activation!r}")
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    told = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads or heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": width,
        "attention.value_length": width,
        "vocab_size": config.vocab_size,
    }
    if getattr(config, "use_bidirectional_attention", None):
        raise _no_place("attention in both directions")
    if gemma:
        told |= _gemma(config, prefix, width)
    else:
        window = getattr(config, "sliding_window", None)
        if prefix in ("qwen2", "qwen3") and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise _no_place("a sliding window in some layers (use_sliding_window)")
        if window and window < config.max_position_embeddings and not prefix.startswith("qwen"):
            plan.notes.append(f"llama.cpp attends to the whole text where this model was trained with a window of {window}: texts longer than that may be answered differently.")  # fmt: skip
    _rope(plan, config, told, width)
    plan.metadata |= {f"{prefix}.{key}": value for key, value in told.items()}


def _gemma(config: PreTrainedConfig, prefix: str, width: int) -> dict[str, Any]:
    by_width = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[prefix] else width  # fmt: skip
    if config.query_pre_attn_scalar != by_width:
        raise _no_place(f"query_pre_attn_scalar {config.query_pre_attn_scalar} ({by_width} is built in)")
    told: dict[str, Any] = {"attention.sliding_window": config.sliding_window}
    usual = {"gemma2": 2, "gemma3": 6}[prefix]
    layers = list(config.layer_types)
    periods = (usual, *range(1, len(layers) + 2))
    period = next((each for each in periods if layers == _pattern(each, len(layers))), None)
    if period is None:
        raise _no_place("layers with a sliding window in another order than every Nth without")
    if period != usual:
        told["attention.sliding_window_pattern"] = period
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, key)
        if value is not None and prefix == "gemma3":
            raise _no_place(f"{key} in Gemma 3")
        if value is None and prefix == "gemma2":
            raise _no_place(f"a Gemma 2 without {key}")
        if value is not None:
            told[key] = float(value)
    return told


def _pattern(period: int, count: int) -> list[str]:
    return ["sliding_attention" if (index + 1) % period else "full_attention" for index in range(count)]


def _rope(plan: Plan, config: PreTrainedConfig, told: dict[str, Any], width: int) -> None:
    rope = config.rope_parameters
    if "full_attention" in rope:
        local = rope["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise _no_place("scaled positions in layers with a sliding window")
        told["rope.freq_base_swa"] = float(local["rope_theta"])
        rope = rope["full_attention"]
    told["rope.freq_base"] = float(rope["rope_theta"])
    rotated = int(width * float(rope.get("partial_rotary_factor") or 1.0))
    told["rope.dimension_count"] = rotated
    if rotated != width and plan.architecture != "phi3":
        raise _no_place("positions on a part of each head (partial_rotary_factor)")
    kind = rope.get("rope_type", "default")
    if kind == "llama3" and plan.architecture == "llama":
        factors = llama3_factors(rope, rotated)
        plan.tensors.append(GgufTensor(ROPE_FREQS, tuple(factors.shape), _F32, values=factors))
    elif kind == "linear":
        told |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn" and plan.architecture in ("llama", "qwen2", "qwen3"):
        strange = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None]
        if strange or rope.get("truncate", True) is not True:
            raise _no_place(f"YaRN with {', '.join(strange) or 'truncate: false'}")
        told |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        }
        told |= {f"rope.scaling.yarn_{key}": float(rope[key]) for key in ("beta_fast", "beta_slow") if rope.get(key)}
    elif kind == "longrope" and plan.architecture == "phi3":
        _longrope(plan, config, rope, told, rotated)
    elif kind != "default":
        raise _no_place(f"positions scaled by {kind!r} in {config.model_type}")


def _longrope(
    plan: Plan, config: PreTrainedConfig, rope: Mapping[str, Any], told: dict[str, Any], rotated: int
) -> None:
    original = int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    factor = config.max_position_embeddings / original
    attention = rope.get("attention_factor") or (
        math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    )
    told["rope.scaling.original_context_length"] = original
    told["rope.scaling.attn_factor"] = float(attention)
    for which in ("long", "short"):
        values = torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
        if values.numel() * 2 != rotated:
            raise _no_place(f"{values.numel()} {which} factors for {rotated} rotated elements")
        plan.tensors.append(GgufTensor(f"rope_factors_{which}.weight", tuple(values.shape), _F32, values=values))
    plan.notes.append(f"llama.cpp takes the factors for long texts wherever the context it is started with exceeds {original} tokens, transformers only where the text does; start it with -c {original} for the same answers on short texts.")  # fmt: skip


def _tensors(plan: Plan, config: PreTrainedConfig, specs: Mapping[str, TensorSpec], where: str) -> None:
    names, expected = _plain_names(specs), names_in_gguf(plan.architecture, config)
    tied = bool(config.tie_word_embeddings)
    missing = sorted(name for name in expected if name not in names and not (tied and name == "lm_head.weight"))
    if missing:
        raise ArtifactError(f"{_few(missing)} of the model is in no file.", code="tensor-missing", where=where, remedy="Get the files again, or `luthier mend` the folder.")  # fmt: skip
    for name, stored in names.items():
        if name not in expected:
            raise ArtifactError(f"{stored} has no place in a model of type {config.model_type}.", code="tensor-extra", where=where, remedy="An adapter's tensors go through `--to merged` first.")  # fmt: skip
        if name == "lm_head.weight" and tied:
            continue
        target = expected[name]
        if target is None:
            raise _no_place(f"{stored}, a head of its own, in {config.model_type}")
        heads = heads_of(plan.architecture, target, config)
        plus = 1.0 if plan.architecture.startswith("gemma") and target.endswith("norm.weight") else 0.0
        plan.tensors.append(GgufTensor(target, specs[stored].shape, _F32, stored, heads, plus))
    rows = specs[names["model.embed_tokens.weight"]].shape[0]
    plan.metadata[f"{plan.architecture}.vocab_size"] = rows
    plan.tensors.sort(key=_order)


def names_in_gguf(architecture: str, config: PreTrainedConfig) -> dict[str, str | None]:
    """Every tensor of a transformers model of this config, and what a GGUF calls it (None where it has no name)."""
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    return {name: table.get_name(name, (".weight", ".bias")) for name in expected}


def weights_in_gguf(plan: Plan, config: PreTrainedConfig) -> dict[str, tuple[str, int, float]]:
    """Every planned weight by its name in a text-only model: what the file calls it, its heads, and what is added."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    named = names_in_gguf(plan.architecture, config).items()
    return {name: (target, planned[target].heads, planned[target].plus) for name, target in named if target in planned}


def heads_of(architecture: str, target: str, config: PreTrainedConfig) -> int:
    """Among how many heads a tensor's rows are interleaved; 0 where they are not."""
    if architecture != "llama":
        return 0
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(target.split(".")[-2], 0)


def _plain_names(specs: Iterable[str]) -> dict[str, str]:
    """The text model's tensors by the names that a text-only model gives them."""
    found = {}
    for name in specs:
        if _part(name) or name.endswith(_BUFFERS):
            continue
        plain = name.replace("language_model.model.", "model.").replace("model.language_model.", "model.")
        found[plain.removeprefix("language_model.")] = name
    return found


def _part(name: str) -> bool:
    return name.removeprefix("model.").startswith(_PARTS)


def _order(tensor: GgufTensor) -> tuple[int, int, str]:
    parts = tensor.name.split(".")
    if parts[0] == "blk":
        return 1, int(parts[1]), tensor.name
    return (2 if parts[0].startswith("output") else 0), 0, tensor.name


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _no_place(what: str) -> RequestError:
    return RequestError(
        f"llama.cpp has no place for {what}, so the file would answer differently.",
        code="gguf-setting",
        where="config.json",
        remedy="Serve the transformers folder, with vLLM for example.",
    )
