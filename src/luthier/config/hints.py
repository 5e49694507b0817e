"""What to say about a wrong key or value: "did you mean", the names of other tools, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from luthier.config import foreign
from luthier.config.keys import allowed, canonical, children, keys, literals

_PEFT_SETS_ITSELF = ("task_type", "peft_type", "inference_mode", "base_model_name_or_path")
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
_PRECISIONS |= {"int4": "nf4", "fp4": "nf4", "4bit": "nf4", "8bit": "int8", "float8": "fp8", "e4m3": "fp8"}


def show(value: Any) -> str:
    """A value as YAML would write it, cut short."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif value is None:
        text = "null"
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(item) for item in value) + "]"
    else:
        text = str(value) if value != "" else "''"
    return text if len(text) <= 80 else f"{text[:77]}..."


def converted(ours: dict[str, Any]) -> str:
    """Our keys and values in one phrase: ``optim.lr: 0.0001``, each in backquotes."""
    return " and ".join(f"`{key}: {show(value)}`" for key, value in ours.items())


def unknown_key(prefix: str, leaf: str, value: Any, given: Mapping[str, Any]) -> str:
    """Say what an unknown key is called here.

    Args:
        prefix: dotted name of the block it stands in; empty for the top.
        leaf: the key itself.
        value: what it is set to.
        given: the block's content.
    """
    known = keys()
    if leaf in known:  # `optim.lr: 1` written flat
        section, _, name = leaf.rpartition(".")
        return f"Write it as a block: `{section}:` and, indented below, `{name}: {show(value)}`."
    translated = _translate(leaf, value, given)
    if translated:
        return translated
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"Did you mean {_either(elsewhere)}?"
    siblings = children(canonical(prefix))
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{f'{prefix}.' if prefix else ''}{close[0]}`?"
    close = difflib.get_close_matches(leaf, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.75)
    if close:
        return f"Did you mean {_either([name for name in known if name.rpartition('.')[2] == close[0]])}?"
    close = difflib.get_close_matches(leaf, foreign.TABLE, n=1, cutoff=0.85)
    if close:
        return _translate(close[0], value, given)
    inside = _inside(value)
    if inside:
        return inside
    return f"Keys {f'below `{prefix}`' if prefix else 'at the top'} are {', '.join(siblings)}."


def peft_key(leaf: str, value: Any, given: Mapping[str, Any]) -> str:
    """Say what is wrong with a key below ``adapter`` that is not ours; empty where it may be peft's own."""
    ours = foreign.convert(leaf, value, given)
    if isinstance(ours, dict):
        name = next(iter(ours))
        if name.startswith("adapter.") and name != f"adapter.{leaf}":
            return f"`{leaf}: {show(value)}` is {converted(ours)} here."
    if leaf in _PEFT_SETS_ITSELF:
        return "Leave it out: it follows from the rest of the run file."
    close = difflib.get_close_matches(leaf, children("adapter"), n=1, cutoff=0.8)
    return f"Did you mean `adapter.{close[0]}`?" if close else ""


def wrong_value(key: str, value: Any) -> str:
    """Say what ``key`` accepts, and what was probably meant by ``value``."""
    accepts = allowed(key)
    sentence = f"It takes {accepts}." if accepts else ""
    if key == "data" and isinstance(value, str | list):
        return f"{sentence} Did you mean `data.train: {show(value)}`?"
    if not isinstance(value, str):
        return sentence
    lower = value.lower()
    if canonical(key) == "model.precision" and lower in _PRECISIONS:
        return f"{sentence} Did you mean `{_PRECISIONS[lower]}`?"
    close = difflib.get_close_matches(lower, literals(key), n=1, cutoff=0.6)
    if close:
        return f"{sentence} Did you mean `{close[0]}`?"
    translated = foreign.convert(key.rpartition(".")[2], value, {})
    if isinstance(translated, dict) and show(translated.get(key)) != show(value):
        return f"{sentence} Did you mean {converted(translated)}?"
    if lower in ("none", "null") and "null" in accepts:
        return f"{sentence} Write `null`, without quotes, for none."
    return sentence


def _translate(leaf: str, value: Any, given: Mapping[str, Any]) -> str:
    ours = foreign.convert(leaf, value, given)
    if isinstance(ours, dict):
        return f"`{leaf}: {show(value)}` is {converted(ours)} here."
    return ours or ""


def _inside(value: Any) -> str:
    if not isinstance(value, Mapping):
        return ""
    found = [_translate(str(name), item, value) for name, item in value.items()]
    return " ".join(sentence for sentence in found if sentence)


def _either(names: list[str]) -> str:
    quoted = [f"`{name}`" for name in names[:3]]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + f" or {quoted[-1]}"
