"""The page of failures names tests that exist, and every test of a failure stands on it with the reports it quotes."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "failures"
PAGE = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
REPORT = re.compile(r"\b[A-Z]{1,2}#\d+|\bS[1-5]\b")


def rows() -> list[tuple[str, list[str]]]:
    """Each row of the tables, and the tests that it names as ``folder/file.py::test``."""
    found = [(line, re.findall(r"`([\w/]+\.py::\w+)`", line)) for line in PAGE.splitlines() if line.startswith("| ")]
    return [(line, [name if "/" in name else f"tests/failures/{name}" for name in names]) for line, names in found]


def functions_of(file: Path) -> dict[str, str]:
    """The tests of a file, with their docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {node.name: ast.get_docstring(node) or "" for node in functions}


def test_every_test_that_the_page_names_exists():
    named = [name for _, names in rows() for name in names]
    assert len(named) > 40
    missing = [name for name in named if name.split("::")[1] not in functions_of(ROOT / name.split("::")[0])]
    assert missing == []


def test_every_row_of_the_tables_names_a_test():
    ordinary = [line for line, names in rows() if not names and not line.startswith(("| ---", "| reports |", "| | what", "| tool |"))]  # fmt: skip
    assert ordinary == []


def test_every_test_of_a_failure_stands_on_the_page_with_the_reports_it_quotes():
    lines = {name: line for line, names in rows() for name in names}
    for file in sorted(FOLDER.glob("test_*.py")):
        for name, text in functions_of(file).items():
            row = lines.get(f"tests/failures/{file.name}::{name}")
            assert row is not None, f"{file.name}::{name} is on no row"
            assert text, f"{name} quotes no report"
            if not row.startswith(("| S", "| any", "| torchtune")):
                assert set(REPORT.findall(text)) <= set(REPORT.findall(row)), (
                    f"{name} quotes other reports than its row"
                )
