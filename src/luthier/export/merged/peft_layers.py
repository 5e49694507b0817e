"""Merging by peft, one layer at a time: for methods that this package has no formula of.

A layer is built alone, with peft's own class around the model's own, carrying the streamed weight in fp32; peft loads
the adapter's tensors of this layer and merges; the sum is read out and the layer dropped. Methods whose layers share
tensors (VeRA's projections, a bank of vectors) are put on the whole model at once, on weights that take no memory,
and each layer gets its real weight for as long as it is merged.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from luthier.artifacts.names import PEFT
from luthier.artifacts.tensorfile import TensorSpec
from luthier.errors import ArtifactError, RequestError
from luthier.export.merged.adapter import Adapter
from luthier.export.naming import empty_model
from luthier.export.source import Source

NAME = "default"
KEPT = 2  # layers held: a large tensor is written in several pieces, by several threads
_SHARING = ("RANDLORA",)  # shares its bases between layers, though its class doesn't say so

Read = Callable[[str], torch.Tensor]  # a tensor in memory's name → its values in the base, fp32


class PeftLayers(Source):
    """The merged tensors of one adapter, each computed when it is read.

    Attributes:
        layers: the modules that peft changes.
        wholes: tensors that the adapter holds whole (biases, modules_to_save), by name in memory.

    Raises:
        ArtifactError: tensors of the adapter belong nowhere.
        RequestError: peft cannot build the method on this model.
    """

    def __init__(self, folder: Path, adapter: Adapter, read: Read) -> None:
        super().__init__(folder, {})
        self._adapter, self._read = adapter, read
        self._config: Any = PeftConfig.from_pretrained(str(adapter.folder))
        self._config.modules_to_save = None  # these are wholes
        self._config.inference_mode = True
        if hasattr(self._config, "bias"):
            self._config.bias = "none"
        self._model = empty_model(folder)
        self._lock = threading.Lock()
        self._held: dict[str, dict[str, torch.Tensor]] = {}
        self._of: dict[str, tuple[str, int]] = {}
        self.wholes: dict[str, str] = {}
        self._tensors: dict[
            str, dict[str, str]
        ] = {}  # module → name in the adapter's file as peft writes it → as stored
        self._shared: dict[str, str] = {}
        self._sort()
        self._whole: Any = None
        if self._is_shared():
            with _named(adapter):
                self._whole = self._on_whole_model()
            inner = self._whole.base_model.model
            self.layers = [name for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)]
        elif self._shared:
            raise _strange(next(iter(self._shared)), adapter)
        else:
            self.layers = list(self._tensors)
        self._whole_of = {
            name: stored for name, stored in self.wholes.items() if name.rpartition(".")[0] in self.layers
        }
        for name in self._whole_of:
            del self.wholes[name]

    def tensors_of(self, module: str) -> list[str]:
        """A layer's tensors, by name in memory."""
        return [f"{module}.{key}" for key, _ in self._plain(module).named_parameters(recurse=False)]

    def output(self, name: str, start: int, spec: TensorSpec) -> str:
        """Register a tensor to be read: ``spec``'s elements from ``start`` on of a tensor in memory; returns its key."""
        key = f"{name}[{start}]"
        self._of[key] = (name, start)
        self.specs[key] = TensorSpec(key, "F32", spec.shape)
        return key

    def read(self, name: str, start: int, target: torch.Tensor) -> None:
        tensor, first = self._of[name]
        module, _, key = tensor.rpartition(".")
        with self._lock:
            if module not in self._held:
                while len(self._held) >= KEPT:
                    del self._held[next(iter(self._held))]
                with _named(self._adapter), torch.no_grad(), torch.random.fork_rng(devices=[]):
                    self._held[module] = self._merge(module)
            merged = self._held[module][key]
        target.copy_(merged.reshape(-1)[first + start : first + start + target.numel()])

    def _sort(self) -> None:
        state = set(self._model.state_dict())
        modules = {name for name, _ in self._model.named_modules() if name}
        for plain, stored in self._adapter.others.items():
            name = plain.removeprefix(PEFT)
            whole = name.replace(".base_layer.", ".")
            module = name.rpartition(".")[0]
            while module and module not in modules:
                module = module.rpartition(".")[0]
            if whole in state:
                self.wholes[whole] = stored
            elif plain.startswith(PEFT) and module:
                self._tensors.setdefault(module, {})[plain] = stored
            else:
                self._shared[plain] = stored

    def _is_shared(self) -> bool:
        kind = PEFT_TYPE_TO_TUNER_MAPPING[self._config.peft_type]
        proportional = getattr(
            self._config, "proportional_parameters", False
        )  # of WaveFT: sizes follow from all layers
        return kind.uses_shared_state or self._config.peft_type.value in _SHARING or bool(proportional)

    def _plain(self, module: str) -> nn.Module:
        found = self._whole.base_model.model.get_submodule(module) if self._whole else self._model.get_submodule(module)
        return found.get_base_layer() if isinstance(found, BaseTunerLayer) else found

    def _state(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        return {name: self._adapter.source.tensor(stored) for name, stored in names.items()}

    def _on_whole_model(self) -> PeftModel:
        for module in self._model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[key] = _no_memory(parameter)
            for key, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[key] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
        every = self._shared | {name: stored for found in self._tensors.values() for name, stored in found.items()}
        return self._attached(self._model, self._config, self._state(every))

    def _attached(self, model: nn.Module, config: PeftConfig, state: dict[str, torch.Tensor]) -> PeftModel:
        wrapped = PeftModel(model, config, NAME)  # type: ignore[arg-type]
        set_peft_model_state_dict(wrapped, dict(state), NAME)
        live = get_peft_model_state_dict(wrapped, adapter_name=NAME, save_embedding_layers=False)
        live = {name: tensor for name, tensor in live.items() if isinstance(tensor, torch.Tensor)}
        odd = sorted(live.keys() ^ state.keys()) or sorted(
            name for name in live if not torch.equal(live[name], state[name].to(live[name].dtype))
        )
        if odd:
            raise ArtifactError(
                f"{odd[0]} is {'not in the file' if odd[0] not in state else 'not what peft asks for'} (and {len(odd) - 1} more).",
                code="coverage",
                where=str(self._adapter.folder),
                remedy="Save the adapter again from the run.",
            )
        return wrapped.eval()

    def _merge(self, module: str) -> dict[str, torch.Tensor]:
        plain = self._plain(module)
        values = {}
        for key, parameter in plain.named_parameters(recurse=False):
            own = self._whole_of.get(f"{module}.{key}")
            value = self._adapter.source.tensor(own).float() if own else self._read(f"{module}.{key}")
            values[key] = nn.Parameter(value.reshape(parameter.shape), requires_grad=False)
        if self._whole is None:
            return self._merged_alone(module, plain, values)
        layer: Any = self._whole.base_model.model.get_submodule(module)
        empty = dict(plain._parameters)
        try:
            plain._parameters.update(values)
            layer.merge()
            return {key: parameter.detach() for key, parameter in plain.named_parameters(recurse=False)}
        finally:
            plain._parameters.update(empty)
            layer.merged_adapters.clear()

    def _merged_alone(
        self, module: str, plain: nn.Module, values: Mapping[str, nn.Parameter]
    ) -> dict[str, torch.Tensor]:
        leaf = copy.deepcopy(plain)
        leaf._parameters.update(values)
        config = copy.deepcopy(self._config)
        if config.peft_type.value == "ADALORA" and config.rank_pattern:  # peft resizes every layer named there
            config.rank_pattern = {k: v for k, v in config.rank_pattern.items() if k.startswith(f"{module}.")}
        wrapped: Any = self._attached(_around(module, leaf), config, self._state(self._tensors[module]))
        merged = wrapped.merge_and_unload().get_submodule(module)
        return {key: parameter.detach() for key, parameter in merged.named_parameters(recurse=False)}


def _around(path: str, leaf: nn.Module) -> nn.Module:
    """A model that consists of one layer, under its own name."""
    root = nn.Module()
    *outer, last = path.split(".")
    inner = root
    for part in outer:
        child = nn.Module()
        inner.add_module(part, child)
        inner = child
    inner.add_module(last, leaf)
    return root


def _no_memory(parameter: torch.Tensor) -> nn.Parameter:
    """Zeros of a shape that share one element."""
    return nn.Parameter(torch.zeros((), dtype=torch.float32).expand(parameter.shape), requires_grad=False)


class _named:
    """What peft raises inside becomes an error that names the adapter."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError | NotImplementedError | TypeError | KeyError | RuntimeError | ImportError):
            raise RequestError(
                f"peft cannot merge this adapter: {' '.join(str(error).split())[:300]}",
                code="cannot-merge",
                where=str(self._adapter.folder),
                remedy="Serve the adapter on its base.",
            ) from error


def _strange(name: str, adapter: Adapter) -> ArtifactError:
    return ArtifactError(
        f"the adapter speaks of {name}, and the base has no layer that this could be.",
        code="adapter-does-not-fit",
        where=str(adapter.folder),
        remedy="Give the base that it was trained on with --base (`luthier inspect` on the adapter names it).",
    )


def iterate(layers: PeftLayers) -> Iterator[tuple[str, str]]:
    """Every tensor that the layers change, with its layer."""
    for module in layers.layers:
        for name in layers.tensors_of(module):
            yield module, name
