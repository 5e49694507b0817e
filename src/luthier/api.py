"""The library's face: load, save, train, resume, describe. Composes the parts and decides nothing itself."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts import identify as artifacts
from luthier.artifacts import manifest as manifests
from luthier.checkpoint.layout import is_adapter
from luthier.config.read import parse_run, read_resolved, read_run
from luthier.config.schema import Precision, RunConfig
from luthier.errors import ArtifactError, RequestError
from luthier.export.mend import mend
from luthier.export.prove import TEXTS, Probe, Proof, compare, live_answers, make_probe, plain_answers
from luthier.models.adapter_base import adapters_in, base_name, check_base
from luthier.models.door import Opening, differing_versions, open_door
from luthier.models.refused import refused
from luthier.models.saved_adapter import open_adapter
from luthier.models.several import activated, combine_adapters
from luthier.training import run as runs
from luthier.training.base_folder import write_folder
from luthier.training.locate import Location, locate
from luthier.training.resolve import pick_device
from luthier.training.run import Run

__all__ = ["Description", "Written", "combine", "describe", "load", "mend", "prove", "resume", "save", "train"]

PROBE_TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的狐狸。 0123456789"


@dataclass(frozen=True)
class Description:
    """What a live model is."""

    class_name: str
    adapters: dict[str, str]
    trainable: int
    parameters: int
    precision: str
    fast_forms: tuple[str, ...] = ()
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    trains: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        adapters = ", ".join(f"{name} ({self._of(name)})" for name in self.adapters) or "none"
        return (
            f"{self.class_name} in {self.precision}: {self.trainable:,} of {self.parameters:,} parameters train; "
            f"adapters: {adapters}; fast forms: {', '.join(self.fast_forms) or 'none'}"
        )

    def _of(self, name: str) -> str:
        rank = f" r={self.ranks[name]}" if name in self.ranks else ""
        state = ", merged" if name in self.merged else "" if name in self.active else ", inactive"
        return f"{self.adapters[name]}{rank}{state}"


@dataclass(frozen=True)
class Written:
    """What `save` wrote, and its proof."""

    path: Path
    kind: str
    proof: Proof


def train(config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig, *, allow: Collection[str] = (), say: Callable[[str], None] = print) -> Run:  # fmt: skip
    """Train from a run file, a dict or a RunConfig; goes on where the output folder already holds this run.

    Raises: as ``luthier.training.run.train``.
    """
    if isinstance(config, str | os.PathLike):
        config = read_run(Path(config))
    elif isinstance(config, Mapping):
        config = parse_run(config)
    return runs.train(config, allow=allow, say=say)


def resume(run: str | os.PathLike[str], overrides: Collection[str] = (), *, allow: Collection[str] = (), say: Callable[[str], None] = print) -> Run:  # fmt: skip
    """Go on with a run from its newest whole checkpoint.

    Raises: as ``luthier.training.run.resume``.
    """
    return runs.resume(Path(run), overrides, allow=allow, say=say)


@refused
def load(
    path: str | os.PathLike[str],
    *,
    trainable: bool = False,
    precision: Precision | None = None,
    device: str | None = None,
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
) -> tuple[Any, Any]:
    """Open a base model, a GGUF file, an adapter, several of them, a checkpoint, a run or a final folder.

    Args:
        trainable: what was trained trains again; else nothing does, and the model is in evaluation mode.
        precision: bf16, fp16 or fp32; as trained if left out.
        device: where to; the accelerator, else the CPU, if left out.
        base: the base under an adapter, where it isn't where the adapter says; giving it insists on it.
        adapter: adapters to put onto what lies at `path`: a folder, or folders by the names they get.
        say: told what should be known and is no error; the logger ``luthier`` warns of it if left out.

    Returns:
        A transformers or peft model, and its tokenizer (None only where there is none).

    Raises:
        RequestError: nothing is there, it is of a kind that this version can't open, or there is no room for it.
        ArtifactError: it is damaged, or the base is not the adapter's.
    """
    where, tell = device or str(pick_device()), say or logging.getLogger("luthier").warning
    text = os.fspath(path)
    if adapter is not None:
        folders = {n: Path(f) for n, f in adapter.items()} if isinstance(adapter, Mapping) else {"default": Path(adapter)}  # fmt: skip
        how = Opening(precision, where, trust_remote_code, tell)
        return _put_on(text, folders, folders, trainable, how, insist=False)
    inner = adapters_in(Path(text)) if Path(text).is_dir() else {}
    if inner and not any((Path(text) / name).is_file() for name in ("config.json", "adapter_config.json", "run.yaml", manifests.NAME)):  # fmt: skip
        name, notes = (os.fspath(base), []) if base else base_name(next(iter(inner.values())), named=None, own=None)
        _tell(notes, tell)
        return _put_on(name, inner, inner, trainable, Opening(precision, where, trust_remote_code, tell), insist=base is not None)  # fmt: skip
    found = locate(text) if _is_local(text) else None
    if found is None:  # a hub id
        opened = open_door(text, Opening(precision, where, trust_remote_code, tell))
        return _made_trainable(opened.model, trainable), opened.tokenizer
    if found.kind not in ("base", "merged", "gguf", "adapter", "checkpoint", "trainer_checkpoint"):
        raise RequestError(
            f"this is of kind {found.kind}, which this version cannot load.", code="kind", where=str(found.path)
        )
    if (found.path / manifests.NAME).is_file():  # ours: every byte is known, so every byte is checked
        manifests.raise_problems(found.path, manifests.verify(found.path)[1])
        _tell(differing_versions(manifests.read(found.path).facts.get("versions", {})), tell)
    folder = found.path
    if found.kind == "checkpoint":
        folder = folder / ("adapter" if (folder / "adapter").is_dir() else "model")
    if precision is None and found.run is not None:
        precision = read_resolved(found.run / "run.yaml").model.precision
    how = Opening(precision, where, trust_remote_code, tell)
    if not (folder / "adapter_config.json").is_file():
        opened = open_door(str(folder), how)
        return _made_trainable(opened.model, trainable), opened.tokenizer
    if (folder / "config.json").is_file() and found.path == folder:
        tell(f"{folder} holds a whole model beside the adapter; the adapter is opened on its own base.")
    named = artifacts.identify(folder).base or {}
    own = found.run / "base" if found.run and (found.run / "base").is_dir() else None
    name, notes = (os.fspath(base), []) if base else base_name(folder, named=named.get("name"), own=own)
    _tell(notes, tell)
    how = replace(how, revision=named.get("revision"))
    return _put_on(name, {"default": folder}, {"default": found.path}, trainable, how, insist=base is not None)


def _is_local(text: str) -> bool:
    return Path(text).exists() or Path(text.rpartition("@")[0] or text).exists()


def _tell(notes: Collection[str], tell: Callable[[str], None]) -> None:
    for note in notes:
        tell(note)


def _put_on(
    name: str,
    folders: Mapping[str, Path],
    homes: Mapping[str, Path],
    trainable: bool,
    how: Opening,
    *,
    insist: bool,
) -> tuple[Any, Any]:
    """Open a base and put adapters onto it, the first of them active."""
    opened = open_door(name, how)
    model: Any = opened.model
    tokenizer = None
    for each, folder in folders.items():
        if not (folder / "adapter_config.json").is_file():
            raise RequestError("no adapter lies here.", code="no-adapter", where=str(folder), remedy="Give a folder with adapter_config.json.")  # fmt: skip
        _tell(check_base(folder, homes[each], opened.source, insisted=insist), how.tell)
        model, own = open_adapter(opened, folder, trainable=trainable, name=each)
        opened.model = model
        tokenizer = tokenizer or own
    if len(folders) > 1:
        model.set_adapter(next(iter(folders)), inference_mode=not trainable)
    return model, tokenizer


def _made_trainable(model: Any, trainable: bool) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(trainable and parameter.is_floating_point())
    return model.train(trainable)


def combine(model: nn.Module, weights: Mapping[str, float], *, name: str, method: str = "linear", density: float | None = None) -> None:  # fmt: skip
    """Add an adapter made of others on the same model, each with its weight.

    Raises: as ``luthier.models.several.combine_adapters``.
    """
    combine_adapters(model, weights, name=name, method=method, density=density)


def save(model: nn.Module, path: str | os.PathLike[str], *, tokenizer: Any, kind: str | None = None, adapter: str | None = None) -> Written:  # fmt: skip
    """Write a model, or a peft model's adapter, as a standard folder, and prove that plain libraries open it.

    Args:
        path: a folder that doesn't exist yet.
        kind: ``adapter`` or ``model``, to insist on it; the answer names what was written.
        adapter: which one, where the model has several; the active one if left out.

    Raises:
        RequestError: the live model is not of that kind, or the folder exists.
        ArtifactError: the proof failed.
    """
    live = "adapter" if is_adapter(model) else "model"
    if kind not in (None, live):
        merged = " (merge_and_unload leaves a model)" if kind == "adapter" else " (merge it first for a model)"
        raise RequestError(f"the live model is of kind {live}, not {kind}{merged}.", code="kind", where=os.fspath(path), remedy=f"Save it as kind={live!r}, or leave `kind` out.")  # fmt: skip
    folder = Path(path).expanduser().resolve()
    if live == "model" and adapter is not None:
        raise RequestError("the live model has no adapters.", code="no-such-adapter", where="adapter", remedy="Leave `adapter` out.")  # fmt: skip
    if live == "adapter":
        active = list(model.active_adapters)  # type: ignore[arg-type]
        if adapter is None and len(active) != 1:
            raise RequestError(f"{len(active)} adapters are active: {', '.join(active)}.", code="which-adapter", where="adapter", remedy="Name the one to save: adapter=…")  # fmt: skip
        with activated(model, adapter or active[0]):
            return _saved(model, folder, tokenizer, live)
    return _saved(model, folder, tokenizer, live)


def _saved(model: nn.Module, folder: Path, tokenizer: Any, live: str) -> Written:
    write_folder(folder, model, tokenizer, kind=live, facts={"parents": []})
    ids = tokenizer(PROBE_TEXT)["input_ids"]
    probe = make_probe(model, [ids], deterministic=False, trust_remote_code=False)
    proof = compare(live_answers(model, tokenizer, probe), plain_answers(folder, probe), device=probe.device)
    (folder / "proof.json").write_bytes(proof.to_bytes())
    if proof.verdict == "failed":
        raise ArtifactError(f"the proof failed: {proof.says}", code="proof-failed", where=str(folder), remedy="Do not use this folder.")  # fmt: skip
    return Written(folder, live, proof)


def prove(path: str | os.PathLike[str], against: str | os.PathLike[str]) -> Proof:
    """Open two artefacts with plain libraries, each in a process of its own, and compare their logits."""
    from transformers import AutoTokenizer

    folders = [_weights_folder(locate(each)).resolve() for each in (path, against)]
    tokenizer = AutoTokenizer.from_pretrained(folders[1], local_files_only=True)
    device = str(pick_device())
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(artifacts.identify(folders[1]).precision or "", "float32")
    ids = [tokenizer(text)["input_ids"] for text in (PROBE_TEXT, *TEXTS)]
    probe = Probe(ids, dtype, device, None, torch.get_num_threads(), False)
    found, expected = (plain_answers(folder, probe) for folder in folders)
    return compare(expected, found, device=device)


def _weights_folder(location: Location) -> Path:
    if location.kind == "checkpoint":
        return location.path / ("adapter" if (location.path / "adapter").is_dir() else "model")
    if location.kind in ("adapter", "base", "merged", "trainer_checkpoint"):
        return location.path
    raise RequestError(
        f"plain libraries have no way to open kind {location.kind}.", code="kind", where=str(location.path)
    )


def describe(model: nn.Module) -> Description:
    """Say of a live model what it is: class, adapters, what trains, precision."""
    peft = is_adapter(model)
    base = model.get_base_model() if peft else model  # type: ignore[operator]
    configs: Mapping[str, Any] = model.peft_config if peft else {}  # type: ignore[assignment]
    adapters = {name: str(config.peft_type.value).lower() for name, config in configs.items()}
    ranks = {name: int(config.r) for name, config in configs.items() if isinstance(getattr(config, "r", None), int)}
    status = model.get_model_status() if peft and not any(c.is_prompt_learning for c in configs.values()) else None  # type: ignore[operator]
    merged = tuple(status.merged_adapters) if status and status.merged_adapters != "irregular" else ()
    active = tuple(model.active_adapters) if peft and (status is None or status.enabled is not False) else ()  # type: ignore[arg-type]
    trains: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trains[re.sub(r"\.\d+\.", ".*.", name)] += parameter.numel()
    dtype = str(getattr(base, "dtype", next(model.parameters()).dtype)).removeprefix("torch.")
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    count = sum(parameter.numel() for parameter in model.parameters())
    return Description(
        type(base).__name__, adapters, sum(trains.values()), count, names.get(dtype, dtype),
        active=active, merged=merged, ranks=ranks, trains=dict(trains),
    )  # fmt: skip
