"""``RUN/base``: a base that plain libraries could not find again, written once as a transformers folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from luthier.artifacts import fingerprint, publish
from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import link_or_copy
from luthier.checkpoint.checkpoints import versions
from luthier.checkpoint.layout import model_layout, saved_state
from luthier.checkpoint.ranks import Ranks
from luthier.checkpoint.shards import HostBuffers
from luthier.checkpoint.small_files import small_files
from luthier.checkpoint.write import plan_part, write_parts
from luthier.models.open import Base


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


def write_merged(run: Path, base: Base, folder: Path, parents: list[dict[str, Any]]) -> Path:
    """Fold an adapter into its base and write the sum to ``RUN/base``: computed in fp32, rounded once.

    Args:
        base: as opened; it is used up.
        folder: the adapter's.
        parents: the base and the adapter, for the manifest.

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
    target = run / "base"
    if target.exists():
        publish.remove(target)
    facts = {"parents": parents, "new_token_ids": []}
    write_folder(target, merged, base.tokenizer, kind="base", facts=facts)
    return target


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
