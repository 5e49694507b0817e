"""Reading tensors back into a live model or optimiser, whole or this process's rows of them.

Reading needs a layout like writing does, and is its mirror image: the byte ranges a rank needs are computed and read
straight into host memory, so any number of processes reads what any other number wrote.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from luthier.artifacts.files import open_binary
from luthier.artifacts.tensorfile import BITS, Place, read_header, read_into
from luthier.checkpoint.dtypes import FROM_FILE
from luthier.checkpoint.layout import Layout
from luthier.checkpoint.shards import stretch_of
from luthier.errors import ArtifactError, RequestError
from luthier.models.adapter_names import is_stacked


def places_in(folder: Path, stem: str) -> dict[str, tuple[Path, Place]]:
    """Where each tensor of ``stem*.safetensors`` in a folder lies.

    Raises:
        ArtifactError: there is no such file, or two of them hold the same tensor.
    """
    found: dict[str, tuple[Path, Place]] = {}
    files = sorted({*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")})
    for path in files:
        for name, place in read_header(path)[0].items():
            if name in found:
                raise ArtifactError(f"tensor {name} is in two files, {found[name][0].name} and {path.name}.", code="twice", where=str(folder))  # fmt: skip
            found[name] = (path, place)
    if not files:
        raise ArtifactError(f"no {stem}*.safetensors here.", code="no-weights", where=str(folder))
    return found


def check_covers(layout: Layout, places: Mapping[str, tuple[Path, Place]], where: Path) -> None:
    """The tensors expected and the tensors found are the same set, with the same shapes and dtypes.

    Raises:
        ArtifactError: they are not; the text names the difference.
    """
    expected = {item.spec.name: item.spec for item in layout.stored}
    missing = sorted(set(expected) - set(places))
    strange = sorted(set(places) - set(expected))
    changed = sorted(name for name in set(expected) & set(places) if places[name][1].spec != expected[name])
    said = []
    for names, what in ((missing, "missing"), (strange, "not expected"), (changed, "of another shape or dtype")):
        if names:
            said.append(f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
    if changed:
        found, wanted = places[changed[0]][1].spec, expected[changed[0]]
        said.append(
            f"{changed[0]} is {found.dtype} {list(found.shape)} there, {wanted.dtype} {list(wanted.shape)} here"
        )
    if said:
        raise ArtifactError(
            f"the tensors there are not those of this model: {'; '.join(said)}.",
            code="coverage",
            where=str(where),
            remedy="Open it with the base and adapter settings it was trained with (`luthier inspect` shows them).",
        )


def read_tensors(
    folder: Path,
    stem: str,
    layout: Layout,
    targets: Mapping[str, torch.Tensor],
    *,
    converter: nn.Module | None = None,
) -> None:
    """Fill ``targets`` (live tensors by memory name, sharded or not) from the files of one part.

    Raises:
        ArtifactError: the set of tensors, a shape or a dtype differs.
    """
    places = places_in(folder, stem)
    check_covers(layout, places, folder)
    descriptors: dict[Path, int] = {}
    try:
        with torch.no_grad():
            for name, items in _by_source(layout).items():
                local, start = _local(targets[name], name)
                if local.numel() == 0:
                    continue
                host = torch.empty(local.shape, dtype=FROM_FILE[items[0].spec.dtype])
                view = memoryview(host.reshape(-1).view(torch.uint8).numpy())
                for item in items:
                    width = BITS[item.spec.dtype] // 8
                    path, place = places[item.spec.name]
                    descriptor = descriptors.setdefault(path, -1)
                    if descriptor < 0:
                        descriptor = descriptors[path] = open_binary(path, os.O_RDONLY)
                    assert item.runs is not None
                    for at, file, count in item.runs.within(start, local.numel()):
                        target = view[at * width : (at + count) * width]
                        read_into(descriptor, target, place.offset + file * width, path)
                local.copy_(host)
            if layout.groups:
                _read_groups(folder, layout, targets, converter)
    finally:
        for descriptor in descriptors.values():
            if descriptor >= 0:
                os.close(descriptor)


def _by_source(layout: Layout) -> dict[str, list]:
    sources: dict[str, list] = {}
    for item in layout.stored:
        if item.group is None:
            sources.setdefault(item.source, []).append(item)
    return sources


def _read_groups(
    folder: Path, layout: Layout, targets: Mapping[str, torch.Tensor], converter: nn.Module | None
) -> None:
    """Tensors whose conversion is no view: transformers itself opens the folder, and they are copied from there."""
    assert converter is not None
    if is_stacked(converter):
        from luthier.models import stack

        stack.read(folder, {name: _local(targets[name], name) for group in layout.groups for name in group}, converter)
        return
    opened = type(converter).from_pretrained(folder, dtype="auto", local_files_only=True)  # type: ignore[attr-defined]
    state = opened.state_dict()
    for group in layout.groups:
        for name in group:
            local, start = _local(targets[name], name)
            local.copy_(state[name].reshape(-1)[start : start + local.numel()].view(local.shape))


def _local(tensor: torch.Tensor, name: str) -> tuple[torch.Tensor, int]:
    found = stretch_of(tensor)
    if found is None:
        raise RequestError(
            f"{name} is sharded along another dimension than its rows, which cannot be read in place.",
            code="sharding",
            where=name,
            remedy="Shard it along dimension 0, as FSDP2 does.",
        )
    return found
