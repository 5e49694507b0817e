"""From plain values to a RunConfig, or to problems: one for every wrong key, in words for the person at the keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from luthier.config.hints import peft_key, show, unknown_key, wrong_value
from luthier.config.keys import allowed, canonical, children, keys
from luthier.config.schema import RunConfig


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the dotted key as it stands in the file, what is wrong, what to do."""

    key: str
    message: str
    remedy: str
    code: str


def validate(values: dict[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    """Check ``values``; returns the config, or None with every problem in the order of the file.

    An empty section (``train:`` with nothing below) counts as left out.
    """
    known = keys()
    values = {
        name: value
        for name, value in values.items()
        if value is not None or name not in known or not known[name].section or "null" in known[name].allowed
    }
    problems = list(_shape(values, ""))
    values = {name: value for name, value in values.items() if isinstance(name, str)}  # the others are reported by now
    wrong = {problem.key for problem in problems}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        for problem in _from_pydantic(error, values):
            covered = any(problem.key == key or problem.key.startswith(f"{key}.") for key in wrong)
            if covered or (problem.code == "missing-key" and problems):  # a foreign name may stand for it
                continue
            problems.append(problem)
        return None, problems
    if not config.model.path and not problems and not (config.adapter and config.adapter.start):
        key = "model" if "model" not in values else "model.path"
        remedy = f"It takes {allowed('model')}: {known['model'].line}"
        problems = [Problem(key, f"`{key}` is missing.", remedy, "missing-key")]
    return (None, problems) if problems else (config, [])


def _shape(values: dict[str, Any], prefix: str) -> Iterator[Problem]:
    """Unknown keys, and values that pydantic would bend: sections that are none, truth values as numbers."""
    known = keys()
    names = children(canonical(prefix.rstrip(".")))
    for name, value in values.items():
        key = f"{prefix}{name}"
        if not isinstance(name, str) or name not in names:
            yield from _unknown(key, str(name), value, values, prefix)
            continue
        entry = known[canonical(key)]
        if isinstance(value, bool) and "number" in entry.allowed:
            yield Problem(key, f"`{key}` is {show(value)}.", wrong_value(key, value), "wrong-value")
        elif entry.section and not isinstance(value, dict | list) and "text" not in entry.allowed:
            remedy = wrong_value(key, value)
            if "Did you mean" not in remedy:
                remedy = f"It takes keys of its own: {', '.join(children(key))}."
            yield Problem(key, f"`{key}` is {show(value)}.", remedy, "wrong-value")
        else:
            yield from _below(value, f"{key}.", entry.section or key == "data.eval")


def _below(value: Any, prefix: str, section: bool) -> Iterator[Problem]:
    if section and isinstance(value, dict):
        yield from _shape(value, prefix)
    elif section and isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, dict):
                yield from _shape(item, f"{prefix}{index}.")


def _unknown(key: str, name: str, value: Any, given: dict[str, Any], prefix: str) -> Iterator[Problem]:
    if prefix == "adapter.":
        remedy = peft_key(name, value, given)
        if remedy:
            yield Problem(key, f"`{key}` is not a key of the run file.", remedy, "unknown-key")
        return
    yield Problem(
        key,
        f"`{key}` is not a key of the run file.",
        unknown_key(prefix.rstrip("."), name, value, given),
        "unknown-key",
    )


def _from_pydantic(error: ValidationError, values: dict[str, Any]) -> Iterator[Problem]:
    found: dict[str, dict[str, Any]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_key(item["loc"], values), dict(item))
    for key, detail in found.items():
        if any(other.startswith(f"{key}.") for other in found):  # one branch of a union got further than the others
            continue
        if detail["type"] == "extra_forbidden":  # reported by _shape, with a hint
            continue
        yield _problem(key, detail, values)


def _key(location: tuple[int | str, ...], values: Any) -> str:
    """The dotted key of an error; pydantic's location also holds the names of union branches, which are left out."""
    parts: list[str] = []
    here = values
    for step in location:
        if isinstance(step, int):
            if isinstance(here, list) and step < len(here):
                here = here[step]
                parts.append(str(step))
            continue
        names = children(canonical(".".join(parts)))
        if step in names or (isinstance(here, dict) and step in here):
            here = here.get(step) if isinstance(here, dict) else None
            parts.append(step)
    if parts and parts[-1].isdigit() and parts[:2] not in (["data", "train"], ["data", "eval"]):
        parts.pop()  # a list of plain values is named as a whole; data sources one by one
    return ".".join(parts)


def _problem(key: str, detail: dict[str, Any], values: dict[str, Any]) -> Problem:
    known = canonical(key)
    while known not in keys() and "." in known:  # a key of a free mapping: what is known is said of the mapping
        known = known.rpartition(".")[0]
    line = keys()[known].line if known in keys() else ""
    if detail["type"] == "missing" and _lookup(key, values) is None:
        accepts = allowed(key)
        remedy = f"It takes {accepts}: {line}" if line else f"It takes {accepts}."
        return Problem(key, f"`{key}` is missing.", remedy, "missing-key")
    if detail["type"] == "value_error":  # our own validators write the whole sentence
        return Problem(key, str(detail["ctx"]["error"]), "", "wrong-value")
    value = _lookup(key, values)
    remedy = wrong_value(key, value)
    if line and "Did you mean" not in remedy:
        remedy = f"{remedy} {line}"
    return Problem(key, f"`{key}` is {show(value)}.", remedy.strip(), "wrong-value")


def _lookup(key: str, values: Any) -> Any:
    here = values
    for part in key.split("."):
        if isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        elif isinstance(here, dict):
            here = here.get(part)
        else:
            return None
    return here
