"""What a stage starts from: an adapter that was trained before, and what becomes of it; all found before weights are read."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.artifacts import fingerprint
from luthier.artifacts import identify as artifacts
from luthier.artifacts import manifest as manifests
from luthier.artifacts.run_folder import Found, published
from luthier.artifacts.tensorfile import read_header
from luthier.config import compare
from luthier.config.hints import show
from luthier.config.read import read_resolved
from luthier.config.schema import AdapterConfig, RunConfig, three_words
from luthier.errors import RequestError
from luthier.models import adapters, stack
from luthier.models.adapter_config import described
from luthier.training.locate import Location, locate

WEIGHTS = "adapter_model.safetensors"
_LEFT = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "trainer_state.json", "rng_state.pth")


@dataclass(frozen=True)
class Origin:
    """The adapter that a fresh stage starts from.

    Attributes:
        folder: its adapter folder.
        base: fingerprint of the base it was trained on; empty where nothing says so.
        own_base: the ``base/`` of the run it is from, which this run keeps a copy of.
        stack: its manifest's ``stack``, where it is a stacked pair.
        moments: the checkpoint whose optimiser is carried over.
        parent: what this stage's results name as their parent.
        notes: what the log says about it.
    """

    then: str
    folder: Path
    base: str
    own_base: Path | None
    stack: dict[str, Any] | None
    moments: Found | None
    parent: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def settle(config: RunConfig, run: Path, allow: Collection[str] = ()) -> tuple[RunConfig, Origin | None]:
    """Fill in what ``adapter.from`` decides (base, precision, template, longest row, the adapter's own settings).

    Of a run that has saved something, the choices of then stand, and the origin need not be there any more.

    Raises:
        RequestError: `model` is an adapter, there is no adapter at `from`, it is on another base, or a key contradicts it.
        ArtifactError: it is damaged.
    """
    if published(run) and (run / "run.yaml").is_file():
        return _as_begun(config, read_resolved(run / "run.yaml")), None
    refuse_adapter(config.model.path)
    if config.adapter is None or config.adapter.start is None:
        return config, None
    found = locate(config.adapter.start)
    folder = found.path / "adapter" if found.kind == "checkpoint" else found.path
    if not (folder / "adapter_config.json").is_file():
        raise RequestError(
            f"there is no adapter at {found.path}; it is of kind {found.kind}.",
            code="no-adapter",
            where="adapter.from",
            remedy=f"To train a whole model further: model: {found.path}, and leave adapter.from and adapter.then out.",
        )
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    facts = manifests.read(found.path).facts if (found.path / manifests.NAME).is_file() else {}
    config = _filled(config.model_copy(deep=True), found, saved)
    if not config.model.template and (folder / "chat_template.jinja").is_file() and _lacks_template(config.model.path):
        config.model.template = str(folder / "chat_template.jinja")
    expected = (facts.get("base") or {}).get("fingerprint") or _in_header(folder / WEIGHTS)
    _check_base(config, expected, folder, allow)
    assert config.adapter is not None and config.adapter.then is not None
    then = config.adapter.then
    if then == "continue":
        config.adapter = _own_settings(config.adapter, found, saved, facts.get("stack"))
    else:
        adapters.check(config.adapter)
    if then == "stack":
        _check_stack(config, saved, folder)
    notes = [_said(config, found)]
    left = sorted(path.name for path in folder.iterdir() if path.name in _LEFT or path.name.startswith("rng_state"))
    if left:
        notes.append(f"another tool's training state is not carried over: {', '.join(left)}")
    parent = {"kind": "adapter", "name": str(found.path), "fingerprint": _of_adapter(folder)}
    if found.run is not None:
        parent["run"] = str(found.run)
    own = Path(config.model.path)
    is_own = own.name == "base" and (own / manifests.NAME).is_file() and (own.parent / "run.yaml").is_file()
    return config, Origin(
        then, folder, expected, own if is_own else None, facts.get("stack"),
        _moments(config, found, facts), parent, notes,
    )  # fmt: skip


def look(config: RunConfig) -> None:
    """Find everything that `settle` would find, of a stage that begins later."""
    settle(config, Path(config.output))


def refuse_adapter(path: str) -> None:
    """Raises RequestError where a base is wanted and the path leads to an adapter; the text can be pasted from."""
    folder = Path(path)
    if not path or not folder.is_dir():
        return
    names = {entry.name for entry in folder.iterdir()}
    found = artifacts.identify(folder) if names & {"run.yaml", "trainer"} else None
    if "adapter_config.json" in names and "config.json" in names:
        what, code = "holds both a model and an adapter", "adapter-in-base"
    elif "adapter_config.json" in names:
        what, code = "is an adapter, not a base model", "adapter-as-base"
    elif found is not None and found.kind in ("run", "checkpoint"):
        if found.adapter is None:
            inside = "final" if found.kind == "run" else "model"
            raise RequestError(
                f"{path} is a {found.kind}, not a model.",
                code="run-as-base",
                where="model.path",
                remedy=f"Name the model in it: {folder / inside}.",
            )
        what, code = f"is a {found.kind} with an adapter, not a base model", "adapter-as-base"
    else:
        return
    raise RequestError(f"{path} {what}.", code=code, where="model.path", remedy=three_words(path))


def _as_begun(config: RunConfig, old: RunConfig) -> RunConfig:
    """What the run file leaves to the origin stays what was found when the run began."""
    if config.adapter is None or config.adapter.start is None or old.adapter is None or not old.adapter.start:
        return config
    config = config.model_copy(deep=True)
    for name in ("path", "revision", "precision", "keep_16bit", "fp8", "template", "new_tokens"):
        if name not in config.model.model_fields_set or not getattr(config.model, name):
            setattr(config.model, name, getattr(old.model, name))
    assert config.adapter is not None
    if config.adapter.then == old.adapter.then == "continue":
        given = config.adapter.model_dump(exclude_unset=True)
        own = old.adapter.model_dump()
        if given.get("target") == "all-linear":
            given.pop("target")
        config.adapter = AdapterConfig.model_validate({**own, **{key: value for key, value in given.items() if value}})
    return config


def _filled(config: RunConfig, found: Location, saved: dict[str, Any]) -> RunConfig:
    stored = read_resolved(found.run / "run.yaml") if found.run else None
    if not config.model.path:
        own = found.run / "base" if found.run else None
        if own is not None and (own / manifests.NAME).is_file():
            config.model.path = str(own)
        else:
            facts = manifests.read(found.path).facts if (found.path / manifests.NAME).is_file() else {}
            name = (facts.get("base") or {}).get("name") or saved.get("base_model_name_or_path") or ""
            if (
                stored is not None
                and stored.model.path
                and not Path(name).exists()
                and Path(stored.model.path).exists()
            ):
                name = stored.model.path
            if not name or (Path(name).is_absolute() and not Path(name).exists()):
                raise RequestError(
                    f"the base of this adapter, {name or 'which it does not name'}, is not there.",
                    code="base-missing",
                    where=str(found.path),
                    remedy="Name it in the run file: model: PATH.",
                )
            config.model.path = name
            config.model.revision = config.model.revision or saved.get("revision")
    if stored is not None:
        for name in ("precision", "template", "new_tokens"):
            value = getattr(stored.model, name)
            there = name != "template" or value in (None, "chatml") or Path(value).is_file()
            if not getattr(config.model, name) and there:
                setattr(config.model, name, value)
        if config.model.precision == stored.model.precision:
            for name in ("keep_16bit", "fp8"):
                if name not in config.model.model_fields_set:
                    setattr(config.model, name, getattr(stored.model, name))
        config.train.max_length = config.train.max_length or stored.train.max_length
    return config


def _lacks_template(base: str) -> bool:
    """Whether a local base's tokenizer has no chat template, so that the one the adapter was trained with is needed."""
    path = Path(base)
    settings = path / "tokenizer_config.json"
    if (
        not settings.is_file()
        or (path / "chat_template.jinja").exists()
        or (path / "additional_chat_templates").exists()
    ):
        return False
    return not json.loads(settings.read_text(encoding="utf-8")).get("chat_template")


def _check_base(config: RunConfig, expected: str, folder: Path, allow: Collection[str]) -> None:
    path = Path(config.model.path)
    is_known = expected != "" and (path / "config.json").is_file() and not compare.is_allowed("model.path", allow)
    if is_known and fingerprint.of_folder(path) != expected:
        raise other_base(config.model.path, folder)


def other_base(name: str, folder: Path) -> RequestError:
    """The error for a base that an adapter was not trained on."""
    return RequestError(
        f"the base at {name} is not the one that the adapter in {folder} was trained on: its weights differ.",
        code="other-base",
        where="model.path",
        remedy="Leave `model` out to take the right one, or insist with --allow model.path.",
    )


def _own_settings(
    given: AdapterConfig, found: Location, saved: dict[str, Any], pair: dict[str, Any] | None
) -> AdapterConfig:
    """The adapter's own settings; those of the run file must be equal to them.

    Raises:
        RequestError: some differ.
    """
    stored = read_resolved(found.run / "run.yaml").adapter if found.run else None
    own: dict[str, Any] = described(saved)
    if pair is not None:  # the upper one of a stacked pair is what trains
        ranks = [top for _, top in pair["ranks"].values() if top]
        own["r"] = max(set(ranks), key=ranks.count)
        own["alpha"] = pair["scaling"] * own["r"]
        own["rslora"] = False
    if stored is not None:
        own |= stored.model_dump(exclude={"start", "then", "from"})
        own.pop("from", None)
        own.pop("then", None)
    asked = given.model_dump(exclude_unset=True)
    different = {
        key: (value, own.get(key, saved.get(key)))
        for key, value in asked.items()
        if key not in ("from", "then") and not _same(key, value, own.get(key, saved.get(key)), stored is not None)
    }
    if different:
        raise differs(different)
    return AdapterConfig.model_validate({"from": given.start, "then": given.then, **own})


def differs(keys: dict[str, tuple[Any, Any]]) -> RequestError:
    """The error for settings of an adapter that is continued: by key, what is asked for and what it has."""
    told = "; ".join(f"{key} is {show(theirs)} there and {show(ours)} here" for key, (ours, theirs) in keys.items())
    return RequestError(
        f"`continue` trains the adapter as it is, and these keys are not its own: {told}.",
        code="adapter-differs",
        where=f"adapter.{next(iter(keys))}",
        remedy="Leave them out; or take `then: stack` (a new adapter on top) or `then: merge` (folded into the base first).",
    )


def _same(key: str, ours: Any, theirs: Any, exact: bool) -> bool:
    if key == "target" and ours == "all-linear" and not exact:
        return True  # what it means is known with the model only; the adapter's own layers are kept
    if isinstance(ours, list) and isinstance(theirs, list):
        return sorted(ours) == sorted(theirs)
    return (ours or None) == (theirs or None)


def _check_stack(config: RunConfig, saved: dict[str, Any], folder: Path) -> None:
    stack.check(saved, str(folder))
    assert config.adapter is not None
    check_plain(config.adapter, "adapter.then")
    if config.model.new_tokens:
        raise RequestError(
            "`stack` puts a plain LoRA adapter on a plain LoRA adapter; model.new_tokens is more than that.",
            code="cannot-stack",
            where="model.new_tokens",
            remedy="Use adapter.then: merge, which takes every adapter.",
        )


def check_plain(adapter: AdapterConfig, where: str) -> None:
    """Raises RequestError for an adapter that is more than LoRA's two factors, which no stack can hold."""
    used = {"dora": adapter.dora, "modules_to_save": adapter.modules_to_save, "type": adapter.type != "lora"}
    odd = [
        f"adapter.{name}" + (f" {adapter.type}" if name == "type" else "") for name, is_used in used.items() if is_used
    ]
    if odd:
        raise RequestError(
            f"`stack` puts a plain LoRA adapter on a plain LoRA adapter; {', '.join(odd)} is more than that.",
            code="cannot-stack",
            where=where,
            remedy="Leave it out, or use adapter.then: merge, which takes every adapter.",
        )


def _moments(config: RunConfig, found: Location, facts: dict[str, Any]) -> Found | None:
    """The checkpoint whose optimiser goes on.

    Raises:
        RequestError: it is asked for, and there is none of the adapter's own step and of this optimiser.
    """
    if config.optim.start != "carried":
        return None
    path, step = found.path, facts.get("step")
    if found.kind != "checkpoint" and found.run is not None:
        path = next((each.path for each in published(found.run) if each.step == step), path)
    stored = read_resolved(found.run / "run.yaml").optim if found.run else None
    if not (path / "trainer").is_dir() or step is None:
        raise RequestError(
            f"there is no optimiser of {found.path} to carry over: no checkpoint of its step with a trainer/ folder.",
            code="no-moments",
            where="optim.from",
            remedy="Name a checkpoint as adapter.from, or leave optim.from out for a fresh optimiser.",
        )
    different = [name for name in ("name", "states", "master") if stored and getattr(stored, name) != getattr(config.optim, name)]  # fmt: skip
    if different:
        raise RequestError(
            f"the moments there are of another optimiser: optim.{different[0]} was {getattr(stored, different[0])}.",
            code="no-moments",
            where="optim.from",
            remedy="Set the same optimiser, or leave optim.from out for a fresh one.",
        )
    return Found(int(step), path)


def _said(config: RunConfig, found: Location) -> str:
    assert config.adapter is not None
    what = {
        "continue": f"continues the adapter of {found.path}",
        "stack": f"puts a new adapter on top of {found.path}, which stays as it is",
        "merge": f"folds the adapter of {found.path} into the base and trains a new one",
    }[config.adapter.then or ""]
    how = "the optimiser's moments are carried over, the schedule is fresh" if config.optim.start == "carried" else "a fresh optimiser and schedule"  # fmt: skip
    return f"stage: {how}; this is not resume. It {what}"


def fingerprint_at(path: str) -> str:
    """Fingerprint of the adapter that a path means."""
    found = locate(path)
    return _of_adapter(found.path / "adapter" if found.kind == "checkpoint" else found.path)


def _of_adapter(folder: Path) -> str:
    """Fingerprint of an adapter's weights; the same that the manifest of a final folder names."""
    path = folder / WEIGHTS
    if path.is_file():
        return fingerprint.of_weights([path])
    other = next((each for each in sorted(folder.glob("adapter_model*")) if each.is_file()), None)
    return fingerprint.of_file(other) if other else ""


def _in_header(path: Path) -> str:
    """The base's fingerprint that an adapter file of ours carries in its own header; empty in any other."""
    return read_header(path)[1].get("luthier.base", "") if path.is_file() else ""
