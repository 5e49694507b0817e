"""Chat templates read as a syntax tree before anything renders or compiles them.

transformers renders in Jinja's sandbox, which refuses attributes that lead to Python's inside. It does not bound work:
`'x' * 10**12` is computed while the template is compiled. What can be seen in the tree is refused here: dunder
attributes, numbers and powers larger than any conversation needs, text that doubles in a loop, loops over `range` in
loops over `range`. A template can still be slow in ways that show only when it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from luthier.errors import ArtifactError

LARGEST_NUMBER = 1_000_000
LARGEST_POWER = 64
LONGEST = 2**20  # characters
_MARKERS = re.compile(r"\{%-?\+?\s*(?:end)?generation\s*[-+]?%\}")  # transformers' own tag, unknown to plain Jinja
_NESTED_RANGES = 2


def check_template(template: Any, where: str) -> None:
    """Refuse a template, or any of a list of named ones, that tries to escape or to exhaust.

    Raises:
        ArtifactError: it does. A template that is no valid Jinja is left to what renders it.
    """
    for text in _texts(template):
        found = _finding(text)
        if found is not None:
            remedy = "Do not open this folder; get it, or a template that you have read, from a source you trust."
            raise ArtifactError(f"its chat template {found.why}.", code=found.code, where=where, remedy=remedy)


class Finding(NamedTuple):
    """What is wrong with a template, and what it does."""

    code: str
    why: str


@lru_cache(maxsize=64)
def _finding(text: str) -> Finding | None:
    """The first thing wrong with a template; opening a folder asks for the same one several times."""
    return next(_findings(text), None)


def _texts(template: Any) -> list[str]:
    if isinstance(template, str):
        return [template]
    if isinstance(template, dict):  # by name, or one of a list of {name, template}
        return [text for text in template.values() if isinstance(text, str)]
    return [text for item in template for text in _texts(item)] if isinstance(template, list) else []


def _findings(text: str) -> Iterator[Finding]:
    from jinja2 import Environment, TemplateError, nodes

    if len(text) > LONGEST:
        yield Finding("template-exhausts", f"has {len(text)} characters")
        return
    try:  # parsing computes nothing; compiling would
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKERS.sub("", text))
    except TemplateError:
        return
    except RecursionError:
        yield Finding("template-exhausts", "is nested without end")
        return
    try:
        yield from _in_tree(tree, nodes)
    except RecursionError:
        yield Finding("template-exhausts", "is nested without end")


def _in_tree(tree: Any, nodes: Any) -> Iterator[Finding]:
    for node in tree.find_all((nodes.Getattr, nodes.Name, nodes.Const, nodes.Pow, nodes.For, nodes.Filter)):
        if isinstance(node, nodes.Getattr) and node.attr.startswith("__"):
            yield Finding("template-escape", f"reaches for {node.attr}, which leads to Python's inside")
        elif isinstance(node, nodes.Const) and isinstance(node.value, str) and re.search(r"__\w+__", node.value):
            yield Finding("template-escape", f"holds the name {node.value[:60]!r}, which leads to Python's inside")
        elif isinstance(node, nodes.Const) and isinstance(node.value, int | float) and abs(node.value) > LARGEST_NUMBER:
            yield Finding(
                "template-exhausts",
                f"counts to {node.value:g}" if abs(node.value) < 1e300 else "counts without end",
            )
        elif isinstance(node, nodes.Pow) and not _small(node, nodes):
            yield Finding("template-exhausts", "raises to a power")
        elif isinstance(node, nodes.For):
            yield from _in_loop(node, nodes)
    for node in tree.find_all(nodes.Mul):
        if _product(node, nodes) > LARGEST_NUMBER:
            yield Finding("template-exhausts", "multiplies to more than any conversation needs")


def _small(power: Any, nodes: Any) -> bool:
    parts = (power.left, power.right)
    return all(isinstance(part, nodes.Const) and isinstance(part.value, int) and 0 <= part.value <= LARGEST_POWER for part in parts) and power.left.value**power.right.value <= LARGEST_NUMBER  # fmt: skip


def _product(node: Any, nodes: Any) -> float:
    if isinstance(node, nodes.Mul):
        return _product(node.left, nodes) * _product(node.right, nodes)
    if isinstance(node, nodes.Const) and isinstance(node.value, int) and not isinstance(node.value, bool):
        return max(1, min(abs(node.value), 10**30))
    return 1


def _in_loop(loop: Any, nodes: Any) -> Iterator[Finding]:
    inner = [node for node in [loop, *loop.find_all(nodes.For)] if _over_range(node, nodes)]
    if len(inner) > _NESTED_RANGES and _depth(loop, nodes) > _NESTED_RANGES:
        yield Finding("template-exhausts", "counts within counting within counting")
    for assign in loop.find_all(nodes.Assign):
        for grown in (nodes.Add, nodes.Concat):
            for node in assign.node.find_all(grown) if not isinstance(assign.node, grown) else [assign.node]:
                names = [_named(part, nodes) for part in (node.nodes if grown is nodes.Concat else (node.left, node.right))]  # fmt: skip
                if any(name and names.count(name) > 1 for name in names):
                    yield Finding("template-exhausts", "doubles a text in a loop")


def _over_range(loop: Any, nodes: Any) -> bool:
    return isinstance(loop.iter, nodes.Call) and _named(loop.iter.node, nodes) == "range"


def _depth(loop: Any, nodes: Any) -> int:
    """How many loops over `range` lie within each other."""
    own = 1 if _over_range(loop, nodes) else 0
    return own + max((_depth(inner, nodes) for part in loop.body for inner in _loops(part, nodes)), default=0)


def _loops(node: Any, nodes: Any) -> list[Any]:
    return [node] if isinstance(node, nodes.For) else list(node.find_all(nodes.For))


def _named(node: Any, nodes: Any) -> str:
    if isinstance(node, nodes.Name):
        return str(node.name)
    return f"{_named(node.node, nodes)}.{node.attr}" if isinstance(node, nodes.Getattr) else ""
