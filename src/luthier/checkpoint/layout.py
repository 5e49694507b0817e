"""Which tensors a model's folder holds, and where in memory each of them lies.

The folder must be what ``save_pretrained`` would write, since plain transformers or peft open it. So nothing here
knows how names or shapes change between memory and files: transformers' own reverse conversion (peft's own state
dict for adapters) runs once on a copy of the model without storage, and how its outputs view its inputs is the map.
Where an output is no view of an input (a permutation, a concatenation), the tensors concerned form a *group* that is
gathered and converted with real bytes when it is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from luthier.artifacts.runs import Runs
from luthier.artifacts.tensorfile import TensorSpec
from luthier.checkpoint.dtypes import spec_of
from luthier.models.adapter_names import is_stacked


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: its elements are ``runs`` of ``source`` in memory, or come from a ``group``."""

    spec: TensorSpec
    source: str = ""
    runs: Runs | None = None
    group: int | None = None


@dataclass(frozen=True)
class Layout:
    """All tensors of one folder; ``groups[i]`` names the tensors in memory that conversion i needs together."""

    stored: tuple[Stored, ...]
    groups: tuple[tuple[str, ...], ...] = ()

    @property
    def sources(self) -> list[str]:
        """Names of the tensors in memory that must be at hand to write this layout."""
        direct = (item.source for item in self.stored if item.group is None)
        return sorted({*direct, *(name for group in self.groups for name in group)})


def plain_layout(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """The layout of tensors that are stored as they are, such as an optimiser's."""
    specs = [spec_of(name, tensors[name]) for name in sorted(tensors)]
    return Layout(tuple(Stored(spec, spec.name, Runs.whole(tensors[spec.name].numel())) for spec in specs))


def model_layout(model: nn.Module) -> Layout:
    """The layout of a transformers model's folder, or of a peft model's adapter folder."""
    memory = _state(model)
    meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in memory.items()}
    owners = {tensor.untyped_storage()._cdata: name for name, tensor in meta.items()}
    with _StayViews():
        files = to_files(model, meta)
    stored, strangers = [], {}
    for name, tensor in files.items():
        source = owners.get(tensor.untyped_storage()._cdata)
        if source is None or tensor.dtype != meta[source].dtype:
            strangers[name] = tensor
        else:
            runs = Runs.of_view(tensor.storage_offset(), tensor.shape, tensor.stride())
            stored.append(Stored(spec_of(name, tensor), source, runs))
    if not strangers:
        return Layout(tuple(stored))
    used = {item.source for item in stored}
    groups = _groups(model, {name: tensor for name, tensor in meta.items() if name not in used}, strangers)
    for index, group in enumerate(groups):
        outputs = to_files(model, {name: meta[name] for name in group})
        stored += [Stored(spec_of(name, tensor), group=index) for name, tensor in outputs.items()]
    return Layout(tuple(stored), groups)


def to_files(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bring tensors from the names and shapes in memory to those in files, as ``save_pretrained`` does."""
    if is_adapter(model):
        from peft import get_peft_model_state_dict

        if is_stacked(model):
            from luthier.models import stack  # with peft, which a stream without adapters in memory does not need

            return stack.to_files(model, tensors)

        return get_peft_model_state_dict(
            model,
            state_dict=tensors,
            adapter_name=active_adapter(model),
            save_embedding_layers=False,  # "auto" asks the hub; rows that are trained are the adapter's own tensors
        )
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))


def is_adapter(model: nn.Module) -> bool:
    """Whether the model is a peft model, of which only the adapter is saved."""
    return hasattr(model, "peft_config") and hasattr(model, "base_model")


def active_adapter(model: Any) -> str:
    """Name of the one adapter that is trained and saved."""
    name = model.active_adapter
    return name if isinstance(name, str) else name[0]


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is to be saved of a model, in memory's names: tied tensors once, under the name that loading expects."""
    tensors = {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, torch.Tensor)
    }
    if is_adapter(model):
        if not is_stacked(model):
            return tensors
        from luthier.models import stack

        return stack.own(tensors)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    followers = set(getattr(model, "all_tied_weights_keys", None) or ())
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    drop = {name for same in names.values() if len(same) > 1 for name in same if name in followers}
    return {name: tensor for name, tensor in tensors.items() if name not in drop and name not in ignored}


def saved_state(model: nn.Module, layout: Layout) -> dict[str, torch.Tensor]:
    """The live tensors that a layout is written from or read into, by their names in memory."""
    tensors = dict(model.state_dict(keep_vars=True))
    return {name: tensors[name] for name in layout.sources}


def _groups(
    model: nn.Module, left: dict[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> tuple[tuple[str, ...], ...]:
    """Split the tensors whose conversion is no view into the smallest sets that convert on their own: by layer."""
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    if is_adapter(model) and {name: tensor.shape for name, tensor in to_files(model, {}).items()} == shapes:
        return ((),)  # peft takes these from its own modules (prompts, indices), whatever tensors it is given
    by_layer: dict[str, list[str]] = {}
    for name in left:
        found = re.match(r".*?\.\d+\.", name)
        by_layer.setdefault(found.group() if found else "", []).append(name)
    groups = tuple(tuple(sorted(names)) for names in by_layer.values())
    outputs: dict[str, torch.Size] = {}
    for group in groups:
        outputs |= {
            name: tensor.shape for name, tensor in to_files(model, {name: left[name] for name in group}).items()
        }
    if outputs == shapes:
        return groups
    return (tuple(sorted(left)),)


class _StayViews(TorchFunctionMode):
    """Keep views what they are: the conversion's ``.contiguous()`` would hide which elements a tensor is made of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.contiguous, torch.Tensor.clone):
            return args[0]
        return func(*args, **(kwargs or {}))
