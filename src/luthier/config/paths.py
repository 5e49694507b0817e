"""Paths in the run file: ``~`` and ``${VAR}`` expand, local ones become absolute, and what is not there is named now."""

from __future__ import annotations

import difflib
import glob
import os
import re
from pathlib import Path

from luthier.config.schema import RunConfig, Source, SourceConfig, Sources
from luthier.errors import RequestError

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_SEPARATORS = ("/", "\\") if os.name == "nt" else ("/",)


def resolve(config: RunConfig) -> RunConfig:
    """Return a copy with every local path absolute.

    Raises RequestError, its ``where`` the key, for a variable that is not set, a model, template or data file that
    is not there, and an output that is or lies inside the model.
    """
    return _resolved(config, there=True)


def resolve_later(config: RunConfig) -> RunConfig:
    """The same for a stage whose model may be what the stage before it has yet to write."""
    return _resolved(config, there=config.model.path == "" or Path(config.model.path).name != "final")


def _resolved(config: RunConfig, *, there: bool) -> RunConfig:
    config = config.model_copy(deep=True)
    model = config.model
    if model.path and there:
        model.path = _model(expand(model.path, "model.path"))
    if config.adapter is not None and config.adapter.start is not None:
        config.adapter.start = _start(expand(config.adapter.start, "adapter.from"))
    if model.template is not None:
        model.template = _template(expand(model.template, "model.template"))
    config.data.train = _sources(config.data.train, "data.train")
    if not isinstance(config.data.eval, float | None):
        config.data.eval = _sources(config.data.eval, "data.eval")
    config.output = _output(expand(config.output, "output"), model.path)
    return config


def expand(text: str, key: str) -> str:
    """Replace ``~`` at the start and every ``${VAR}``; raises RequestError for a variable that is not set."""

    def variable(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise RequestError(
                f"`{key}` is {text}, but the environment variable {name} is not set.",
                code="unset-variable",
                where=key,
                remedy=f"Set {name}, or write the path out.",
            )
        return os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(variable, text))


def suggestion(path: Path) -> str:
    """Name the entries beside a missing path that resemble it, or the first folder on the way that is missing."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.parent.is_dir():
            parent = parent.parent
        return f"There is no folder {parent}."
    names = sorted(entry.name for entry in parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(str(parent / name) for name in close)}?"
    return f"{parent} holds {', '.join(names[:5]) or 'nothing'}{', …' if len(names) > 5 else ''}."


def _model(text: str) -> str:
    path = Path(text)
    looks_local = text.startswith((".", "~", *_SEPARATORS)) or text.endswith(".gguf") or not _HUB_ID.match(text)
    if path.exists():
        return os.path.abspath(path)
    if looks_local or path.is_absolute():
        raise _missing("model.path", path, "Give a folder in transformers format, a GGUF file, or a hub id (org/name).")
    return text


def _start(text: str) -> str:
    """An adapter's place made absolute; whether it is there is looked at where it is needed, which a resumed run doesn't."""
    return os.path.abspath(text)


def _template(text: str) -> str:
    path = Path(text)
    if text == "chatml" and not path.exists():
        return text
    if "{{" in text or "{%" in text:
        raise RequestError(
            "`model.template` holds a template itself; it takes `chatml` or the path of a Jinja file.",
            code="template",
            where="model.template",
            remedy="Write the template into a file, e.g. template.jinja, and give its path.",
        )
    if not path.is_file():
        raise _missing("model.template", path, "It takes `chatml`, or the path of a Jinja file.")
    return os.path.abspath(path)


def _sources(value: Sources, key: str) -> Sources:
    if isinstance(value, list):
        return [_source(item, f"{key}.{index}") for index, item in enumerate(value)]
    return _source(value, key)


def _source(value: Source, key: str) -> Source:
    if isinstance(value, SourceConfig):
        value.path = _data(value.path, f"{key}.path")
        return value
    return _data(value, key)


def _data(text: str, key: str) -> str:
    text = expand(text, key)
    path = Path(text)
    if path.exists():
        return os.path.abspath(path)
    if any(character in text for character in "*?["):
        if not glob.glob(text, recursive=True):
            raise RequestError(
                f"`{key}` is {text}, which matches no file (relative paths start at {Path.cwd()}).",
                code="missing-path",
                where=key,
                remedy="Check the pattern; `**` matches folders at any depth.",
            )
        return os.path.abspath(path)
    has_parent = any(mark in text for mark in _SEPARATORS) and path.parent.is_dir()
    looks_local = (
        path.is_absolute()
        or text.startswith((".", "~"))
        or path.suffix.lower() in _DATA_SUFFIXES
        or (path.suffix != "" and path.parent == Path("."))
        or has_parent
        or not _HUB_ID.match(text)
    )
    if looks_local:
        raise _missing(key, path, "Give a file, a folder, a glob, or the id of a hub data set (org/name).")
    return text


def _output(text: str, model: str) -> str:
    path = Path(os.path.abspath(text))
    if path.is_file():
        raise RequestError(
            f"`output` is {text}, which is a file.", code="output", where="output", remedy="Give a folder."
        )
    base = Path(model)
    if model and base.is_absolute() and (path.resolve() == base.resolve() or base.resolve() in path.resolve().parents):
        raise RequestError(
            f"`output` is {text}, which is or lies inside the model that is read, {model}; the run would write over it.",
            code="output",
            where="output",
            remedy="Give a folder elsewhere, e.g. runs/my-run.",
        )
    return str(path)


def _missing(key: str, path: Path, remedy: str) -> RequestError:
    relative = "" if path.is_absolute() else f" (relative paths start at {Path.cwd()})"
    return RequestError(
        f"`{key}` is {path}, which does not exist{relative}. {suggestion(path.absolute())}",
        code="missing-path",
        where=key,
        remedy=remedy,
    )
