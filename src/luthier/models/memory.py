"""Recomputing activations in the backward pass instead of keeping them."""

from __future__ import annotations

from transformers import PreTrainedModel

from luthier.models.quiet import no_deprecations


def recompute(model: PreTrainedModel) -> None:
    """Recomputes each decoder layer in the backward pass (gradient checkpointing), in training mode only.

    The non-reentrant form needs no input that requires a gradient, so it works with a frozen base under an adapter.
    """
    with no_deprecations():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def keep(model: PreTrainedModel) -> None:
    """Keeps activations again: undoes `recompute`."""
    with no_deprecations():
        model.gradient_checkpointing_disable()
