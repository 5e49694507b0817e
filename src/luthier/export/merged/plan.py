"""The plan of a merge: for every tensor of the merged folder, what it is read from and what changes it.

The adapter's layers are found among the base's tensors by name; where names don't tell (embeddings that may be tied,
parameters targeted directly, names that transformers converts), the model's naming is asked for. Every tensor of
every adapter is used, or it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from luthier.artifacts.tensorfile import TensorSpec
from luthier.errors import ArtifactError, RequestError
from luthier.export.merged.adapter import Adapter
from luthier.export.merged.combine import Combination, Mixer
from luthier.export.merged.lowrank import Change, LowRank
from luthier.export.naming import Naming, Stretch, read_naming
from luthier.export.source import Source
from luthier.export.stream import Output

if TYPE_CHECKING:
    from luthier.export.merged.peft_layers import PeftLayers

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass
class MergePlan:
    """What to write, and whether tied weights part."""

    outputs: list[Output]
    untied: bool
    vocabulary: int | None


@dataclass
class _Touched:
    """What the adapters do to one tensor in memory."""

    whole: tuple[Adapter, str] | None = None
    own_copy: bool = False  # the whole is the adapter's alone, so what was tied to the base's stays as it was
    change: Change | None = None
    layers: PeftLayers | None = None  # peft computes it
    rows: int | None = None
    tokens_only: bool = True


@dataclass
class _Planner:
    base: Source
    folder: Path
    adapters: Sequence[Adapter]
    combination: Combination | None = None
    touched: dict[str, _Touched] = field(default_factory=dict)
    _naming: Naming | None = None

    @property
    def naming(self) -> Naming:
        if self._naming is None:
            self._naming = read_naming(self.folder)
        return self._naming

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in memory of a tensor in memory."""
        if self._direct(name):
            return self.base.specs[name].shape
        name = self.naming.tied.get(name, name)
        if name not in self.naming.shapes:
            raise self.unknown(name)
        return self.naming.shapes[name]

    def has(self, name: str) -> bool:
        return self._direct(name) or name in self.naming.shapes

    def stretches(self, name: str) -> list[Stretch]:
        """The file tensors that a tensor in memory is made of."""
        if self._direct(name):
            return [Stretch(name, 0, _count(self.base.specs[name].shape))]
        found = self.naming.stored.get(self.naming.tied.get(name, name))
        if found is None:
            raise self.unknown(name)
        return [replace(each, file=self._in_files(each.file)) for each in found]

    def _in_files(self, name: str) -> str:
        short = name.partition(".")[2]
        for candidate in (name, short):  # files of a headless model lack the first part
            if candidate in self.base.specs:
                return candidate
        raise self.unknown(name)

    def _direct(self, name: str) -> bool:
        """Names inside numbered layers are the same in memory and in files if they are there at all; others may be tied."""
        return name in self.base.specs and re.search(r"\.\d+\.", name) is not None and self._naming is None

    def unknown(self, name: str) -> ArtifactError:
        return ArtifactError(
            f"the adapter speaks of {name}, and the base has no tensor that is this.",
            code="adapter-does-not-fit",
            where=str(self.folder),
            remedy="Give the base that it was trained on with --base (`luthier inspect` on the adapter names it).",
        )

    def touch(self, name: str) -> _Touched:
        return self.touched.setdefault(name, _Touched())

    def add(self, name: str, width: int, adapter: Adapter, load: Callable[[], LowRank]) -> Change:
        """Have a thin product of an adapter added to a tensor."""
        change = self.change(name, width)
        change.low.append(load)
        self.touch(name).tokens_only = False
        if self.combination is not None:
            change.mixer = change.mixer or Mixer(self.combination, name)
            change.mixer.owners.append(next(i for i, each in enumerate(self.adapters) if each is adapter))
            change.mixer.weights.append(adapter.weight)
        return change

    def change(self, name: str, width: int) -> Change:
        touched = self.touch(name)
        if touched.change is None:
            touched.change = Change(width)
        return touched.change


def plan_merge(
    base: Source, adapters: Sequence[Adapter], dtype: str | None, combination: Combination | None = None
) -> MergePlan:
    """Plan the merged folder's tensors.

    Args:
        dtype: safetensors' word for what floating tensors are cast to; each keeps its own if None.
        combination: how several adapters' changes become one; their weighted sum if None.

    Raises:
        ArtifactError: an adapter does not fit the base, or lacks tensors.
        RequestError: a combination that cannot be merged.
    """
    planner = _Planner(base, base.folder, adapters, combination)
    if any(adapter.config.get("target_parameters") for adapter in adapters):
        _ = planner.naming
    for adapter in adapters:
        alone = len(adapters) == 1 and adapter.weight == 1.0
        for whole, stored in adapter.wholes.items():
            _must_be_alone(alone, adapter, f"{whole} is replaced as a whole")
            _plan_whole(planner, adapter, whole, stored)
        if adapter.others:
            _plan_layers(planner, adapter, alone)
        for module, parts in list(adapter.parts.items()):
            if not parts:
                continue
            _plan_module(planner, adapter, module, set(parts), alone)
        _check_targets(planner, adapter)
    return _outputs(planner, dtype)


def stretches_of(base: Source, name: str) -> list[Stretch]:
    """The tensors of the files that a tensor in memory is made of.

    Raises:
        ArtifactError: there are none.
    """
    return _Planner(base, base.folder, ()).stretches(name)


def _must_be_alone(alone: bool, adapter: Adapter, what: str) -> None:
    if not alone:
        raise RequestError(
            f"{what} by this adapter, which has no meaning in a sum or with a weight.",
            code="cannot-merge",
            where=str(adapter.folder),
            remedy="Merge this adapter alone, with weight 1.",
        )


def _plan_whole(planner: _Planner, adapter: Adapter, name: str, stored: str) -> None:
    touched = planner.touch(name)
    module = name.rpartition(".")[0]
    saved = adapter.config.get("modules_to_save") or []
    touched.own_copy = any(module == key or f".{module}.".find(f".{key}.") >= 0 for key in saved)
    touched.whole = (adapter, stored)
    touched.tokens_only = False
    ours, theirs = adapter.source.specs[stored].shape, planner.shape(name)
    if ours[1:] != theirs[1:] or (ours != theirs and re.search(r"\.\d+\.", name)):
        raise _shape(adapter, name, ours, theirs)
    if ours != theirs:
        touched.rows = ours[0]


def _shape(adapter: Adapter, name: str, ours: Sequence[int], theirs: Sequence[int]) -> ArtifactError:
    return ArtifactError(
        f"{name} is {list(theirs)} in the base, and the adapter's tensors for it are made for {list(ours)}.",
        code="adapter-does-not-fit",
        where=str(adapter.folder),
        remedy="Give the base that it was trained on with --base.",
    )


def _plan_module(planner: _Planner, adapter: Adapter, module: str, parts: set[str], alone: bool) -> None:
    if parts == {"trainable_tokens_delta"}:
        _must_be_alone(alone, adapter, f"rows of {module} are replaced")
        return _plan_tokens(planner, adapter, module)
    embedding = "lora_embedding_A" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    known = {first, second, "lora_magnitude_vector"} | (set() if embedding else {"lora_B.bias"})
    dora = bool(adapter.config.get("use_dora"))
    needed = {first, second} | ({"lora_magnitude_vector"} if dora else set())
    if not needed <= parts or not parts <= known or ("lora_magnitude_vector" in parts) != dora:
        odd = sorted(needed - parts) or sorted(parts - known) or ["lora_magnitude_vector"]
        raise ArtifactError(
            f"the adapter's tensors for {module} are {', '.join(sorted(parts))}: {odd[0]} is {'missing' if odd[0] not in parts else 'not expected'}.",
            code="coverage",
            where=str(adapter.folder),
            remedy="Save the adapter again from the run.",
        )
    if dora:
        _must_be_alone(alone, adapter, f"{module} is scaled (DoRA)")
    name, key = _parameter(planner, adapter, module)
    shape, grown = planner.shape(name), planner.touch(name).rows
    if grown is not None:
        shape = (grown, *shape[1:])
    a, b = adapter.spec(module, first).shape, adapter.spec(module, second).shape
    turned = embedding or bool(adapter.config.get("fan_in_fan_out"))
    direct = key != module
    groups = shape[0] if direct and len(shape) == 3 else 1
    swapped = groups > 1 and module_of(name) in planner.naming.transposed
    ranks = a[0] // groups
    width = _count(shape[1:]) if groups == 1 else shape[-1]
    tall, wide = (_count(a[1:]), b[0]) if turned or swapped else (b[0], _count(a[1:]))
    if wide != width or tall * groups != _count(shape) // width or a[0] != b[1]:
        raise _shape(adapter, name, (*((groups,) if groups > 1 else ()), tall, wide), shape)
    scale = adapter.scaling(key, ranks, module) * (adapter.weight if planner.combination is None else 1.0)

    def load() -> LowRank:
        down = adapter.source.tensor(adapter.parts[module][first]).float().reshape(groups, ranks, -1)
        up = adapter.source.tensor(adapter.parts[module][second]).float().reshape(b[0], ranks, groups).permute(2, 0, 1)
        if turned or swapped:
            left, right = down.transpose(1, 2), up.transpose(1, 2) * scale
        else:
            left, right = up * scale, down
        return LowRank(left.reshape(-1, ranks).contiguous(), right.contiguous())

    change = planner.add(name, width, adapter, load)
    if dora:
        change.magnitude = lambda: adapter.source.tensor(adapter.parts[module]["lora_magnitude_vector"])
        change.by_column = turned
    if "lora_B.bias" in parts:
        _plan_bias(planner, adapter, module, scale)


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _parameter(planner: _Planner, adapter: Adapter, module: str) -> tuple[str, str]:
    """The tensor in memory that a layer of the adapter changes, and the key that its patterns match.

    A parameter targeted directly has no name of its own in an adapter's file: peft wraps its module once for each of
    them, in the order that the module has them, so the innermost wrapper (most ``base_layer``) is the first.
    """
    targets = adapter.config.get("target_parameters") or []
    plain = re.sub(r"(\.base_layer)+$", "", module)
    depth = module[len(plain) :].count(".base_layer")
    if targets:
        own = planner.naming.parameters.get(plain, [])
        hit = [p for p in own if any(f"{plain}.{p}" == t or f"{plain}.{p}".endswith(f".{t}") for t in targets)]
        if hit:
            if depth >= len(hit):
                raise planner.unknown(module)
            name = f"{plain}.{hit[len(hit) - 1 - depth]}"
            return name, name
    name = f"{plain}.weight"
    if not planner.has(name):
        raise planner.unknown(name)
    return name, module


def _plan_bias(planner: _Planner, adapter: Adapter, module: str, scale: float) -> None:
    name = f"{module}.bias"
    if not planner.has(name):
        raise RequestError(
            f"the adapter gives {module} a bias (lora_bias), and the base's layer has none to add it to.",
            code="cannot-merge",
            where=str(adapter.folder),
            remedy="Serve the adapter on its base.",
        )

    def load() -> LowRank:
        bias = adapter.source.tensor(adapter.parts[module]["lora_B.bias"]).float()
        return LowRank(torch.full((1, 1), scale), bias.reshape(1, 1, -1))

    planner.add(name, _count(planner.shape(name)), adapter, load)


def _plan_tokens(planner: _Planner, adapter: Adapter, module: str) -> None:
    name = f"{module}.weight"
    told = adapter.config.get("trainable_token_indices") or adapter.config.get("token_indices") or []
    if isinstance(told, dict):
        told = next((told[key] for key in told if module == key or module.endswith(f".{key}")), [])
    spec = adapter.spec(module, "trainable_tokens_delta")
    if len(told) != spec.shape[0]:
        raise ArtifactError(f"{module} has {spec.shape[0]} trained rows in the file and {len(told)} indices in adapter_config.json.", code="coverage", where=str(adapter.folder), remedy="Save the adapter again from the run.")  # fmt: skip
    touched, (held, width) = planner.touch(name), planner.shape(name)
    if spec.shape[1] != width:
        raise _shape(adapter, name, spec.shape, (held, width))
    rows = max(touched.rows or held, max(told) + 1)
    missing = sorted(set(range(touched.rows or held, rows)) - set(told))
    if missing:
        raise ArtifactError(f"row {missing[0]} of {name} is in neither the base nor the adapter.", code="adapter-does-not-fit", where=str(adapter.folder), remedy="Give the base that it was trained on with --base.")  # fmt: skip
    touched.rows = rows if rows != held else touched.rows
    indices = torch.tensor(told)
    planner.change(name, width).rows.append(
        lambda: (indices, adapter.source.tensor(adapter.parts[module]["trainable_tokens_delta"]))
    )


def _plan_layers(planner: _Planner, adapter: Adapter, alone: bool) -> None:
    """Layers of a method that peft merges, each computed when it is written."""
    from luthier.export.merged.peft_layers import PeftLayers, iterate

    _must_be_alone(alone, adapter, f"layers are changed in {adapter.method}'s way")

    def read(name: str) -> torch.Tensor:
        return torch.cat([planner.base.tensor(each.file).float().reshape(-1) for each in planner.stretches(name)])

    layers = PeftLayers(planner.folder, adapter, read)
    for whole, stored in layers.wholes.items():
        _plan_whole(planner, adapter, whole, stored)
    for _, name in iterate(layers):
        touched = planner.touch(name)
        touched.layers, touched.tokens_only = layers, False
    adapter.parts |= {module: {} for module in layers.layers if module not in adapter.parts}


def _check_targets(planner: _Planner, adapter: Adapter) -> None:
    """Layers that the config targets and the file has no tensors for: the adapter is only a part of one."""
    config = adapter.config
    limits = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(config.get(key) for key in limits):
        return
    in_files = {module_of(name) for name in planner.base.specs}
    known = (
        planner.base.specs if in_files.issuperset(adapter.parts) else planner.naming.shapes
    )  # an adapter's names are memory's
    modules = [module_of(name) for name in known if name.endswith(".weight") and ".experts." not in name]
    wanted = [m for m in modules if any(m == t or m.endswith(f".{t}") for t in targets)]
    have = {name for name in adapter.parts}
    missing = [m for m in wanted if m not in have and not any(h.endswith(f".{m}") for h in have)]
    if missing:
        raise ArtifactError(
            f"the adapter's config targets {missing[0]} (and {len(missing) - 1} more) that its file has no tensors for.",
            code="coverage",
            where=str(adapter.folder),
            remedy="Save the adapter again from the run, or correct target_modules in adapter_config.json.",
        )


def _outputs(planner: _Planner, dtype: str | None) -> MergePlan:
    base, touched = planner.base, planner.touched
    tied = {} if all(planner._direct(name) for name in touched) else dict(planner.naming.tied)
    made: dict[str, Output] = {}
    extra: list[Output] = []
    parts = _parting(planner, tied)
    for name, what in touched.items():
        follower = name in tied
        if follower and name not in parts:
            continue  # the same change as that of what it is tied to
        for stretch in planner.stretches(name):
            original = base.specs[stretch.file]
            output = _output(what, base, original, stretch, name, dtype)
            if follower:
                extra.append(replace(output, spec=replace(output.spec, name=name)))
            else:
                made[stretch.file] = output
    for left in sorted(parts - set(touched)):  # keeps what it had, in a tensor of its own now
        stretch = planner.stretches(left)[0]
        spec = base.specs[stretch.file]
        extra.append(Output(_cast(replace(spec, name=left), dtype), base, stretch.file))
    outputs = [
        made.get(name) or Output(_cast(spec, dtype), base, name)
        for name, spec in base.specs.items()
        if name not in parts
    ]
    rows = {what.rows for what in touched.values() if what.rows}
    return MergePlan([*outputs, *extra], bool(parts), max(rows) if rows else None)


def _parting(planner: _Planner, tied: dict[str, str]) -> set[str]:
    """The followers that can no longer share their tensor: one of the two changes otherwise than the other."""
    parting = set()
    for follower, leader in tied.items():
        one, other = planner.touched.get(follower), planner.touched.get(leader)
        if one is None and other is None:
            continue
        together = any(adapter.config.get("ensure_weight_tying") for adapter in planner.adapters)
        shared = (
            other is not None
            and not other.own_copy
            and (other.tokens_only or (other.change is None and other.layers is None))
        )
        if one is None and (shared or together):
            continue
        if one is not None and other is not None and (together or (one.tokens_only and other.tokens_only)):
            continue
        parting.add(follower)
    return parting


def _output(
    what: _Touched, base: Source, original: TensorSpec, stretch: Stretch, name: str, dtype: str | None
) -> Output:
    shape = original.shape if what.rows is None else (what.rows, *original.shape[1:])
    spec = _cast(replace(original, shape=shape), dtype)
    change = what.change
    if change is not None and stretch.start:
        change = replace(change, first=stretch.start // change.width, _norms=None)
    if what.layers is not None:
        return Output(spec, what.layers, what.layers.output(name, stretch.start, original))
    if what.whole is not None:
        adapter, stored = what.whole
        if _count(shape) != stretch.count and what.rows is None:
            raise ArtifactError(f"{name} is split over several tensors in the base's files, which cannot be replaced as a whole.", code="adapter-does-not-fit", where=str(adapter.folder))  # fmt: skip
        return Output(spec, adapter.source, stored, change)
    return Output(spec, base, stretch.file, change)


def _cast(spec: TensorSpec, dtype: str | None) -> TensorSpec:
    return replace(spec, dtype=dtype) if dtype and spec.dtype in FLOATS else spec


def _count(shape: Sequence[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
