"""``RUN/base``: a base that plain libraries could not find again, written once as a transformers folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from luthier.artifacts import fingerprint, publish
from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import link_or_copy
from luthier.artifacts.manifest import versions
from luthier.artifacts.tensorfile import read_header
from luthier.artifacts.weight_facts import precision_of
from luthier.checkpoint.layout import model_layout, saved_state
from luthier.checkpoint.ranks import Ranks
from luthier.checkpoint.shards import HostBuffers
from luthier.checkpoint.small_files import small_files, tokenizer_files
from luthier.checkpoint.write import plan_part, write_parts
from luthier.config.schema import ModelConfig
from luthier.errors import LuthierError
from luthier.export.merged.merge import merge_folders
from luthier.models.base_files import is_plain
from luthier.models.check_folder import INDEX, SINGLE, weight_files
from luthier.models.open import Base, BaseSource, Vocabulary, locate_base, open_base, resolve_precision

# The stream's refusals that are no judgement on the adapter: no formula there, a class unknown to it, or a conversion
# (fused experts) that leaves no stretch of a file to be one tensor in memory. What truly does not fit, peft refuses too.
_NOT_IN_A_STREAM = ("cannot-merge", "unknown-model", "adapter-does-not-fit")


def write_folder(folder: Path, model: Any, tokenizer: Any, *, kind: str, facts: dict[str, Any]) -> None:
    """Write a model (or a peft model's adapter) with its tokenizer as one published folder.

    Raises:
        RequestError: the folder exists.
        LuthierError: the disk is full.
    """
    stem = "adapter_model" if kind == "adapter" else "model"
    layout = model_layout(model)
    part = plan_part("", stem, layout, {"format": "pt"})
    grouped = {name for group in layout.groups for name in group}
    shards = HostBuffers().snapshot(saved_state(model, layout), Ranks(), grouped)
    partial = publish.begin(folder)
    try:
        manifest = write_parts(
            partial, [part], [shards], small_files(model, tokenizer),
            kind=kind, facts={**facts, "versions": versions()}, ranks=Ranks(), converter=model,
        )  # fmt: skip
        publish.finish(partial, folder, manifest)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def write_base(run: Path, base: Base) -> Path:
    """Write the opened base to ``RUN/base``, unless a whole one is there."""
    folder = run / "base"
    if existing(run) is None:
        if folder.exists():
            publish.remove(folder)
        parent = {"kind": base.source.kind, "name": base.source.name}
        if base.source.path is not None and base.source.path.is_file():
            parent["fingerprint"] = fingerprint.of_file(base.source.path)
        facts = {"parents": [parent], "new_token_ids": list(base.new_token_ids)}
        write_folder(folder, base.model, base.tokenizer, kind="base", facts=facts)
    return folder


def write_merged(
    run: Path,
    model: ModelConfig,
    vocabulary: Vocabulary,
    folder: Path,
    parents: list[dict[str, Any]],
    *,
    device: torch.device,
) -> Path:
    """Fold an adapter into its base and write the sum to ``RUN/base``: computed in fp32, rounded once.

    It is done in a stream, without opening the base. What has no files to stream from (a GGUF, a vocabulary that grew)
    or no formula there is opened and merged by peft in memory.

    Args:
        model: the base.
        vocabulary: its tokenizer, which the sum keeps.
        folder: the adapter's.
        parents: the base and the adapter, for the manifest.

    Raises:
        RequestError: there is no such base, or it does not open.
        ArtifactError: the adapter is not this base's, or a file is damaged.
    """
    target = run / "base"
    if target.exists():
        publish.remove(target)
    facts = {"parents": parents, "new_token_ids": []}
    precision = resolve_precision(model, device)
    source = locate_base(model)
    if _streams(source, model, vocabulary):
        assert source.path is not None
        specs = [place.spec for file in weight_files(source.path) for place in read_header(file)[0].values()]
        dtype = None if precision_of(specs, {}) == precision else precision  # what a folder keeps in fp32 stays so
        try:
            return merge_folders(
                source.path, folder, target, dtype=dtype, tokenizer=tokenizer_files(vocabulary.tokenizer), facts=facts
            )
        except LuthierError as error:
            if error.code not in _NOT_IN_A_STREAM:
                raise
    _merge_in_memory(target, open_base(model, device=device, vocabulary=vocabulary), folder, facts)
    return target


def _streams(source: BaseSource, model: ModelConfig, vocabulary: Vocabulary) -> bool:
    if source.kind == "gguf" or vocabulary.new_token_ids or model.trust_remote_code:
        return False
    return source.path is not None and is_plain(source.path)


def is_fetched(source: BaseSource) -> bool:
    """Whether a base's weights are on this machine; a hub's snapshot may hold its config alone."""
    if source.kind != "hub":
        return True
    path = source.path
    if path is None or not any((path / name).is_file() for name in (INDEX, SINGLE)):
        return False
    return all(file.is_file() for file in weight_files(path))


def _merge_in_memory(target: Path, base: Base, folder: Path, facts: dict[str, Any]) -> None:
    """Let peft merge.

    Args:
        base: as opened; it is used up.
        folder: the adapter's.

    Raises:
        ArtifactError: the adapter is not this base's.
    """
    from luthier.models.saved_adapter import open_adapter

    dtypes = {name: tensor.dtype for name, tensor in base.model.state_dict().items()}
    wrapped: Any = open_adapter(base, folder, trainable=False)[0]
    merged = wrapped.float().merge_and_unload(safe_merge=True)
    widest = base.model.config.dtype
    for name, tensor in [*merged.named_parameters(), *merged.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes.get(name, widest if isinstance(tensor, nn.Parameter) else tensor.dtype))
    write_folder(target, merged, base.tokenizer, kind="merged", facts=facts)


def adopt(run: Path, folder: Path) -> Path:
    """Keep another run's ``base/`` as this run's own, so that it opens when that run is gone; weights are linked where possible."""
    target = run / "base"
    if existing(run) is None:
        if target.exists():
            publish.remove(target)
        partial = publish.begin(target)
        manifest = manifests.read(folder)
        for name in manifest.files:
            link_or_copy(folder / name, partial / name)
        publish.finish(partial, target, manifest)
    return target


def existing(run: Path) -> Path | None:
    """``RUN/base`` if it is there and whole."""
    folder = run / "base"
    if not folder.is_dir():
        return None
    manifest, problems = manifests.check_whole(folder)
    return None if manifest is None or problems else folder
