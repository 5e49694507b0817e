"""Which trainable parameter gets which rate and which decay, told by what it is: name, shape, and the module it sits in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import nn

from luthier.config.schema import OptimConfig

LR_WITH_ADAPTER = 2e-4
LR_FULL = 1e-5

_LORA_B = {"lora_B", "lora_embedding_B"}
_LORA_A = {"lora_A", "lora_embedding_A"}


class Role(Enum):
    """What a parameter is to the optimiser."""

    MATRIX = "hidden matrices"
    LORA_B = "LoRA B"
    EMBEDDING = "embeddings and head"
    VECTOR = "norms and biases"
    STACK = "stacked matrices"


@dataclass(frozen=True)
class Member:
    """A trainable parameter by its name in ``model.named_parameters()``, and its role."""

    name: str
    parameter: nn.Parameter
    role: Role


def peak_rate(optim: OptimConfig, *, adapter: bool) -> float:
    """The peak learning rate: ``optim.lr``, or the default for what trains."""
    if optim.lr is not None:
        return optim.lr
    return LR_WITH_ADAPTER if adapter else LR_FULL


def members(model: nn.Module) -> list[Member]:
    """Every trainable parameter once, ordered by name; one that is tied has its first name."""
    embeddings = _embeddings(model)
    found = [
        Member(name, parameter, _role(name, parameter, embeddings))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    return sorted(found, key=lambda member: member.name)


def rate_of(role: Role, peak: float, optim: OptimConfig) -> float:
    """Peak rate of a role: ``lr_b`` and ``lr_embeddings`` where they are set."""
    if role is Role.LORA_B and optim.lr_b is not None:
        return optim.lr_b
    if role is Role.EMBEDDING and optim.lr_embeddings is not None:
        return optim.lr_embeddings
    return peak


def decay_of(role: Role, optim: OptimConfig) -> float:
    """Weight decay of a role: none on norms and biases."""
    return 0.0 if role is Role.VECTOR else optim.weight_decay


def _role(name: str, parameter: nn.Parameter, embeddings: set[int]) -> Role:
    parts = name.split(".")
    if _LORA_B & set(parts):
        return Role.LORA_B
    if parameter.ndim <= 1 or parts[-1].endswith("bias"):
        return Role.VECTOR
    if id(parameter) in embeddings and not _LORA_A & set(parts):
        return Role.EMBEDDING
    return Role.MATRIX if parameter.ndim == 2 else Role.STACK


def _embeddings(model: nn.Module) -> set[int]:
    """Parameters of every embedding and of the head, their trained copies and added rows included."""
    modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        if hasattr(model, getter):
            module = getattr(model, getter)()
            if isinstance(module, nn.Module):
                modules.append(module)
    return {id(parameter) for module in modules for parameter in module.parameters()}
