"""The door in: from a path to a live model, whatever lies there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from luthier.artifacts import identify as artifacts
from luthier.artifacts import manifest as manifests
from luthier.artifacts.problems import CONVERT
from luthier.config.read import read_resolved
from luthier.config.schema import Precision
from luthier.errors import RequestError
from luthier.models import stack
from luthier.models.adapter_base import adapters_in, base_name, check_base
from luthier.models.check_folder import read_json
from luthier.models.gguf_adapter import as_peft_folder, is_gguf_adapter
from luthier.models.load_base import Opening, differing_versions, load_base
from luthier.models.quantised.adapter import is_quantised
from luthier.models.quantised.existing import carries
from luthier.models.refused import refused
from luthier.models.saved_adapter import open_adapter, tokenizer_of
from luthier.training.locate import locate
from luthier.training.resolve import pick_device

ADAPTER_CONFIG = "adapter_config.json"
Adapters = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None
_INSTEAD = {
    "state_dict": "It is a state dict alone: luthier mend makes a folder of it where the model is known, or put the model's config.json beside it.",
    "distcp": f"These are shards of torch.distributed.checkpoint. {CONVERT}",
    "gguf_adapter": "It is an adapter: give its base as path and this file as adapter.",
}


@dataclass(frozen=True)
class _Target:
    """What a path holds: a model by folder, file or hub id, or adapters by the names they get.

    Attributes:
        home: the folder with the manifest, which for a checkpoint is not that with the weights.
    """

    model: str | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    home: Path | None = None
    run: Path | None = None

    def check(self, how: Opening) -> None:
        """A folder of ours knows every byte, so every byte is checked; what it was made with is compared with what is here."""
        if self.home is not None and (self.home / manifests.NAME).is_file():
            manifests.raise_problems(self.home, manifests.verify(self.home)[1])
            _tell(differing_versions(manifests.read(self.home).facts.get("versions", {})), how)


@dataclass(frozen=True)
class _Placed:
    """An adapter's folder, or its GGUF file, and the folder with its manifest."""

    folder: Path
    home: Path


@refused
def load(
    path: str | os.PathLike[str],
    *,
    trainable: bool = False,
    precision: Precision | None = None,
    device: str | None = None,
    base: str | os.PathLike[str] | None = None,
    adapter: Adapters = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
) -> tuple[Any, Any]:
    """Open a base model, a GGUF file, an adapter, several of them, a checkpoint, a run or a final folder.

    Args:
        trainable: what was trained trains again; else nothing does, and the model is in evaluation mode.
        precision: bf16, fp16 or fp32; nf4, int8 or fp8 to quantise it while it is read; as trained if left out.
        device: where to; the accelerator, else the CPU, if left out.
        base: the base under an adapter, where it isn't where the adapter says; giving it insists on it.
        adapter: adapters to put onto what lies at `path`: a run, checkpoint, folder or GGUF file, or several by the names
            they get.
        say: told what should be known and is no error; the logger ``luthier`` warns of it if left out.

    Returns:
        A transformers or peft model, and its tokenizer (None only where there is none).

    Raises:
        RequestError: nothing is there, it is of a kind that this version can't open, or there is no room for it.
        ArtifactError: it is damaged, or the base is not the adapter's.
    """
    if precision is not None and precision not in get_args(Precision):
        raise RequestError(f"precision is {precision!r}; it takes one of {', '.join(get_args(Precision))}.", code="wrong-value", where="precision")  # fmt: skip
    how = Opening(precision, _device(device), trust_remote_code, say or logging.getLogger("luthier").warning)
    target = _target(os.fspath(path))
    if precision is None and target.run is not None and (target.run / "run.yaml").is_file():
        how = replace(how, precision=read_resolved(target.run / "run.yaml").model.precision)
    target.check(how)
    how = _as_trained(target, how, asked=precision is not None)
    placed = {name: _Placed(folder, target.home or folder) for name, folder in target.adapters.items()}
    for name, given in _named(adapter).items():
        if name in placed:
            raise RequestError(
                f"what lies at {path} is an adapter called {name!r} already.",
                code="adapter-name",
                where="adapter",
                remedy="Give the new one a name: adapter={'name': PATH}.",
            )
        placed[name] = _given(given, how)
    if target.model is not None and not placed:
        if base is not None:
            raise RequestError("this is a model and no adapter, so there is no base to give.", code="not-an-adapter", where=str(path), remedy="Leave `base` out.")  # fmt: skip
        opened = load_base(target.model, how)
        return _made_trainable(opened.model, trainable), opened.tokenizer
    if target.model is None:
        under, how = _base_of(target, base, how)
    else:
        under = target.model
    return _put_on(under, placed, trainable, how, insist=base is not None)


def _as_trained(target: _Target, how: Opening, *, asked: bool) -> Opening:
    """The base under an adapter is quantised as it was in training, unless another precision was asked for."""
    if target.home is None or not target.adapters or not (target.home / manifests.NAME).is_file():
        return how
    then = (manifests.read(target.home).facts.get("base") or {}).get("quantisation")
    if then is None:
        return how
    if not asked or how.precision == then["precision"]:
        fp8 = then.get("fp8", how.fp8)
        return replace(how, precision=then["precision"], keep_16bit=tuple(then["keep_16bit"]), fp8=fp8)
    how.tell(
        f"This adapter was trained on its base in {then['precision']}, and is opened on it in {how.precision}: its logits differ from the trained ones."
    )
    return how


def _device(name: str | None) -> str:
    """The device asked for, or the accelerator, else the CPU."""
    if name is None:
        return str(pick_device())
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"there is no device {name!r} here: {str(error).splitlines()[0]}", code="wrong-value", where="device", remedy="Take 'cpu', or leave `device` out.") from None  # fmt: skip
    return name


def _given(path: Path, how: Opening) -> _Placed:
    """One adapter that was given beside a base: found and checked as what lies at a path of its own is."""
    if is_gguf_adapter(path):
        return _Placed(path, path)
    target = _target(str(path)) if _is_local(path) else _Target(str(path))
    if len(target.adapters) != 1:
        what = f"{len(target.adapters)} adapters lie" if target.adapters else "no adapter lies"
        raise RequestError(
            f"{what} here.", code="no-adapter", where=str(path), remedy="Give the folder of one adapter."
        )
    target.check(how)
    (folder,) = target.adapters.values()
    return _Placed(folder, target.home or folder)


def _target(text: str) -> _Target:
    path = Path(text).expanduser()
    if not _is_local(path):
        return _Target(text)  # a hub id, or a mistake that opening it explains
    found = locate(str(path))
    if found.kind in _INSTEAD or found.kind == "unknown":
        why = _INSTEAD.get(found.kind) or " ".join(p.message for p in artifacts.identify(found.path).problems)
        raise RequestError(f"this is of kind {found.kind}, which has no model to open. {why}", code="kind", where=str(found.path), remedy="`luthier inspect` says what is there.")  # fmt: skip
    folder = found.path
    if found.kind == "checkpoint":
        folder = folder / ("adapter" if (folder / "adapter").is_dir() else "model")
    elif found.kind == "trainer_checkpoint":
        folder = Path(artifacts.identify(folder).facts["weights"])
    if (folder / ADAPTER_CONFIG).is_file():
        return _Target(adapters={"default": folder}, home=found.path, run=found.run)
    if found.kind == "adapter":
        return _Target(adapters=adapters_in(folder))
    return _Target(str(folder), home=found.path, run=found.run)


def _is_local(path: Path) -> bool:
    return path.exists() or Path(str(path).rpartition("@")[0] or path).exists()


def _named(adapter: Adapters) -> dict[str, Path]:
    if adapter is None:
        return {}
    return {name: Path(folder).expanduser() for name, folder in adapter.items()} if isinstance(adapter, Mapping) else {"default": Path(adapter).expanduser()}  # fmt: skip


def _tell(notes: Collection[str], how: Opening) -> None:
    for note in notes:
        how.tell(note)


def _base_of(target: _Target, given: str | os.PathLike[str] | None, how: Opening) -> tuple[str, Opening]:
    """The base under a target's adapters, and how it is opened: at the revision that the adapter names."""
    folder = next(iter(target.adapters.values()))
    if (folder / "config.json").is_file():
        how.tell(f"{folder} holds a whole model beside the adapter; the adapter is opened on its own base.")
    if given is not None:
        return os.fspath(given), how
    named = artifacts.identify(folder).base or {}
    own = target.run / "base" if target.run and (target.run / "base").is_dir() else None
    name, notes = base_name(folder, named=named.get("name"), own=own)
    _tell(notes, how)
    return name, replace(how, revision=named.get("revision"))


def _put_on(
    under: str, placed: Mapping[str, _Placed], trainable: bool, how: Opening, *, insist: bool
) -> tuple[Any, Any]:
    """Open a base and put adapters onto it, the first of them active."""
    opened = load_base(under, how, own_layers=all(_is_carried(at.folder) for at in placed.values()))
    model: Any = opened.model
    tokenizer = None
    for name, at in placed.items():
        if is_gguf_adapter(at.folder):
            with TemporaryDirectory(prefix="luthier-") as passing:
                converted = as_peft_folder(at.folder, _plain_config(opened.model), Path(passing))
                model, own = open_adapter(opened, converted, trainable=trainable, name=name)
        else:
            _tell(check_base(at.folder, at.home, opened.source, insisted=insist), how)
            pair = manifests.read(at.home).facts.get("stack") if (at.home / manifests.NAME).is_file() else None
            if trainable and pair is not None and len(placed) == 1:  # of a stacked pair only the upper adapter trains
                return stack.open_split(opened, at.folder, pair, base_name=under), tokenizer_of(opened, at.folder)
            model, own = open_adapter(opened, at.folder, trainable=trainable, name=name)
        opened.model = model
        tokenizer = tokenizer or own
    if len(placed) > 1:
        model.set_adapter(next(iter(placed)), inference_mode=not trainable)
    return model, tokenizer


def _is_carried(adapter: Path) -> bool:
    """Whether our own layers of a quantised base carry an adapter; a GGUF file holds plain LoRA."""
    return is_gguf_adapter(adapter) or carries(read_json(adapter / ADAPTER_CONFIG))


def _plain_config(model: Any) -> Any:
    return model.get_base_model().config if hasattr(model, "get_base_model") else model.config


def _made_trainable(model: Any, trainable: bool) -> Any:
    if trainable and (getattr(model, "is_quantized", False) or is_quantised(model)):
        raise RequestError(
            "quantised weights are codes, which no gradient changes.",
            code="quantised-base",
            where="trainable",
            remedy="Train an adapter on it: luthier.load(path) and peft's get_peft_model, or load an adapter with trainable=True.",
        )
    for parameter in model.parameters():
        parameter.requires_grad_(trainable and parameter.is_floating_point())
    return model.train(trainable)
