"""A LoRA adapter in GGUF form, as llama.cpp reads it, brought to a PEFT folder.

Each adapted weight has two tensors, ``NAME.lora_a`` (rank × in) and ``NAME.lora_b`` (out × rank), and the file one alpha.
llama.cpp rotates neighbouring elements of a head where transformers rotates halves, so that the rows of a llama's
queries and keys are in another order; of an adapter that concerns B alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from luthier.artifacts.gguf_header import GgufHeader, read_gguf_header
from luthier.errors import ArtifactError, RequestError
from luthier.models.gguf import DENSE, file_names, split_halves, unpacked
from luthier.models.source import BaseSource

_PARTS = {".lora_a": "lora_A", ".lora_b": "lora_B"}


def is_gguf_adapter(path: Path) -> bool:
    """Whether a file is a GGUF that holds an adapter."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return False
    return read_gguf_header(path).metadata.get("general.type") == "adapter"


def as_peft_folder(path: Path, config: PreTrainedConfig, folder: Path) -> Path:
    """Write the adapter in a GGUF file as a PEFT folder for a base of this config.

    Raises:
        RequestError: it is no LoRA, or of an architecture whose order of rows is not known here.
        ArtifactError: a tensor has no place in the base, or lacks its partner.
    """
    header = read_gguf_header(path)
    kind = header.metadata.get("adapter.type")
    if kind != "lora" or header.architecture not in DENSE:
        what = f"of type {kind}" if kind != "lora" else f"for the architecture {header.architecture}"
        raise RequestError(
            f"{path} is an adapter {what}, which cannot be brought to peft's form.",
            code="gguf-adapter",
            where=str(path),
            remedy="Give the PEFT folder that it was converted from.",
        )
    tensors = _tensors(path, header, config)
    ranks = {_layer(name): tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    alpha = float(header.metadata.get("adapter.lora.alpha", usual))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != usual},
        "target_modules": sorted(ranks),
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _tensors(path: Path, header: GgufHeader, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    known = file_names(header.architecture, config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found: dict[str, torch.Tensor] = {}
    for name, values in unpacked(BaseSource("gguf", path, str(path)), header):
        stem, part = name[:-7], name[-7:]
        target = known.get(stem)
        if part not in _PARTS or target is None:
            raise _unfit(path, f"{name} has no place in a model of type {config.model_type}")
        weight = torch.from_numpy(values).contiguous()
        rows = heads.get(stem.split(".")[-2])
        if part == ".lora_b" and header.architecture == "llama" and rows:
            weight = split_halves(weight, rows).contiguous()
        found[f"base_model.model.{target.removesuffix('.weight')}.{_PARTS[part]}.weight"] = weight
    _check_pairs(path, found)
    return found


def _check_pairs(path: Path, tensors: Mapping[str, Any]) -> None:
    for name in tensors:
        partner = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if partner not in tensors:
            raise _unfit(path, f"{partner} is missing beside {name}")
    if not tensors:
        raise _unfit(path, "it holds no tensors")


def _layer(name: str) -> str:
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def _unfit(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"this GGUF adapter does not fit: {why}.",
        code="coverage",
        where=str(path),
        remedy="Give the base it was trained on.",
    )
