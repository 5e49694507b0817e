"""A LoRA adapter on top of another: two in memory, of which the upper one trains, and one ordinary adapter on disk.

Both share one scaling s, so that ``s·B₁A₁ + s·B₂A₂ = s·[B₁ B₂]·[A₁; A₂]``: what is saved is the concatenation of the
factors, of rank r₁ + r₂, and plain peft opens it. Nothing is multiplied or rounded on the way to disk or back; only
once, when the upper adapter is put on, the lower B is brought to the shared scaling.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from luthier.artifacts.names import of_adapter
from luthier.config.schema import AdapterConfig
from luthier.errors import ArtifactError, RequestError
from luthier.models.adapter_names import BELOW, JOINED, TOP, is_stacked
from luthier.models.adapters import config_for
from luthier.models.open import Base
from luthier.models.quantised.adapter import register
from luthier.models.quiet import no_deprecations
from luthier.models.saved_adapter import open_adapter
from luthier.models.targets import shortest

WEIGHTS = "adapter_model.safetensors"
_PLAIN = {  # what a LoRA config may say without being more than two factors and a scale
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "fan_in_fan_out", "init_lora_weights", "layers_to_transform", "layers_pattern", "loftq_config", "eva_config",
    "corda_config", "megatron_core", "runtime_config",
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """One layer's update: scaling · b @ a, with a of (r, in) and b of (out, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def part(self, start: int, stop: int, scaling: float) -> Factors | None:
        """Some of the ranks; None for none of them."""
        return Factors(self.a[start:stop], self.b[:, start:stop], scaling) if stop > start else None


def check(config: Mapping[str, Any], where: str) -> None:
    """See that an adapter is two factors and a scale on every layer; ``config`` is adapter_config.json's content.

    Raises:
        RequestError: it is something else, which cannot be joined with another adapter.
    """
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    defaults = vars(LoraConfig())
    odd = [
        name for name, value in config.items()
        if name not in _PLAIN and (value or None) != (defaults.get(name) or None) and (name, value) != ("bias", "none")
    ]  # fmt: skip
    if kind != "LORA" or odd:
        what = f"is of type {kind.lower()}" if kind != "LORA" else f"uses {', '.join(sorted(odd))}"
        raise RequestError(
            f"`stack` joins plain LoRA adapters, and this one {what}.",
            code="cannot-stack",
            where=where,
            remedy="Use adapter.then: merge, which takes every adapter.",
        )


def put_on(base: Base, folder: Path, adapter: AdapterConfig, *, base_name: str, seed: int) -> PeftModel:
    """Put a new adapter on top of the one in a folder, which stays as it is.

    Raises:
        RequestError: one of the two is more than two factors and a scale.
        ArtifactError: the adapter in the folder is not this base's.
    """
    config = config_for(base.model, adapter)
    assert isinstance(config, LoraConfig)
    check(config.to_dict(), "adapter")
    if config.rank_pattern or config.alpha_pattern:
        raise RequestError("`stack` needs one rank and one alpha for the new adapter.", code="cannot-stack", where="adapter", remedy="Leave rank_pattern and alpha_pattern out.")  # fmt: skip
    check(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")), str(folder))
    lower = _taken_off(base, folder)
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    model = _two(base, lower, config, scaling, seed)
    config.base_model_name_or_path = base_name
    config.revision = base.source.revision if base_name == base.source.name else None
    return model


def open_split(base: Base, folder: Path, facts: Mapping[str, Any], *, base_name: str | None = None) -> PeftModel:
    """Open a folder that a stacked pair was saved to as the two adapters again, of which the upper one trains.

    Args:
        facts: the manifest's ``stack``.

    Raises:
        ArtifactError: the adapter is not this base's, or not the one that the facts describe.
    """
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    joined = _taken_off(base, folder)
    scaling, ranks = (
        float(facts["scaling"]),
        {name: (int(low), int(top)) for name, (low, top) in facts["ranks"].items()},
    )
    if {name: sum(pair) for name, pair in ranks.items()} != {name: factors.rank for name, factors in joined.items()}:
        raise ArtifactError(
            "the ranks of this stacked pair are not those that its manifest names.",
            code="coverage",
            where=str(folder),
            remedy="Take the folder as it was saved.",
        )
    lower: dict[str, Factors] = {}
    upper: dict[str, Factors] = {}
    for name, (low, top) in ranks.items():
        for held, part in ((lower, joined[name].part(0, low, scaling)), (upper, joined[name].part(low, low + top, scaling))):  # fmt: skip
            if part is not None:
                held[name] = part
    config = _config(base.model, {name: factors.rank for name, factors in upper.items()}, scaling, saved)
    model = _two(base, lower, config, scaling, 0)
    _fill(model, TOP, upper, scaling)
    if base_name is not None:
        config.base_model_name_or_path = base_name
        config.revision = base.source.revision if base_name == base.source.name else None
    return model


def facts_of(model: PeftModel) -> dict[str, Any]:
    """What a manifest says of a stacked pair, enough to split what was saved: the scaling, and both ranks by layer."""
    ranks = {name: [_rank(layer, BELOW), _rank(layer, TOP)] for name, layer in _layers(model)}
    return {"scaling": _scaling(model), "ranks": ranks}


def to_files(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the one adapter that a pair is saved as: rows of A and columns of B one after the other."""
    lower, upper = (
        get_peft_model_state_dict(model, state_dict=tensors, adapter_name=name, save_embedding_layers=False)
        for name in (BELOW, TOP)
    )
    files = {}
    for name in sorted({*lower, *upper}):
        both = [part[name] for part in (lower, upper) if name in part]
        files[name] = both[0] if len(both) == 1 else torch.cat(both, dim=_dimension(name))
    return files


def own(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a model's tensors that belong to the two adapters."""
    return {name: tensor for name, tensor in tensors.items() if {BELOW, TOP} & set(name.split(".")) and "lora_" in name}


def read(folder: Path, targets: Mapping[str, tuple[torch.Tensor, int]], model: nn.Module) -> None:
    """Read the upper adapter back from the joined one, and see that the lower one is that of the model.

    Args:
        targets: by name in memory, this process's stretch of a tensor and its first element.

    Raises:
        ArtifactError: the lower adapter is another one.
    """
    ranks = {name: (_rank(layer, BELOW), _rank(layer, TOP)) for name, layer in _layers(model)}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name, (local, start) in targets.items():
            low, top = ranks[name.removeprefix("base_model.model.").partition(".lora_")[0]]
            joined = file.get_tensor(of_adapter(name).name)
            is_top = TOP in name.split(".")
            part = joined.narrow(_dimension(name), low if is_top else 0, top if is_top else low)
            part = part.reshape(-1)[start : start + local.numel()].view(local.shape)
            if is_top:
                local.copy_(part)
            elif not torch.equal(part, local.cpu()):
                raise ArtifactError(
                    f"the adapter below is not the one that this checkpoint was trained on ({name} differs).",
                    code="other-below",
                    where=str(folder),
                    remedy="Open the checkpoint itself: luthier.load, or luthier resume.",
                )


def joined_config(model: Any) -> LoraConfig:
    """The config of the one adapter that a pair is saved as."""
    upper = model.peft_config[TOP]
    ranks = {name: _rank(layer, BELOW) + _rank(layer, TOP) for name, layer in _layers(model)}
    config = _config(model.get_base_model(), ranks, _scaling(model), upper.to_dict())
    config.base_model_name_or_path, config.revision = upper.base_model_name_or_path, upper.revision
    return config


@contextmanager
def plain_form(model: Any) -> Iterator[None]:
    """Within, a stacked model computes with the one adapter that it is saved as; any other model is left alone."""
    if not is_stacked(model):
        yield
        return
    tensors = to_files(model, own(model.state_dict()))
    trains = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with torch.random.fork_rng(devices=[]):
        model.add_adapter(JOINED, joined_config(model))
    set_peft_model_state_dict(model, {name: tensor.clone() for name, tensor in tensors.items()}, adapter_name=JOINED)
    model.base_model.set_adapter(JOINED)
    try:
        yield
    finally:
        model.base_model.set_adapter([BELOW, TOP])
        model.base_model.delete_adapter(JOINED)
        _settle(model, _scaling(model))
        for name, weight in model.named_parameters():
            weight.requires_grad_(trains[name])


def _taken_off(base: Base, folder: Path) -> dict[str, Factors]:
    """The factors of a saved adapter by layer; the base is left as it was."""
    model, _ = open_adapter(base, folder, trainable=False)
    found = {}
    for name, layer in _layers(model):
        a, b = _pair(layer, "default")
        found[name] = Factors(a.detach().clone(), b.detach().clone(), float(layer.scaling["default"]))
    base.model = model.unload()
    return found


def _two(base: Base, lower: Mapping[str, Factors], config: LoraConfig, scaling: float, seed: int) -> PeftModel:
    below = _config(base.model, {name: factors.rank for name, factors in lower.items()}, scaling, {})
    for each in (below, config):
        register(each, base.model)
    with torch.random.fork_rng(devices=[]), no_deprecations():
        torch.manual_seed(seed)
        model: Any = get_peft_model(base.model, below, adapter_name=BELOW)
        torch.manual_seed(seed)
        model.add_adapter(TOP, config)
    _fill(model, BELOW, lower, scaling)
    _settle(model, scaling)
    return model


def _settle(model: Any, scaling: float) -> None:
    """Both are at work with the same scaling, and only the upper one trains."""
    model.base_model.set_adapter([BELOW, TOP])
    model.active_adapter = TOP
    for _, layer in _layers(model):
        for name in set(layer.scaling) & {BELOW, TOP}:
            layer.scaling[name] = scaling
    for name, weight in model.named_parameters():
        if BELOW in name.split("."):
            weight.requires_grad_(False)


@torch.no_grad()
def _fill(model: Any, adapter: str, factors: Mapping[str, Factors], scaling: float) -> None:
    layers = dict(_layers(model))
    for name, given in factors.items():
        a, b = _pair(layers[name], adapter)
        a.copy_(given.a)
        b.copy_(given.b if given.scaling == scaling else given.b * (given.scaling / scaling))


def _config(model: nn.Module, ranks: Mapping[str, int], scaling: float, like: Mapping[str, Any]) -> LoraConfig:
    """A LoRA config with these ranks by layer and one scaling; dropout as in another config."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    names = {
        name.replace(".base_layer", "")
        for name, _ in model.named_modules()
        if name and not any(part.startswith("lora_") for part in name.split("."))
    }
    others = {name: rank for name, rank in sorted(ranks.items()) if rank != usual}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=usual,
        lora_alpha=_whole(scaling * usual),
        rank_pattern=others,
        alpha_pattern={name: _whole(scaling * rank) for name, rank in others.items()},
        target_modules=shortest(set(ranks), names - set(ranks)),
        lora_dropout=float(like.get("lora_dropout") or 0.0),
        fan_in_fan_out=bool(like.get("fan_in_fan_out")),
    )


def _whole(value: float) -> Any:
    return int(value) if float(value).is_integer() else value


def _layers(model: Any) -> list[tuple[str, Any]]:
    """The layers that carry an adapter, by their names in the base."""
    found = model.get_base_model().named_modules()
    return [(name, module) for name, module in found if isinstance(module, LoraLayer)]


def _pair(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


def _rank(layer: Any, adapter: str) -> int:
    held = adapter in layer.lora_A or adapter in layer.lora_embedding_A
    return _pair(layer, adapter)[0].shape[0] if held else 0


def _scaling(model: Any) -> float:
    """The one scaling that both adapters have.

    Raises:
        RequestError: they have several, so that they are no stacked pair of ours and cannot be saved as one adapter.
    """
    found = {
        float(layer.scaling[name]) for _, layer in _layers(model) for name in (BELOW, TOP) if name in layer.scaling
    }
    if len(found) != 1:
        raise RequestError(
            f"the adapters {BELOW} and {TOP} have different scalings, so they cannot be saved as one.",
            code="cannot-stack",
            where=BELOW,
            remedy="Stack them through the run file (adapter.then: stack), or give them other names.",
        )
    return found.pop()


def _dimension(name: str) -> int:
    return 0 if {"lora_A", "lora_embedding_A"} & set(name.split(".")) else 1
