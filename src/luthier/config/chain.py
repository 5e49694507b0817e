"""Several stages in one run file: what each of them is, with the keys that they share laid under its own."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.config import paths
from luthier.config.read import EXCLUSIVE, SHORT_FORM, Origin, check, file_of, override, parse_run
from luthier.config.schema import RunConfig, three_words
from luthier.errors import RequestError

_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True)
class Stage:
    """One stage: its number from 1, its name, and its run."""

    number: int
    name: str
    config: RunConfig

    @property
    def title(self) -> str:
        return f"{self.number}-{self.name}"


@dataclass(frozen=True)
class Chain:
    """Stages in their order; each writes to ``output/NUMBER-NAME``. ``values`` are the file's own, paths made absolute."""

    output: Path
    stages: tuple[Stage, ...]
    values: dict[str, Any]

    def stage(self, wanted: str) -> Stage:
        """A stage by number or name; raises RequestError where there is none."""
        for stage in self.stages:
            if wanted in (str(stage.number), stage.name, stage.title):
                return stage
        raise _no_stage(wanted, [stage.title for stage in self.stages], "--stage")


def read(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig | Chain:
    """Read a run file of one run or of several stages; raises RequestError as ``read_run``, for any of the stages."""
    values, origin = file_of(Path(path))
    if not values.get("stages"):
        return check(values, origin, overrides, look=paths.resolve)
    return _chain(values, origin, overrides)


def parse(mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig | Chain:
    """The same from a mapping."""
    values = copy.deepcopy(dict(mapping))
    return _chain(values, Origin(""), overrides) if values.get("stages") else parse_run(values, overrides)


def read_stored(folder: Path, overrides: Sequence[str] = ()) -> Chain | None:
    """The chain whose output a folder is, with the folder's present place; None where it is none."""
    if not (folder / "run.yaml").is_file():
        return None
    values, origin = file_of(folder / "run.yaml")
    if not values.get("stages"):
        return None
    values["output"] = str(folder.resolve())
    return _chain(values, origin, overrides)


def is_chain(folder: Path) -> bool:
    """Whether a folder is the output of a run file with stages."""
    return (folder / "run.yaml").is_file() and bool(file_of(folder / "run.yaml")[0].get("stages"))


def _chain(values: dict[str, Any], origin: Origin, overrides: Sequence[str]) -> Chain:
    items = values.pop("stages")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RequestError("`stages` is a list of blocks of keys.", code="wrong-value", where=origin.where("stages"), remedy="stages: [{name: first, …}, {name: second, …}]")  # fmt: skip
    output = [text.partition("=")[2] for text in overrides if text.partition("=")[0].strip() == "output"]
    values["output"] = output[-1] if output else values.get("output")
    if not values["output"] or not isinstance(values["output"], str):
        raise RequestError("`output` is missing.", code="missing-key", where=origin.where("output"), remedy="Name the folder that holds the stages' folders.")  # fmt: skip
    parent = Path(os.path.abspath(paths.expand(values["output"], "output")))
    values["output"] = str(parent)
    names = [_name(item, index, origin) for index, item in enumerate(items)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise RequestError(f"two stages are called {twice[0]}.", code="stage-name", where=origin.where("stages"), remedy="Give each a name of its own.")  # fmt: skip
    given = _by_stage(overrides, names)
    stages: list[Stage] = []
    for index, (item, name) in enumerate(zip(items, names, strict=True)):
        shared = values if index + 1 == len(items) else {key: value for key, value in values.items() if key != "push"}
        merged = _laid_over(shared, {key: value for key, value in item.items() if key != "name"})
        for text in given[index]:
            override(merged, text)
        _follow(merged, item, stages[-1] if stages else None, origin, index)
        merged["output"] = str(parent / f"{index + 1}-{name}")
        own = replace(origin, prefix=f"stages.{index}.")
        try:
            config = check(merged, own, (), look=paths.resolve_later if stages else paths.resolve)
        except RequestError as error:
            raise RequestError(f"stage {index + 1}-{name}: {error.message}", code=error.code, where=error.where, remedy=error.remedy) from None  # fmt: skip
        stages.append(Stage(index + 1, name, config))
    resolved = [{"name": stage.name, **_plain(stage, merged)} for stage, merged in zip(stages, items, strict=True)]
    return Chain(parent, tuple(stages), {"format": 1, "output": str(parent), "stages": resolved})


def _plain(stage: Stage, item: Mapping[str, Any]) -> dict[str, Any]:
    """A stage as the parent's run.yaml holds it: every key given, paths absolute; what it takes from the stage before is left to it."""
    values = stage.config.model_dump(mode="json", exclude_unset=True)
    values.pop("output", None)
    adapter = values.get("adapter")
    if adapter and stage.number > 1 and not (isinstance(item.get("adapter"), dict) and item["adapter"].get("from")):
        adapter.pop("from", None)
    if stage.number > 1 and stage.config.adapter is None and not item.get("model"):
        values.get("model", {}).pop("path", None)
    return values


def _name(item: Mapping[str, Any], index: int, origin: Origin) -> str:
    name = str(item.get("name", item.get("adapter", {}).get("then") if isinstance(item.get("adapter"), dict) else None) or f"stage{index + 1}")  # fmt: skip
    if not _NAME.fullmatch(name):
        raise RequestError(f"the name of a stage becomes a folder's, and {name!r} is none.", code="stage-name", where=origin.where(f"stages.{index}.name"), remedy="Use letters, digits, - and _.")  # fmt: skip
    return name


def _by_stage(overrides: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Overrides by stage: ``stages.2.train.steps=9`` (by number or name) is one stage's, any other is everyone's."""
    given: list[list[str]] = [[] for _ in names]
    for text in overrides:
        key = text.partition("=")[0].strip()
        if not key.startswith("stages."):
            for each in (
                given[-1:] if key.partition(".")[0] == "push" else given
            ):  # only the last stage's result is the chain's
                each += [text] if key != "output" else []
            continue
        _, wanted, rest = (*text.split(".", 2), "")[:3]
        titles = [f"{index + 1}-{name}" for index, name in enumerate(names)]
        at = next((i for i, name in enumerate(names) if wanted in (str(i + 1), name, titles[i])), None)
        if at is None:
            raise _no_stage(wanted, titles, f"override {text}")
        given[at].append(rest)
    return given


def _no_stage(wanted: str, titles: Sequence[str], where: str) -> RequestError:
    return RequestError(f"there is no stage {wanted!r}.", code="no-stage", where=where, remedy=f"There are {', '.join(titles)}; the first is 1.")  # fmt: skip


def _follow(values: dict[str, Any], item: Mapping[str, Any], before: Stage | None, origin: Origin, index: int) -> None:
    """Start a stage from the one before it, unless it says where to start."""
    own_model = item.get("model")
    if before is None or (own_model if isinstance(own_model, str) else (own_model or {}).get("path")):
        return
    adapter = values.get("adapter")
    if isinstance(adapter, dict) and adapter.get("from"):
        values["model"] = {key: value for key, value in _block(values, "model").items() if key != "path"}
        return
    folder = before.config.output
    model = {key: value for key, value in _block(values, "model").items() if key not in ("path", "revision")}
    if before.config.adapter is None:
        if isinstance(adapter, dict) and adapter.get("then"):
            raise RequestError(
                f"adapter.then is {adapter['then']}, and the stage before, {Path(folder).name}, trains the whole model, so it leaves no adapter.",
                code="no-adapter",
                where=origin.where(f"stages.{index}.adapter"),
                remedy="Leave `then` out: this stage starts from the whole model anyway.",
            )
        values["model"] = {**model, "path": f"{folder}/final"}
        return
    if not isinstance(adapter, dict) or not adapter.get("then"):
        raise RequestError(
            f"stage {index + 1} comes after an adapter and does not say what becomes of it.",
            code="no-then",
            where=origin.where(f"stages.{index}"),
            remedy=three_words(folder) + " In a chain `from` may be left out.",
        )
    values["model"] = model
    values["adapter"] = {**adapter, "from": folder}


def _block(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    if isinstance(found, str):
        return {SHORT_FORM[key]: found}
    return dict(found) if isinstance(found, dict) else {}


def _laid_over(common: Mapping[str, Any], item: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The item's keys over the common ones, block by block; of two keys that exclude each other the item's stays."""
    merged = copy.deepcopy(dict(common))
    for key, value in item.items():
        name = f"{prefix}{key}"
        below = _block(merged, key) if name in ("model", "adapter") else merged.get(key)
        for pair in EXCLUSIVE:
            if name in pair:
                merged.pop((set(pair) - {name}).pop().rpartition(".")[2], None)
        if isinstance(value, dict) and isinstance(below, dict) and not name.startswith("data."):
            merged[key] = _laid_over(below, value, f"{name}.")
        else:
            merged[key] = copy.deepcopy(value)
    return merged
