"""The run file's `adapter` block as a peft config: our names to each method's own, and its other keys checked."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from peft import PeftConfig, PeftType, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from luthier.config.schema import AdapterConfig
from luthier.errors import RequestError

_OURS = {  # our key to the names that methods of peft give the same thing, the commonest first
    "r": ("r",),
    "alpha": ("lora_alpha", "alpha", "{type}_alpha"),
    "dropout": ("lora_dropout", "{type}_dropout", "rank_dropout", "module_dropout"),
    "target": ("target_modules",),
    "exclude": ("exclude_modules",),
    "modules_to_save": ("modules_to_save",),
    "rslora": ("use_rslora",),
    "dora": ("use_dora",),
}
_SET_BY_US = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "trainable_token_indices",
    "runtime_config",
)
_NEEDS_MORE = {  # methods that are more than layers: a loop of plain steps would train something else without a word
    "adalora": "reallocates ranks during training",
    "xlora": "mixes adapters that are trained already",
    "poly": "needs a task number with every sample",
    "shadow": "adds a loss of its own",
}
_OWN_TARGETS = ("ln_tuning", "trainable_tokens")  # methods whose targets are no linear layers
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


def check(adapter: AdapterConfig) -> None:
    """Checks type and keys against peft, before any model is loaded; RequestError names the key."""
    names = isinstance(adapter.target, str) and re.fullmatch(r"[\w.-]+", adapter.target)
    build(adapter, None if not uses_linear_layers(adapter) else [adapter.target] if names else adapter.target)


def build(adapter: AdapterConfig, target: list[str] | str | None, **more: Any) -> PeftConfig:
    """The peft config for `adapter` on `target`; `more` are fields of peft's config that follow from the model."""
    kind = _kind(adapter.type)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    fields = set(defaults)
    values: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    for ours in _OURS:
        value = _value(adapter, ours, target)
        name = field_of(adapter.type, ours)
        if name is not None and value is not None:
            if ours == "r" and not has_rank(adapter):
                continue
            values[name] = value
        elif name is None and ours in adapter.model_fields_set and value:
            raise RequestError(
                f"{adapter.type} has nothing that corresponds to `{ours}`.",
                code="unknown-key",
                where=f"adapter.{ours}",
                remedy=f"Leave it out; {adapter.type} takes {', '.join(sorted(fields - set(_SET_BY_US)))}.",
            )
    values |= {name: value for name, value in more.items() if name in fields}
    for key, value in (adapter.model_extra or {}).items():
        _check_key(adapter, key, value, fields)
        values[key] = value
    try:
        return config_class(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise RequestError(
            f"peft refuses this {adapter.type} config: {error}", code="bad-adapter", where="adapter"
        ) from error


def choose(adapter: AdapterConfig) -> None:
    """Set what the method has and the run file leaves open, so that it is written down; what it lacks stays unset."""
    for ours in _OURS:
        if field_of(adapter.type, ours) is None or (ours == "target" and not uses_linear_layers(adapter)):
            continue
        if ours == "r" and not has_rank(adapter):
            continue
        alpha = ours == "alpha" and adapter.alpha is None
        setattr(adapter, ours, 2.0 * adapter.r if alpha else getattr(adapter, ours))


def has_rank(adapter: AdapterConfig) -> bool:
    """Whether ``r`` counts: some methods have none, or another measure of size that an unasked rank would contradict (oft's blocks)."""
    fields = {
        field.name: field.default for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[_kind(adapter.type)])
    }
    return "r" in fields and bool(fields["r"] or "r" in adapter.model_fields_set)


def field_of(type_name: str, ours: str) -> str | None:
    """peft's name for our key in a method's config, or None where the method has no such thing."""
    fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[_kind(type_name)])}
    names = (name.format(type=type_name) for name in _OURS[ours])
    return next((name for name in names if name in fields), None)


def described(saved: dict[str, Any]) -> dict[str, Any]:
    """An adapter_config.json in the run file's words: type, r, alpha, target, … as far as its method has them.

    Raises:
        RequestError: its method is none that can be trained here.
    """
    kind = str(saved.get("peft_type", "")).lower()
    values: dict[str, Any] = {"type": kind}
    for ours in _OURS:
        name = field_of(kind, ours)
        value = saved.get(name) if name is not None else None
        if value is not None and (value or ours == "dropout"):
            values[ours] = sorted(value) if isinstance(value, list) else value
    return values


def _value(adapter: AdapterConfig, ours: str, target: list[str] | str | None) -> Any:
    if ours == "target":
        return target
    if ours == "alpha":
        alpha = adapter.alpha if adapter.alpha is not None else 2 * adapter.r
        return int(alpha) if float(alpha).is_integer() else alpha
    return getattr(adapter, ours) or (None if ours in ("exclude", "modules_to_save") else getattr(adapter, ours))


def uses_linear_layers(adapter: AdapterConfig) -> bool:
    """Whether `adapter.target` is to be resolved: some methods have targets of their own unless told otherwise."""
    return adapter.type not in _OWN_TARGETS or "target" in adapter.model_fields_set


def _kind(name: str) -> PeftType:
    usable = {
        kind.value.lower(): kind
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if not issubclass(config, PromptLearningConfig) and kind.value.lower() not in _NEEDS_MORE
    }
    lowered = name.lower()
    if lowered in usable:
        return usable[lowered]
    if lowered in _NEEDS_MORE:
        why = f"{name} {_NEEDS_MORE[lowered]}, which is not supported."
    elif lowered.upper() in PeftType.__members__:
        why = f"{name} puts virtual tokens before the text, which packed samples have no place for."
    else:
        why = f"peft has no method {name!r}."
    near = difflib.get_close_matches(lowered, usable, n=1) if lowered.upper() not in PeftType.__members__ else []
    remedy = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(sorted(usable))}."
    if lowered in ("full", "freeze", "false"):  # what other tools call training without an adapter
        remedy = "For full fine-tuning write `adapter: none`, or leave `adapter` out."
    raise RequestError(why, code="unknown-adapter", where="adapter.type", remedy=remedy)


def _check_key(adapter: AdapterConfig, key: str, value: Any, fields: set[str]) -> None:
    where = f"adapter.{key}"
    ours = next((name for name in _OURS if field_of(adapter.type, name) == key), None)
    if ours is not None and ours != key:
        raise RequestError(
            f"is called `{ours}` here.", code="unknown-key", where=where, remedy=f"Use adapter.{ours}: {value}."
        )
    if key in _SET_BY_US:
        raise RequestError("is set by Luthier itself.", code="unknown-key", where=where, remedy="Leave it out.")
    if key not in fields:
        known = sorted((fields | set(_OURS)) - set(_SET_BY_US))
        near = difflib.get_close_matches(key, known, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"{adapter.type} takes {', '.join(known)}."
        raise RequestError(f"peft's {adapter.type} has no such key.", code="unknown-key", where=where, remedy=remedy)
    if key == "init_lora_weights" and value not in _PLAIN_STARTS:
        raise RequestError(
            f"{value!r} changes the base's weights, so that the adapter would fit no base on disk.",
            code="bad-adapter",
            where=where,
            remedy=f"Choose one of {', '.join(str(start).lower() for start in _PLAIN_STARTS)}.",
        )
