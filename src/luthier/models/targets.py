"""Which layers of a base model an adapter goes on: found by kind or by name, and never a router or the head."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.errors import RequestError
from luthier.models.quantised.layer import QuantisedLinear

ALL_LINEAR = "all-linear"
_LINEAR = (nn.Linear, Conv1D, QuantisedLinear)
_ADAPTABLE = (*_LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
_ROUTERS = ("gate", "shared_expert_gate")
_HEADS = ("score", "classifier", "lm_head")


@dataclass(frozen=True)
class Targets:
    """What peft is asked for: `modules` as names (or one regular expression), `parameters` of fused experts."""

    modules: list[str] | str
    parameters: list[str]


def all_linear(model: PreTrainedModel, exclude: str | list[str] | None, *, experts: bool) -> Targets:
    """Every linear layer but routers, embeddings and head; with `experts` the fused weights of experts too."""
    linear = {name for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    chosen = {
        name for name in linear if not is_router(name) and not is_head(model, name) and not name_matches(name, exclude)
    }
    if not chosen and not (experts and expert_parameters(model)):
        raise RequestError(
            "no linear layer is left to adapt.",
            code="no-target",
            where="adapter.exclude",
            remedy="Exclude fewer layers.",
        )
    parameters = (
        sorted({_tail(name) for name in expert_parameters(model) if not name_matches(name, exclude)}) if experts else []
    )
    names = {name for name, _ in model.named_modules() if name}
    return Targets(shortest(chosen, names - chosen), parameters)


def named(model: PreTrainedModel, target: str | list[str], exclude: str | list[str] | None) -> Targets:
    """Layers by name, or by one regular expression over whole names.

    Raises:
        RequestError: a name, or the expression, matches no layer that can carry an adapter.
    """
    modules = dict(model.named_modules())
    wanted = [target] if isinstance(target, str) and re.fullmatch(r"[\w.]+", target) else target
    for one in [wanted] if isinstance(wanted, str) else wanted:
        _check(one, modules, exclude, pattern=isinstance(wanted, str))
    return Targets(wanted, [])


def check_names(model: PreTrainedModel, names: Iterable[str], where: str) -> None:
    """Raises RequestError for a name that no module of the model ends in."""
    modules = [name for name, _ in model.named_modules()]
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            raise RequestError(
                f"no module is called {name!r}.", code="no-target", where=where, remedy=_closest(name, modules)
            )


def expert_parameters(model: nn.Module) -> list[str]:
    """Names of the fused weights of experts: three-dimensional parameters of modules called experts."""
    return [
        name
        for name, weight in model.named_parameters()
        if weight.ndim == 3 and "expert" in name.rpartition(".")[0].rpartition(".")[2].lower()
    ]


def _check(target: str, modules: dict[str, nn.Module], exclude: str | list[str] | None, *, pattern: bool) -> None:
    try:
        matches = [name for name in modules if name and name_matches(name, target if pattern else [target])]
    except re.error as error:
        raise RequestError(
            f"{target!r} is no valid regular expression: {error}.",
            code="bad-pattern",
            where="adapter.target",
            remedy="Give names instead, e.g. [q_proj, v_proj], or `all-linear`.",
        ) from error
    left = [name for name in matches if not name_matches(name, exclude)]
    if any(isinstance(modules[name], _ADAPTABLE) for name in left):
        unfit = [name for name in left if not isinstance(modules[name], _ADAPTABLE)]
        if unfit:
            raise RequestError(
                f"{target!r} also matches {unfit[0]}, a {type(modules[unfit[0]]).__name__}, which carries no adapter.",
                code="unfit-target",
                where="adapter.target",
                remedy="Make it match the linear layers only, or use adapter.exclude.",
            )
        return
    if matches and not left:
        raise RequestError(
            f"all that {target!r} matches is excluded.",
            code="no-target",
            where="adapter.exclude",
            remedy="Exclude less, or leave that target out.",
        )
    if matches:
        inner = sorted(
            {
                name[len(matches[0]) + 1 :]
                for name in modules
                if name.startswith(matches[0] + ".") and isinstance(modules[name], _LINEAR)
            }
        )
        remedy = f"Its linear layers are {', '.join(inner[:8])}." if inner else "Choose a linear layer."
        raise RequestError(
            f"{target!r} matches {matches[0]}, a {type(modules[matches[0]]).__name__}, which carries no adapter.",
            code="unfit-target",
            where="adapter.target",
            remedy=remedy,
        )
    raise RequestError(
        f"{target!r} matches no layer of this model.",
        code="no-target",
        where="adapter.target",
        remedy=_closest(target, [name for name, module in modules.items() if isinstance(module, _ADAPTABLE)]),
    )


def name_matches(name: str, wanted: str | list[str] | None) -> bool:
    """peft's rule: a string is a regular expression over the whole name, a list holds names or endings of names."""
    if not wanted:
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def is_router(name: str) -> bool:
    """Whether a layer chooses among experts."""
    return "router" in name.lower() or name.rpartition(".")[2] in _ROUTERS


def is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a layer gives the model's outputs."""
    if name.rpartition(".")[2] in _HEADS and name.count(".") <= 1:
        return True
    head = model.get_output_embeddings()
    return head is not None and model.get_submodule(name) is head


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def shortest(chosen: set[str], others: set[str]) -> list[str]:
    """The chosen names by their last part where that part names nothing else, so that the adapter's config stays short."""
    taken = {name.rpartition(".")[2] for name in others}
    return sorted({tail if (tail := name.rpartition(".")[2]) not in taken else name for name in chosen})


def _closest(name: str, modules: list[str]) -> str:
    tails = sorted({module.rpartition(".")[2] for module in modules if module})
    near = difflib.get_close_matches(name.rpartition(".")[2], tails, n=3, cutoff=0.5)
    listed = ", ".join(near or [tail for tail in tails if not tail.isdigit()][:12])
    return f"{'Closest' if near else 'There are'}: {listed}."
