"""YAML as people write it in run files: safe values only, no key twice, ``1e-4`` a number, every key with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from luthier.errors import RequestError

_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_FLOAT = "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"
_NUMBER = re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; YAML 1.1's dates stay text, and an exponent needs neither a dot nor a sign."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_FLOAT, _NUMBER, list("-+.0123456789"))


@dataclass(frozen=True)
class Document:
    """A YAML text's value, and the line (from 1) of every key by its dotted name."""

    value: Any
    lines: dict[str, int]


def load(text: str, where: str) -> Document:
    """Read one YAML document; ``where`` names it in errors.

    Raises RequestError with the line for a syntax error or a key that stands twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        if node is None:
            return Document(None, lines)
        _walk(node, "", lines, set(), where)
        return Document(loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        raise _syntax_error(error, where) from error
    finally:
        loader.dispose()


def load_value(text: str, where: str) -> Any:
    """Read the right-hand side of an override, ``key.sub=value``."""
    return load(text, where).value


def _walk(node: yaml.Node, prefix: str, lines: dict[str, int], seen: set[int], where: str) -> None:
    if id(node) in seen:  # an alias may point back at its own parent
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, f"{prefix}{index}.", lines, seen, where)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == _MERGE or not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                raise RequestError(
                    f"`{prefix}{key.value}` stands twice, in lines {first[key.value]} and {line}; "
                    "YAML would silently keep the second.",
                    code="duplicate-key",
                    where=f"{where}, line {line}",
                    remedy="Delete one of them.",
                )
            first[key.value] = line
            lines[f"{prefix}{key.value}"] = line
            _walk(value, f"{prefix}{key.value}.", lines, seen, where)


def _syntax_error(error: yaml.YAMLError, where: str) -> RequestError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    line = f", line {mark.line + 1}" if mark is not None else ""
    remedy = (
        "Indent with spaces, write `key: value` with a space after the colon, and quote text that holds `: ` or `#`."
    )
    if "\\t" in problem:
        remedy = "Replace the tab by spaces."
    return RequestError(f"This is not valid YAML: {problem}.", code="yaml", where=f"{where}{line}", remedy=remedy)
