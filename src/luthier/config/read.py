"""Reading and writing run files: every wrong request ends here, before any model is loaded.

``read_run`` takes a YAML file, ``parse_run`` a mapping; both take ``key.sub=value`` overrides, check every key and
value, and make paths absolute. ``write_run`` writes all keys, and reading that file gives the same config again.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luthier.config import paths, yaml_text
from luthier.config.check import Problem, validate
from luthier.config.schema import RunConfig
from luthier.errors import RequestError

EXCLUSIVE = (("train.epochs", "train.steps"), ("train.batch_tokens", "train.batch_samples"))
SHORT_FORM = {"model": "path", "data.train": "path", "data.eval": "path", "adapter": "type", "push": "id"}


def read_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file; raises RequestError naming the key, its line, what is allowed and the remedy."""
    values, origin = file_of(Path(path))
    return check(values, origin, overrides, look=paths.resolve)


def read_resolved(path: str | os.PathLike[str]) -> RunConfig:
    """Read the ``run.yaml`` of a run folder as it was written: nothing expands, and no path is looked for."""
    values, origin = file_of(Path(path))
    return check(values, origin, (), look=lambda config: config)


def parse_run(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file's content from a mapping; raises RequestError naming the key."""
    return check(copy.deepcopy(dict(mapping)), Origin(""), overrides, look=paths.resolve)


def write_run(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write every key of ``config`` as YAML: equal configs give equal bytes, and a reader sees the old file or the new."""
    path = Path(path)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def json_schema() -> dict[str, Any]:
    """JSON Schema of the run file, for editors and ``luthier schema``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RunConfig.model_json_schema(),
        "title": "Luthier run file",
    }


@dataclass(frozen=True)
class Origin:
    """Where a value came from: a file with lines, or the command line."""

    name: str
    lines: dict[str, int] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    prefix: str = ""

    def where(self, key: str) -> str:
        """The nearest place that can be pointed at: the override, the key's line or that of the block around it.

        With a ``prefix`` (a stage's) its own keys are looked for before those that all stages share.
        """
        for override, text in self.overrides.items():
            if key == override or key.startswith(f"{override}."):
                return f"override {text}"
        own = self.lines.get(f"{self.prefix}{key}") if self.prefix else None
        if own is not None:
            return f"{self.name}, line {own}"
        parts = key.split(".")
        while parts:
            line = self.lines.get(".".join(parts))
            if line is not None:
                return f"{self.name}, line {line}"
            parts.pop()
        stage = self.lines.get(self.prefix.rstrip(".")) if self.prefix else None
        return f"{self.name}, line {stage}" if stage is not None else self.name


def file_of(path: Path) -> tuple[dict[str, Any], Origin]:
    """A run file's content, and where each key stands."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RequestError(
            f"The run file does not exist. {paths.suggestion(Path(os.path.abspath(path)))}",
            code="missing-run-file",
            where=str(path),
            remedy="`luthier demo` makes one to start from.",
        ) from None
    except IsADirectoryError:
        raise RequestError(
            "This is a folder; a run file is wanted.",
            code="missing-run-file",
            where=str(path),
            remedy=f"To go on with a run: `luthier resume {path}`.",
        ) from None
    except UnicodeDecodeError as error:
        raise RequestError(
            f"The run file is not UTF-8 (byte {error.start}).",
            code="encoding",
            where=str(path),
            remedy="Save it as UTF-8.",
        ) from error
    except OSError as error:
        raise RequestError(
            f"The run file can't be read: {error.strerror}.", code="missing-run-file", where=str(path)
        ) from error
    document = yaml_text.load(text, str(path))
    if not isinstance(document.value, dict):
        raise RequestError(
            "A run file is a mapping of keys; this one is empty."
            if document.value is None
            else "A run file is a mapping of keys; this is something else.",
            code="not-a-mapping",
            where=str(path),
            remedy="It needs at least `model`, `data` and `output`.",
        )
    return document.value, Origin(str(path), document.lines)


def check(values: dict[str, Any], origin: Origin, overrides: Sequence[str], *, look: Any) -> RunConfig:
    """A run from plain values and overrides; ``look`` makes its paths absolute. Raises RequestError for what is wrong."""
    texts: dict[str, str] = {}
    for text in overrides:
        texts[override(values, text)] = text
    origin = Origin(origin.name, origin.lines, texts, origin.prefix)
    if values.get("stages"):
        raise RequestError(
            "this run file has several stages, and one run is wanted here.",
            code="several-stages",
            where=origin.where("stages") or "stages",
            remedy="Train it as it is (`luthier train`), or name one of them: --stage 1.",
        )
    config, problems = validate(values)
    if config is None:
        raise _error(problems, origin)
    try:
        return look(config)
    except RequestError as error:
        where = origin.where(error.where) or error.where
        raise RequestError(error.message, code=error.code, where=where, remedy=error.remedy) from None


def override(values: dict[str, Any], text: str) -> str:
    """Put ``key.sub=value`` into ``values``; returns the key."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RequestError(
            f"`{text}` is no override.",
            code="override",
            where="command line",
            remedy="Write key.sub=value, as in optim.lr=1e-4.",
        )
    parts = key.split(".")
    here: Any = values
    for depth, part in enumerate(parts[:-1]):
        name = ".".join(parts[: depth + 1])
        below = here.get(part)
        if isinstance(below, str) and name in SHORT_FORM:
            below = None if name == "adapter" and below.lower() == "none" else {SHORT_FORM[name]: below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise RequestError(
                f"`{key}` can't be set: `{name}` is {type(below).__name__ if isinstance(below, list) else below} here, "
                "not a block of keys.",
                code="override",
                where=f"override {text}",
                remedy=f"Override `{name}` as a whole.",
            )
        here[part] = below
        here = below
    here[parts[-1]] = yaml_text.load_value(value, f"override {text}")
    if here[parts[-1]] is not None:
        for pair in EXCLUSIVE:
            if key in pair:
                here.pop((set(pair) - {key}).pop().rpartition(".")[2], None)
    return key


def _error(problems: list[Problem], origin: Origin) -> RequestError:
    if len(problems) == 1:
        problem = problems[0]
        where = origin.where(problem.key) or problem.key
        return RequestError(problem.message, code=problem.code, where=where, remedy=problem.remedy)
    lines = []
    for problem in problems:
        place = origin.where(problem.key).removeprefix(f"{origin.name}, ")
        place = f"{place}: " if place and place != origin.name else ""
        lines.append(f"- {place}{problem.message} {problem.remedy}".rstrip())
    return RequestError(
        f"{len(problems)} things are wrong in the run file.\n" + "\n".join(lines),
        code=problems[0].code,
        where=origin.name,
    )
