"""YAML as people write it in run files: safe values only, no key twice, ``1e-4`` a number, every key with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from luthier.errors import RequestError

LARGEST = 4 * 2**20  # characters
MOST_VALUES = 200_000
DEEPEST = 500  # brackets within brackets
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
    if len(text) > LARGEST:
        raise RequestError(f"This YAML file has {len(text)} characters, more than any run file needs.", code="yaml", where=where)  # fmt: skip
    if _brackets(text) > DEEPEST:  # PyYAML's time grows with the square of it
        raise RequestError("This YAML is nested too deeply.", code="yaml", where=where)
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise _syntax_error(error, where) from error
    try:
        node = loader.get_single_node()
        _count(node, where)
        lines: dict[str, int] = {}
        if node is None:
            return Document(None, lines)
        _walk(node, "", lines, set(), where)
        return Document(loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        raise _syntax_error(error, where) from error
    except RecursionError:
        raise RequestError("This YAML is nested too deeply.", code="yaml", where=where) from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # a value that its own tag does not allow
        raise RequestError(f"This is not valid YAML: {error}.", code="yaml", where=where) from error
    finally:
        loader.dispose()


def load_value(text: str, where: str) -> Any:
    """Read the right-hand side of an override, ``key.sub=value``."""
    return load(text, where).value


def _brackets(text: str) -> int:
    """How deep brackets lie within each other, those in quoted texts included."""
    depth = deepest = 0
    for match in re.finditer(r"[\[\]{}]", text):
        depth = depth + 1 if match[0] in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
        if deepest > DEEPEST:
            break
    return deepest


def _count(node: yaml.Node | None, where: str) -> None:
    """Refuse aliases that multiply: nine lists of nine references each are a few hundred bytes and 10⁹ values."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known is None:
            sizes[id(node)] = 1  # an alias may point back at its own parent
            inner = node.value if isinstance(node, yaml.SequenceNode) else ()
            if isinstance(node, yaml.MappingNode):
                inner = [part for pair in node.value for part in pair]
            known = sizes[id(node)] = 1 + sum(map(size, inner))
        return known

    if node is not None and size(node) > MOST_VALUES:
        raise RequestError(f"This YAML stands for more than {MOST_VALUES} values, by aliases that multiply.", code="yaml", where=where, remedy="Write the values out.")  # fmt: skip


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
