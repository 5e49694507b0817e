"""The run file's keys by their dotted names, and what each accepts in words: one source for errors and documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from luthier.config.schema import RunConfig


@dataclass(frozen=True)
class Key:
    """One key of the run file.

    Attributes:
        name: dotted name, e.g. ``optim.lr``.
        allowed: what it accepts, in words.
        required: whether it must be given.
        default: the default as YAML writes it; empty for blocks and required keys.
        line: the schema's line about it.
        section: whether further keys stand below it.
    """

    name: str
    allowed: str
    required: bool
    default: str
    line: str
    section: bool


@cache
def schema() -> dict[str, Any]:
    """JSON Schema of the run file, made once."""
    return RunConfig.model_json_schema()


@cache
def keys() -> dict[str, Key]:
    """All keys by dotted name, in the schema's order; the keys of a data source stand once, below ``data.train``."""
    return {key.name: key for key in _walk("", schema())}


def children(prefix: str) -> list[str]:
    """Names directly below ``prefix`` (empty for the top level)."""
    prefix = "data.train" if prefix == "data.eval" else prefix
    start = f"{prefix}." if prefix else ""
    return [name[len(start) :] for name in keys() if name.startswith(start) and "." not in name[len(start) :]]


def canonical(key: str) -> str:
    """The schema's name for a key of a file: list positions removed, ``data.eval``'s sources read as ``data.train``'s."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    if parts[:2] == ["data", "eval"] and len(parts) > 2:
        parts[1] = "train"
    return ".".join(parts)


def allowed(key: str) -> str:
    """What ``key`` accepts, in words; empty for keys the schema does not know (peft's own)."""
    found = keys().get(canonical(key))
    return found.allowed.replace("the keys below", "keys") if found else ""


def literals(key: str) -> list[str]:
    """The words ``key`` may be set to, where it takes only certain words."""
    node: dict[str, Any] = schema()
    for part in canonical(key).split("."):
        node = _properties(node).get(part, {})
    return [value for option in _options(node) for value in option.get("enum", [option.get("const")]) if value]


def _walk(prefix: str, node: dict[str, Any]) -> Iterator[Key]:
    required = [name for option in _options(node) for name in option.get("required", [])]
    for name, field in _properties(node).items():
        dotted = f"{prefix}{name}"
        below = _properties(field)
        if dotted == "data.eval":  # its sources have the keys of data.train's
            below = {}
        line = " ".join(field.get("description", "").split())
        needed = name in required
        yield Key(dotted, words(field), needed, "" if needed else _default(field), line, bool(below))
        if below:
            yield from _walk(f"{dotted}.", field)


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if isinstance(value, dict):
        return "" if value else "{}"
    if isinstance(value, float) and value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:g}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(str(item) for item in value) + "]"
    return str(value)


def _resolve(node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        return schema()["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node


def _options(node: dict[str, Any]) -> list[dict[str, Any]]:
    node = _resolve(node)
    if "anyOf" in node:
        return [leaf for option in node["anyOf"] for leaf in _options(option)]
    return [node]


def _properties(node: dict[str, Any]) -> dict[str, Any]:
    for option in _options(node):
        if "properties" in option:
            return option["properties"]
    return {}


_PLAIN = {"string": "text", "boolean": "true or false", "null": "null", "object": "a mapping"}


def words(node: dict[str, Any]) -> str:
    """Describe a JSON Schema node: ``a number above 0, or null``."""
    found: list[str] = []
    for option in _options(node):
        text = _one(option)
        if text not in found:
            found.append(text)
    return ", or ".join(found)


def _one(option: dict[str, Any]) -> str:
    if "const" in option:
        return str(option["const"])
    if "enum" in option:
        return "one of " + ", ".join(str(value) for value in option["enum"])
    kind = option.get("type", "")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(option)
    if kind == "array":
        if "prefixItems" in option:
            first = option["prefixItems"][0]
            return f"a list of {len(option['prefixItems'])} numbers{_bounds(first)}"
        items = words(option.get("items", {}))
        return "a list of these" if "mapping" in items else f"a list of {items.removeprefix('one of ')}"
    if kind == "object" and "properties" in option:
        return "a mapping of the keys below"
    return _PLAIN.get(kind, "any value")


def _bounds(option: dict[str, Any]) -> str:
    names = {
        "exclusiveMinimum": "above",
        "minimum": "from",
        "exclusiveMaximum": "below",
        "maximum": "up to",
    }
    parts = [f"{word} {option[name]:g}" for name, word in names.items() if name in option]
    return " " + " and ".join(parts) if parts else ""
