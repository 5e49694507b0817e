"""LoRA trained on experts one by one, opened on a model that holds them fused.

Libraries before transformers 5 kept every expert's projections as linear layers of their own, and adapters were saved so:
``mlp.experts.3.up_proj.lora_A``. Fused, all experts of a layer are two parameters of three dimensions, and peft puts one
pair of matrices on each (``target_parameters``). The conversion is exact: the gate's and the up projection's pairs become
one of twice the rank, with B in two blocks; a pair that is missing is zeros.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts.names import PEFT
from luthier.errors import RequestError
from luthier.models.targets import expert_parameters

_EXPERT = re.compile(r"(?P<stem>.*)\.(?P<list>\w*experts)\.(?P<index>\d+)\.(?P<leaf>\w+)\.lora_(?P<side>[AB])\.weight")
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
Pairs = dict[tuple[int, str, str], torch.Tensor]  # (expert, part, side) to its matrix


def are_single(names: Iterable[str], model: nn.Module) -> bool:
    """Whether an adapter's tensors speak of experts one by one where the model holds them fused."""
    return any(map(_EXPERT.fullmatch, names)) and bool(_fused(model))


def fuse(
    tensors: Mapping[str, torch.Tensor], config_file: Path, model: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An adapter's tensors and config in the fused form.

    Args:
        tensors: by the names that peft gives them in files.

    Raises:
        RequestError: its experts are not plain LoRA of one rank, or the model's experts are of another form.
    """
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    for key in ("use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise _refusal(f"{key} is set, which peft does not have for fused experts", config_file)
    layers: dict[str, Pairs] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            rest[name] = tensor
            continue
        part = _PARTS.get(match["leaf"])
        if part is None:
            raise _refusal(f"{match['leaf']} is no projection of a fused expert", config_file)
        layers.setdefault(match["stem"], {})[int(match["index"]), part, match["side"]] = tensor
    fused, rank = _fused(model), int(config["r"])
    used: set[str] = set()
    for stem, pairs in layers.items():
        home = _home(stem.removeprefix(PEFT), fused, config_file)
        wanted = [leaf for leaf, parts in _FUSED.items() if any(part in parts for _, part, _ in pairs)]
        for leaf in wanted:
            inner = ".base_layer" if leaf == "gate_up_proj" and len(wanted) == 2 else ""
            weight = fused[home].get(leaf)
            if weight is None:
                raise _refusal(f"{home} holds no {leaf}", config_file)
            a, b = _one_pair(pairs, _FUSED[leaf], weight.shape, rank, config_file)
            rest[f"{PEFT}{home}{inner}.lora_A.weight"] = a
            rest[f"{PEFT}{home}{inner}.lora_B.weight"] = b
            used.add(leaf)
    _retarget(config, rest, model, sorted(used, reverse=True))
    return rest, config


def _fused(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Modules that hold experts fused, with their parameters by name."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name in expert_parameters(model):
        home, _, leaf = name.rpartition(".")
        found.setdefault(home, {})[leaf] = model.get_parameter(name)
    return found


def _home(stem: str, fused: Mapping[str, Any], where: Path) -> str:
    """The module of the layer that ``stem`` speaks of; transformers 5 renamed what lies between (block_sparse_moe to mlp)."""
    layer = re.match(r"(?:.*?\.)?layers\.(\d+)\.", stem + ".")
    same = [home for home in fused if home.rpartition(".")[0] == stem]
    same = same or [home for home in fused if layer and re.search(rf"(^|\.)layers\.{layer[1]}\.", home)]
    if len(same) != 1:
        raise _refusal(f"the model has no experts at {stem}", where)
    return same[0]


def _one_pair(
    pairs: Pairs, parts: tuple[str, ...], shape: tuple[int, ...], rank: int, where: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices for one fused parameter (experts × out × in): (experts·rank × in), (out × rank·experts)."""
    experts, out, width = shape
    dtype = next(iter(pairs.values())).dtype
    a = torch.zeros(experts, len(parts) * rank, width, dtype=dtype)
    b = torch.zeros(experts, out, len(parts) * rank, dtype=dtype)
    rows = out // len(parts)
    for (expert, part, side), tensor in pairs.items():
        if part not in parts:
            continue
        place = parts.index(part)
        low, high = place * rank, (place + 1) * rank
        target = a[expert : expert + 1, low:high] if side == "A" else b[expert : expert + 1, place * rows : (place + 1) * rows, low:high]  # fmt: skip
        if target.shape != (1, *tensor.shape):
            raise _refusal(f"expert {expert}'s {part} projection is {tuple(tensor.shape)}, not {tuple(target.shape[1:])}", where)  # fmt: skip
        target[0] = tensor
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous()


def _retarget(config: dict[str, Any], tensors: Mapping[str, torch.Tensor], model: nn.Module, leaves: list[str]) -> None:
    """Name what carries the adapter now; the doubled rank of gate and up keeps its factor."""
    homes = {home.rpartition(".")[2] for home in _fused(model)}
    linear = {name.removeprefix(PEFT).rpartition(".lora_")[0] for name in tensors if ".lora_A." in name}
    config["target_modules"] = sorted(
        name for name in linear if name.removesuffix(".base_layer").rpartition(".")[2] not in homes
    )
    config["target_parameters"] = [f"{home}.{leaf}" for home in sorted(homes) for leaf in leaves]
    config["exclude_modules"], config["lora_dropout"] = None, 0.0
    if "gate_up_proj" in leaves:
        factor = math.sqrt(2.0) if config.get("use_rslora") else 2
        config["rank_pattern"] = {f"{home}.gate_up_proj": 2 * config["r"] for home in homes}
        config["alpha_pattern"] = {f"{home}.gate_up_proj": factor * config["lora_alpha"] for home in homes}


def _refusal(why: str, where: Path) -> RequestError:
    return RequestError(
        f"this adapter was trained on experts one by one, and the model holds them fused; it cannot be converted: {why}.",
        code="single-experts",
        where=str(where.parent),
        remedy="Merge it where it was trained, or with `luthier export --to merged`, and open the merged model.",
    )
