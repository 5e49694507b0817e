"""An optimiser's tensors by name, for Luthier's own optimiser and for any plain torch one.

Names are ``PARAMETER::STATE`` (``model.norm.weight::exp_avg``), so that a state can be found without an order of
parameters, and is a tensor like any other: written in place, sharded, digested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from luthier.artifacts.tensorfile import TensorSpec
from luthier.checkpoint.dtypes import FROM_FILE
from luthier.errors import ArtifactError, RequestError

MARK = "::"


@runtime_checkable
class NamedState(Protocol):
    """What Luthier's own optimiser offers."""

    def state_tensors(self) -> dict[str, torch.Tensor]: ...

    def master_tensors(self) -> dict[str, torch.Tensor]: ...

    def load_tensors(self, states: dict[str, torch.Tensor], masters: dict[str, torch.Tensor]) -> None: ...


def collect(model: nn.Module, optimizer: Any | None) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of an optimiser by file stem: ``optimizer`` and, where there are any, ``masters``."""
    if optimizer is None:
        return {}
    if isinstance(optimizer, NamedState):
        parts = {"optimizer": optimizer.state_tensors(), "masters": optimizer.master_tensors()}
        return {stem: tensors for stem, tensors in parts.items() if tensors}
    names = _names(model)
    for state in optimizer.state.values():
        _refuse(
            type(optimizer).__name__, {k: v for k, v in state.items() if not isinstance(v, torch.Tensor | int | float)}
        )
    tensors = {
        f"{names[id(parameter)]}{MARK}{key}": value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor | int | float)
    }
    return {"optimizer": tensors} if tensors else {}


def groups_of(optimizer: Any | None) -> list[dict[str, Any]]:
    """The settings of a plain torch optimiser's groups; rates that a user's schedule changed are among them.

    Raises:
        RequestError: one of them is nothing that JSON can hold.
    """
    if optimizer is None or isinstance(optimizer, NamedState):
        return []
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    plain = int | float | bool | str | list | tuple | None
    for group in groups:
        _refuse(type(optimizer).__name__, {key: value for key, value in group.items() if not isinstance(value, plain)})
    return groups


def _refuse(optimizer: str, odd: Mapping[str, Any]) -> None:
    if odd:
        key, value = next(iter(odd.items()))
        raise RequestError(
            f"{optimizer} keeps {key} as a {type(value).__name__}, which a checkpoint cannot hold without pickle.",
            code="optimizer-state",
            where="optimizer",
            remedy="Use an optimiser whose states are tensors and numbers, and whose settings are plain values.",
        )


def targets(model: nn.Module, specs: Iterable[TensorSpec]) -> dict[str, torch.Tensor]:
    """Empty tensors to read states into: sharded like their parameter where they have its shape."""
    parameters = dict(model.named_parameters())
    made: dict[str, torch.Tensor] = {}
    for spec in specs:
        parameter = parameters.get(spec.name.split(MARK)[0])
        dtype = FROM_FILE[spec.dtype]
        if parameter is not None and tuple(parameter.shape) == spec.shape:
            made[spec.name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            made[spec.name] = torch.zeros(spec.shape, dtype=dtype)
    return made


def load(
    model: nn.Module, optimizer: Any, parts: Mapping[str, dict[str, torch.Tensor]], groups: list[dict[str, Any]]
) -> None:
    """Put tensors that were read back into an optimiser.

    Raises:
        ArtifactError: they are not this optimiser's.
    """
    if isinstance(optimizer, NamedState):
        optimizer.load_tensors(dict(parts.get("optimizer", {})), dict(parts.get("masters", {})))
        return
    by_name = {name: parameter for name, parameter in model.named_parameters()}
    if len(groups) != len(optimizer.param_groups):
        raise ArtifactError(
            f"the checkpoint's optimiser has {len(groups)} parameter groups, this one {len(optimizer.param_groups)}.",
            code="optimizer-groups",
            where="optimizer",
            remedy="Build the optimiser as it was when the checkpoint was saved.",
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in parts.get("optimizer", {}).items():
        parameter_name, _, key = name.partition(MARK)
        parameter = by_name.get(parameter_name)
        if parameter is None or id(parameter) not in held:
            raise ArtifactError(
                f"the checkpoint holds a state of {parameter_name}, which this optimiser does not train.",
                code="optimizer-parameters",
                where="optimizer",
                remedy="Make the same parameters trainable as when the checkpoint was saved.",
            )
        state.setdefault(numbers[id(parameter)], {})[key] = tensor
    packed = [
        {**{key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()},
         "params": [numbers[id(parameter)] for parameter in group["params"]]}
        for group, saved in zip(optimizer.param_groups, groups)
    ]  # fmt: skip
    optimizer.load_state_dict({"state": state, "param_groups": packed})  # torch knows where each state belongs


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}
