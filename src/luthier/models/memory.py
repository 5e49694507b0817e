"""Recomputing activations in the backward pass instead of keeping them."""

from __future__ import annotations

from transformers import PreTrainedModel


def recompute(model: PreTrainedModel) -> None:
    """Recomputes each decoder layer in the backward pass (gradient checkpointing).

    The non-reentrant form needs no input that requires a gradient, so it works with a frozen base under an adapter.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
