"""The library's face: load, save, train, resume, describe. Composes the parts and decides nothing itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts import identify as artifacts
from luthier.artifacts import manifest as manifests
from luthier.checkpoint.layout import is_adapter
from luthier.config.read import parse_run, read_resolved, read_run
from luthier.config.schema import ModelConfig, Precision, RunConfig
from luthier.errors import ArtifactError, RequestError
from luthier.export.door import Exported, export_folder
from luthier.export.prove import TEXTS, Probe, Proof, compare, live_answers, make_probe, plain_answers
from luthier.models.open import Base, open_base
from luthier.training import run as runs
from luthier.training.base_folder import write_folder
from luthier.training.locate import Location, locate
from luthier.training.resolve import pick_device
from luthier.training.run import Run

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

    def __str__(self) -> str:
        adapters = ", ".join(f"{name} ({kind})" for name, kind in self.adapters.items()) or "none"
        return (
            f"{self.class_name} in {self.precision}: {self.trainable:,} of {self.parameters:,} parameters train; "
            f"adapters: {adapters}; fast forms: {', '.join(self.fast_forms) or 'none'}"
        )


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


def load(
    path: str | os.PathLike[str],
    *,
    trainable: bool = False,
    precision: Precision | None = None,
    device: str | None = None,
    base: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Open a base model, a GGUF file, an adapter, a checkpoint, a run or a final folder.

    Args:
        trainable: what was trained trains again; else nothing does, and the model is in evaluation mode.
        precision: bf16, fp16 or fp32; as trained if left out.
        device: where to; the accelerator, else the CPU, if left out.
        base: the base under an adapter, where it isn't where the adapter says.

    Returns:
        A transformers or peft model, and its tokenizer.

    Raises:
        RequestError: nothing is there, or it is of a kind that this version can't open.
        ArtifactError: it is damaged, or the base is not the adapter's.
    """
    where = device or str(pick_device())
    found = locate(path) if _is_local(os.fspath(path)) else None
    if found is None:  # a hub id
        opened = _open(os.fspath(path), precision, where, trust_remote_code)
        return _made_trainable(opened.model, trainable), opened.tokenizer
    if found.kind not in ("base", "merged", "gguf", "adapter", "checkpoint"):
        raise RequestError(
            f"this is of kind {found.kind}, which this version cannot load.", code="kind", where=str(found.path)
        )
    if (found.path / manifests.NAME).is_file():  # ours: every byte is known, so every byte is checked
        manifests.raise_problems(found.path, manifests.verify(found.path)[1])
    folder = found.path
    if found.kind == "checkpoint":
        folder = folder / ("adapter" if (folder / "adapter").is_dir() else "model")
    if precision is None and found.run is not None:
        precision = read_resolved(found.run / "run.yaml").model.precision
    if not (folder / "adapter_config.json").is_file():
        opened = _open(str(folder), precision, where, trust_remote_code)
        return _made_trainable(opened.model, trainable), opened.tokenizer
    return _load_adapter(folder, found, trainable, precision, where, base, trust_remote_code)


def _is_local(text: str) -> bool:
    return Path(text).exists() or Path(text.rpartition("@")[0] or text).exists()


def _load_adapter(
    folder: Path,
    found: Location,
    trainable: bool,
    precision: Precision | None,
    device: str,
    base: str | os.PathLike[str] | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    from luthier.models.saved_adapter import open_adapter

    named = artifacts.identify(folder)
    name = os.fspath(base) if base is not None else _base_of(folder, found, named)
    opened = _open(name, precision, device, trust_remote_code, revision=(named.base or {}).get("revision"))
    _check_base(found, opened, name, insisted=base is not None)
    return open_adapter(opened, folder, trainable=trainable)


def _base_of(folder: Path, found: Location, named: artifacts.Artifact) -> str:
    """The base an adapter names, or the run's own ``base/`` where the run was moved."""
    name = (named.base or {}).get("name") or ""
    own = found.run / "base" if found.run else None
    if own is not None and own.is_dir() and not Path(name).exists():
        return str(own)
    if Path(name).is_absolute() and not Path(name).exists():
        raise RequestError(
            f"the base this adapter names, {name}, is not there.",
            code="base-missing",
            where=str(folder),
            remedy="Give it: luthier.load(path, base=…), or --base on the command line.",
        )
    return name


def _check_base(found: Location, opened: Base, name: str, *, insisted: bool) -> None:
    """Compare the opened base with the one the adapter was trained on, where the manifest says which."""
    from luthier.artifacts import fingerprint

    manifest_path = found.path / manifests.NAME
    if insisted or not manifest_path.is_file() or opened.source.path is None or not opened.source.path.is_dir():
        return
    expected = manifests.read(found.path).facts.get("base", {}).get("fingerprint")
    if expected and fingerprint.of_folder(opened.source.path) != expected:
        raise ArtifactError(
            f"the base at {name} is not the one this adapter was trained on: its weights differ.",
            code="other-base",
            where=str(found.path),
            remedy="Give the right one with base=…; giving any base by hand insists on it.",
        )


def _open(
    name: str, precision: Precision | None, device: str, trust_remote_code: bool, revision: str | None = None
) -> Base:
    return open_base(ModelConfig(path=name, revision=revision, precision=precision, trust_remote_code=trust_remote_code), device=device)  # fmt: skip


def _made_trainable(model: Any, trainable: bool) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(trainable and parameter.is_floating_point())
    return model.train(trainable)


def save(model: nn.Module, path: str | os.PathLike[str], *, tokenizer: Any, kind: str | None = None) -> Written:
    """Write a model, or a peft model's adapter, as a standard folder, and prove that plain libraries open it.

    Args:
        path: a folder that doesn't exist yet.
        kind: ``adapter`` or ``model``, to insist on it; the answer names what was written.

    Raises:
        RequestError: the live model is not of that kind, or the folder exists.
        ArtifactError: the proof failed.
    """
    live = "adapter" if is_adapter(model) else "model"
    if kind not in (None, live):
        merged = " (merge_and_unload leaves a model)" if kind == "adapter" else " (merge it first for a model)"
        raise RequestError(f"the live model is of kind {live}, not {kind}{merged}.", code="kind", where=os.fspath(path), remedy=f"Save it as kind={live!r}, or leave `kind` out.")  # fmt: skip
    folder = Path(path).expanduser().resolve()
    write_folder(folder, model, tokenizer, kind=live, facts={"parents": []})
    ids = tokenizer(PROBE_TEXT)["input_ids"]
    probe = make_probe(model, [ids], deterministic=False, trust_remote_code=False)
    proof = compare(live_answers(model, tokenizer, probe), plain_answers(folder, probe), device=probe.device)
    (folder / "proof.json").write_bytes(proof.to_bytes())
    if proof.verdict == "failed":
        raise ArtifactError(f"the proof failed: {proof.says}", code="proof-failed", where=str(folder), remedy="Do not use this folder.")  # fmt: skip
    return Written(folder, live, proof)


def export(
    src: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    dst: str | os.PathLike[str],
    *,
    to: str,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    weights: Sequence[float] | None = None,
    prove: bool = True,
) -> Exported:
    """Write another form of an artefact: ``merged``, ``transformers`` (re-sharded, cast) or ``adapter``.

    Args:
        src: a run, RUN@best, a checkpoint, an adapter or a model folder; several adapters for a weighted sum.

    Raises: as ``luthier.export.door.export_folder``.
    """
    sources = [src] if isinstance(src, str | os.PathLike) else list(src)
    paths = [
        locate(path).path if os.fspath(path).endswith(("@best", "@newest", "@final")) else Path(path)
        for path in sources
    ]
    return export_folder(
        paths, Path(dst), to=to, base=None if base is None else Path(base), dtype=dtype, shard_size=shard_size,
        weights=weights, prove=prove,
    )  # fmt: skip


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
    if location.kind in ("adapter", "base", "merged"):
        return location.path
    raise RequestError(
        f"plain libraries have no way to open kind {location.kind}.", code="kind", where=str(location.path)
    )


def describe(model: nn.Module) -> Description:
    """Say of a live model what it is: class, adapters, what trains, precision."""
    base = model.get_base_model() if is_adapter(model) else model  # type: ignore[operator]
    adapters = {name: str(config.peft_type.value).lower() for name, config in getattr(model, "peft_config", {}).items()}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dtype = str(getattr(base, "dtype", next(model.parameters()).dtype)).removeprefix("torch.")
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return Description(type(base).__name__, adapters, trainable, sum(p.numel() for p in model.parameters()), names.get(dtype, dtype))  # fmt: skip
