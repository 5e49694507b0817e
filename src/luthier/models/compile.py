"""Compiling a model layer by layer, with every name as it was."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.errors import RequestError


def by_layer(model: nn.Module) -> int:
    """Compiles each decoder layer in place with `module.compile()` and returns how many there were.

    All layers share one compilation, and names stay: `torch.compile(module)` would put `_orig_mod.` into them.

    Raises:
        RequestError: the model has no layers of the kind that transformers marks as repeating.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise RequestError(
            "this model has no repeating layers to compile.",
            code="no-layers",
            where="train.compile",
            remedy="Leave train.compile out.",
        )
    for layer in layers:
        layer.compile()
    return len(layers)


def undo(model: nn.Module) -> None:
    """Let every module run its plain forward again."""
    for module in model.modules():
        module._compiled_call_impl = None
