"""The library's face: load, save, train, resume, describe, mend, push. Composes the parts and decides nothing itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts import identify as artifacts
from luthier.checkpoint.layout import is_adapter
from luthier.config import chain
from luthier.config.schema import RunConfig
from luthier.errors import ArtifactError, RequestError
from luthier.export.forms import Exported, export_folder
from luthier.export.mend.mend import mend
from luthier.export.proof.prove import TEXTS, Probe, Proof, compare, live_answers, make_probe, plain_answers
from luthier.export.push import push as pushing
from luthier.export.push.push import Pushed
from luthier.loading import load
from luthier.models import stack
from luthier.models.describe import Description, describe
from luthier.models.quantised import layer as quantised
from luthier.models.several import activated, combine_adapters
from luthier.training import run as runs
from luthier.training.base_folder import write_folder
from luthier.training.locate import Location, locate
from luthier.training.resolve import pick_device
from luthier.training.run import Run

__all__ = ["Description", "Written", "combine", "describe", "load", "mend", "prove", "push", "resume", "save", "train"]

PROBE_TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的狐狸。 0123456789"


@dataclass(frozen=True)
class Written:
    """What `save` wrote, and its proof."""

    path: Path
    kind: str
    proof: Proof


def train(config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig, *, allow: Collection[str] = (), say: Callable[[str], None] = print) -> Run:  # fmt: skip
    """Train from a run file, a dict or a RunConfig; goes on where the output folder already holds this run.

    Of several stages the last one's run is returned.

    Raises: as ``luthier.training.run.train``.
    """
    found = chain.read(config) if isinstance(config, str | os.PathLike) else chain.parse(config) if isinstance(config, Mapping) else config  # fmt: skip
    if isinstance(found, chain.Chain):
        return runs.train_chain(found, allow=allow, say=say)
    return runs.train(found, allow=allow, say=say)


def resume(run: str | os.PathLike[str], overrides: Collection[str] = (), *, allow: Collection[str] = (), say: Callable[[str], None] = print) -> Run:  # fmt: skip
    """Go on with a run from its newest whole checkpoint.

    Raises: as ``luthier.training.run.resume``.
    """
    return runs.resume(Path(run), overrides, allow=allow, say=say)


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
    if live == "model" and quantised.quantised_layers(model):
        raise RequestError(
            "this model holds weights in 4 or 8 bits that are made while a base is read; there is nothing new in it to save.",
            code="quantised-base",
            where=os.fspath(path),
            remedy="Keep the folder it was opened from, and open it with the same precision.",
        )
    if live == "model" and adapter is not None:
        raise RequestError("the live model has no adapters.", code="no-such-adapter", where="adapter", remedy="Leave `adapter` out.")  # fmt: skip
    if live == "adapter":
        _refuse_grown(model, folder)
    if live == "adapter" and not stack.is_stacked(model):
        active = list(model.active_adapters)  # type: ignore[arg-type]
        if adapter is None and len(active) != 1:
            raise RequestError(f"{len(active)} adapters are active: {', '.join(active)}.", code="which-adapter", where="adapter", remedy="Name the one to save: adapter=…")  # fmt: skip
        with activated(model, adapter or active[0]):
            return _saved(model, folder, tokenizer, live)
    return _saved(model, folder, tokenizer, live)


def _refuse_grown(model: Any, folder: Path) -> None:
    """An adapter names its base, and plain peft cannot put it on a base that lacks rows which the live one has."""
    named = next(iter(model.peft_config.values())).base_model_name_or_path
    config = Path(str(named or "")) / "config.json"
    if not config.is_file():
        return
    told = json.loads(config.read_text(encoding="utf-8"))
    there = told.get("vocab_size") or (told.get("text_config") or {}).get("vocab_size")
    here = model.get_input_embeddings().weight.shape[0]
    if isinstance(there, int) and there != here:
        raise RequestError(
            f"the vocabulary grew: the live model has {here} rows, and {named}, which the adapter would name as its base, {there}.",
            code="grown-base",
            where=os.fspath(folder),
            remedy="Save it as one model: luthier.save(model.merge_and_unload(), path, tokenizer=tokenizer). "
            "Or put the adapter on a base that was saved after it grew; a run does that by itself (RUN/base).",
        )


def _saved(model: nn.Module, folder: Path, tokenizer: Any, live: str) -> Written:
    pair = {"stack": stack.facts_of(model)} if stack.is_stacked(model) else {}  # type: ignore[arg-type]
    ids = tokenizer(PROBE_TEXT)["input_ids"]
    probe = make_probe(model, [ids], deterministic=False, trust_remote_code=False)
    base: dict[str, Any] = {}
    if probe.quantisation:
        named: Any = model.peft_config[model.active_adapters[0]]  # type: ignore[index,union-attr]
        identity = {"name": named.base_model_name_or_path, "revision": named.revision}
        base = {"base": {**identity, "dtype": probe.dtype, "quantisation": _quantisation(model, probe)}}
    write_folder(folder, model, tokenizer, kind=live, facts={"parents": [], **pair, **base})
    with stack.plain_form(model), quantised.plain_form(model):
        expected = live_answers(model, tokenizer, probe)
    proof = compare(expected, plain_answers(folder, probe), device=probe.device)
    (folder / "proof.json").write_bytes(proof.to_bytes())
    if proof.verdict == "failed":
        raise ArtifactError(f"the proof failed: {proof.says}", code="proof-failed", where=str(folder), remedy="Do not use this folder.")  # fmt: skip
    return Written(folder, live, proof)


def _quantisation(model: nn.Module, probe: Probe) -> dict[str, Any]:
    """What `luthier.load` needs to quantise the base as the live one is."""
    assert probe.quantisation is not None
    kept = probe.quantisation["skip"]
    in_fp8 = any(layer.multiplies == "fp8" for layer in quantised.quantised_layers(model))
    facts = {"precision": probe.quantisation["precision"], "keep_16bit": kept, "kept": kept}
    return facts | ({"fp8": "compute" if in_fp8 else "storage"} if facts["precision"] == "fp8" else {})


def export(
    src: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    dst: str | os.PathLike[str],
    *,
    to: str,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    shard_size: str | None = None,
    weights: Sequence[float] | None = None,
    combine: str | None = None,
    density: float | None = None,
    seed: int = 0,
    onto: str | None = None,
    quant: str | None = None,
    packing: str | None = None,
    rank: int | None = None,
    prove: bool = True,
) -> Exported:
    """Write another form of an artefact: ``merged``, ``transformers`` (re-sharded, cast), ``adapter``, ``gguf`` or ``quantized``.

    Args:
        src: a run, RUN@best, a checkpoint, an adapter or a model folder; several adapters for a weighted sum.

    Raises: as ``luthier.export.forms.export_folder``.
    """
    sources = [src] if isinstance(src, str | os.PathLike) else list(src)
    paths = [
        locate(path).path if os.fspath(path).endswith(("@best", "@newest", "@final")) else Path(path)
        for path in sources
    ]
    return export_folder(
        paths, Path(dst), to=to, base=None if base is None else Path(base), dtype=dtype, shard_size=shard_size,
        weights=weights, combine=combine, density=density, seed=seed, onto=onto, quant=quant, packing=packing, rank=rank,
        prove=prove,
    )  # fmt: skip


def push(
    path: str | os.PathLike[str],
    id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    endpoint: str | None = None,
    base: str | None = None,
    replace: bool = False,
    unproven: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Pushed:
    """Upload an artefact to the hub, and compare what the hub then holds with it, checksum by checksum.

    Args:
        path: a run (its final folder), RUN@best, a checkpoint, an adapter, a model or a GGUF folder.
        id: the repository, OWNER/NAME.

    Raises: as ``luthier.export.push.push.push``, where the other arguments are described.
    """
    text = os.fspath(path)
    meant = locate(text).path if text.endswith(("@best", "@newest", "@final")) else Path(text)
    return pushing.push(
        meant, id, private=private, revision=revision, endpoint=endpoint, base=base, replace=replace,
        unproven=unproven, say=say,
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
    if location.kind in ("adapter", "base", "merged", "trainer_checkpoint"):
        return location.path
    raise RequestError(
        f"plain libraries have no way to open kind {location.kind}.", code="kind", where=str(location.path)
    )
