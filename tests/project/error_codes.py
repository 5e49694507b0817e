"""The error codes that the source can give, read from its syntax trees: nothing is imported or run."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "luthier"
EXITS = {"LuthierError": "1", "RequestError": "2", "ArtifactError": "3", "Stopped": "75"}
_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def error_codes() -> dict[str, set[str]]:
    """Every code, with the exit codes of the errors raised with it; none for what is only listed as a problem."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                for code in _codes(node, name):
                    found[code] |= {EXITS[name]} if name in EXITS else set()
    return dict(found)


def _codes(call: ast.Call, name: str) -> Iterator[str]:
    keyword = next((k.value for k in call.keywords if k.arg == "code"), None)
    if isinstance(keyword, ast.Constant) and isinstance(keyword.value, str):
        yield keyword.value
    texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if name in ("Problem", "_error", "Finding"):  # a code among texts
        yield from (text for text in texts if _CODE.fullmatch(text))
    if name == "_broken" and len(call.args) == 5:  # (path, kind, code, message, remedy)
        yield from (a.value for a in call.args[2:3] if isinstance(a, ast.Constant))
