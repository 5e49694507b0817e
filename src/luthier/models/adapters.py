"""Attaching the adapter to train, and saying what it is attached to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from luthier.config.schema import AdapterConfig
from luthier.errors import RequestError
from luthier.models.adapter_config import build, check, has_rank, uses_linear_layers
from luthier.models.open import Base
from luthier.models.quantised.adapter import register
from luthier.models.quantised.layer import quantised_layers
from luthier.models.quiet import no_deprecations
from luthier.models.targets import ALL_LINEAR, Targets, all_linear, check_names, expert_parameters, named

__all__ = ["Matched", "attach", "check", "config_for", "matched", "summary"]

_LABELS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "ia3": "IA3", "vera": "VeRA", "oft": "OFT", "boft": "BOFT"}


@dataclass(frozen=True)
class Matched:
    """What an adapter is attached to.

    Attributes:
        layers: how many layers (or fused expert weights) carry it.
        by_name: how many of each name.
        notes: what else is trained, or was left out, one sentence each.
    """

    layers: int
    by_name: dict[str, int]
    notes: list[str]


def attach(
    base: Base, adapter: AdapterConfig, *, new_token_ids: Sequence[int] = (), base_name: str, seed: int
) -> PeftModel:
    """Wraps the base in a peft model whose adapter is initialised from `seed` alone.

    Args:
        new_token_ids: tokens whose embedding rows (and head rows, where the head is separate) are trained beside it.
        base_name: what the adapter's config calls its base; with a hub base, `base.source.revision` goes in too.

    Raises:
        RequestError: a key is not peft's, a target matches nothing, or the method cannot do what is asked.
    """
    model = base.model
    config = config_for(model, adapter, new_token_ids)
    with torch.random.fork_rng(devices=_devices(model)), no_deprecations():
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, config)
        except (ValueError, NotImplementedError) as error:
            raise RequestError(
                f"peft cannot attach {adapter.type} here: {error}", code="bad-adapter", where="adapter"
            ) from error
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    wrapped.peft_config["default"].revision = base.source.revision if base_name == base.source.name else None
    return wrapped


def config_for(model: PreTrainedModel, adapter: AdapterConfig, new_token_ids: Sequence[int] = ()) -> PeftConfig:
    """The peft config that `adapter` means on a model; raises as `attach` does."""
    check(adapter)
    check_names(model, adapter.modules_to_save, "adapter.modules_to_save")
    config = build(adapter, **_arguments(model, adapter, new_token_ids))
    register(config, model)
    return config


def matched(model: PeftModel) -> Matched:
    """Counts the layers that carry the adapter, by name."""
    names = Counter(_adapted(model))
    notes = []
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and any(p.requires_grad for p in module.parameters()):
            rows = getattr(module, "token_adapter", None)
            what = f"{len(rows.token_indices['default'])} rows of " if rows is not None else ""
            notes.append(f"{what}{name.removeprefix('base_model.model.')} trained beside the adapter.")
    experts = [name for name in expert_parameters(model.get_base_model()) if ".lora_" not in name]
    left = [name for name in experts if ".base_layer." not in name]
    if left:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in left}))
        notes.append(
            f"The experts' weights ({len(left)}: {kinds}) carry no adapter: that needs lora with dropout 0 and without dora."
        )
    return Matched(sum(names.values()), dict(sorted(names.items())), notes)


def summary(model: nn.Module, adapter: AdapterConfig | None) -> str:
    """What trains, in one line: "LoRA r16 on 210 layers, 4.9 M of 134.5 M parameters".

    The second figure is the base's own parameters; the adapter's are not in it.
    """
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if adapter is None or not isinstance(model, PeftModel):
        return f"full fine-tuning, all {_count(trained)} (no `adapter` in the run file)"
    extra = {id(weight) for weight in _added(model)}
    packed = quantised_layers(model)
    extra |= {id(weight) for module in packed for weight in (module.codes, module.scales)}
    base = sum(weight.numel() for weight in model.parameters() if id(weight) not in extra)
    base += sum(module.in_features * module.out_features for module in packed)
    label = _LABELS.get(adapter.type, adapter.type)
    rank = f" r{adapter.r}" if has_rank(adapter) else ""
    if adapter.dora:
        label = "DoRA"
    return f"{label}{rank} on {matched(model).layers} layers, {_count(trained)} of {_count(base)} parameters"


def _arguments(model: PreTrainedModel, adapter: AdapterConfig, new_token_ids: Sequence[int]) -> dict[str, Any]:
    lora = adapter.type == "lora"
    targets = _targets(model, adapter)
    values: dict[str, Any] = {"target": targets.modules if targets else None}
    if targets and targets.parameters:
        values["target_parameters"] = targets.parameters
    if isinstance(adapter.target, str) and adapter.target == ALL_LINEAR:
        values["exclude_modules"] = None  # taken into account already
    if new_token_ids:
        if not lora:
            raise RequestError(
                f"new tokens beside {adapter.type} are not supported by peft.",
                code="new-tokens",
                where="model.new_tokens",
                remedy="Use adapter.type: lora, or full fine-tuning.",
            )
        if not {"embed_tokens", *_vocabulary(model)} & set(adapter.modules_to_save):
            values["trainable_token_indices"] = {name: list(new_token_ids) for name in _vocabulary(model)}
    if (
        lora
        and _tied(model)
        and set(_vocabulary(model, every=True)) & {*adapter.modules_to_save, *_listed(adapter.target)}
    ):
        values["ensure_weight_tying"] = True
    return values


def _targets(model: PreTrainedModel, adapter: AdapterConfig) -> Targets | None:
    if not uses_linear_layers(adapter):
        return None
    if adapter.target == ALL_LINEAR:
        experts = adapter.type == "lora" and adapter.dropout == 0 and not adapter.dora
        return all_linear(model, adapter.exclude, experts=experts)
    return named(model, adapter.target, adapter.exclude)


def _listed(target: str | list[str]) -> list[str]:
    return [target] if isinstance(target, str) else target


def _vocabulary(model: PreTrainedModel, *, every: bool = False) -> list[str]:
    """Last names of the embeddings and of the head; of a head tied to them only with `every`."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if _tied(model) and not every:
        layers = layers[:1]
    return [
        name.rpartition(".")[2] for name, module in model.named_modules() if any(module is layer for layer in layers)
    ]


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({weight.device for weight in model.parameters() if weight.device.type == "cuda"}, key=str)


def _adapted(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            own = [part for part in name.split(".") if part != "base_layer"]
            yield getattr(module, "parameter_name", None) or own[-1]


def _added(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that peft put beside the base's own."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for name in module.adapter_layer_names:
                held: Any = module
                for part in name.split("."):
                    held = getattr(held, part, None)
                if isinstance(held, nn.Module):
                    yield from held.parameters()


def _count(number: int) -> str:
    for least, size, unit in ((1e9, 1e9, "B"), (1e5, 1e6, "M"), (1e3, 1e3, "k")):
        if number >= least:
            return f"{number / size:.{2 if unit == 'B' else 1}f} {unit}"
    return str(number)
