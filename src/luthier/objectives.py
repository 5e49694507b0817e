"""A micro-batch to a loss: sums with their unit, so that a step divides once, by all of its trained tokens.

Logits are the largest tensor of a small model's step (a row of 2048 tokens over 128,000 words is 1 GiB in fp32), and
only those positions count whose next token is trained. So the head runs on these positions alone, and the fp32
log-softmax over at most `SOFTMAX_BYTES` of logits at a time.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.data.batches import IGNORED, MicroBatch

SOFTMAX_BYTES = 256 * 2**20
"""Largest piece of fp32 logits that is turned into probabilities at once."""

MOST_POSITIONS = 0.9
"""Share of a row's positions from which on all are computed: picking positions costs a scattered sum backwards."""


@dataclass(frozen=True)
class Loss:
    """What one micro-batch contributes to a step."""

    sum: Tensor
    """Negative log-likelihood in nats, summed over the trained tokens; fp32 scalar on the graph, zero if there are none."""
    count: int
    """Trained tokens that were summed over."""
    extra: Tensor | None = None
    """A term that is not a sum, already weighted (the balance loss of a mixture of experts); averaged over micro-batches."""


def causal_loss(model: nn.Module, micro_batch: MicroBatch) -> Loss:
    """Negative log-likelihood of a micro-batch's trained tokens, each predicted from those before it.

    Args:
        model: a transformers causal language model, or a peft model around one; its device is used.
        micro_batch: `input_ids`, `labels`, `position_ids` of shape (rows, tokens); labels are not shifted.

    Returns:
        the loss as a sum; gradients flow through it even if no token is trained, so that every device of a step can
        run the same backward pass.
    """
    labels = micro_batch.labels
    length = labels.shape[1]
    following = torch.full_like(labels, IGNORED)  # following[:, t] is what position t has to predict
    following[:, :-1] = labels[:, 1:]
    is_target = following != IGNORED
    count = int(is_target.sum())
    kept = is_target.any(dim=0).nonzero().squeeze(1)
    if kept.numel() == 0:
        kept = kept.new_zeros(1)

    device = next(model.parameters()).device
    few = kept.numel() < MOST_POSITIONS * length
    select = {"logits_to_keep": kept.to(device)} if few and _can_select(model) else {}
    mask = micro_batch.attention_mask
    outputs = model(
        input_ids=micro_batch.input_ids.to(device),
        attention_mask=None if mask is None else mask.to(device),
        position_ids=micro_batch.position_ids.to(device),
        use_cache=False,
        **select,
    )
    logits_BKV = outputs.logits
    if not select:
        # Prompt tuning puts virtual tokens in front: the row's own positions are the last ones.
        logits_BKV = logits_BKV[:, -length:]
        if few:
            logits_BKV = logits_BKV[:, kept.to(device)]
    targets_N = (following[:, kept] if few else following).flatten()
    left_out = (targets_N == IGNORED).nonzero().squeeze(1)  # found where labels lie, so that no device is waited for
    total = _SummedNLL.apply(logits_BKV.flatten(0, 1), targets_N.to(logits_BKV.device), left_out.to(logits_BKV.device))
    return Loss(total, count, balance_loss(model, outputs))


def balance_loss(model: nn.Module, outputs: object) -> Tensor | None:
    """The weighted balance loss of a mixture of experts (arXiv:2101.03961), where the model's config asks for it.

    It is a product of two means over all tokens of the micro-batch, so it is no sum over tokens. `None` for dense
    models, and unless `output_router_logits` is set in the config, which is transformers' own switch for it.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(config, "output_router_logits", False):
        return None
    value = getattr(outputs, "aux_loss", None)
    return config.router_aux_loss_coef * value if isinstance(value, Tensor) else None


def _can_select(model: nn.Module) -> bool:
    """Whether the model's forward computes logits at given positions only."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


class _SummedNLL(torch.autograd.Function):
    """Sum of negative log-likelihoods in fp32, whose gradient is made while the probabilities are at hand.

    Keeping fp32 probabilities for the backward pass would take twice the logits' memory, and computing them again
    takes time; the gradient in the logits' own dtype takes as much as the logits, which autograd makes anyway.
    Working memory is one piece of rows. Casts are part of a kernel that reads or writes the numbers anyway: over a large
    vocabulary each pass of its own is a percent of the step.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, left_out: Tensor) -> Tensor:
        rows = _rows(logits_NV)
        total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        gradient_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits_NV), rows):
            piece = slice(start, start + rows)
            targets_n1 = targets_N[piece].clamp(min=0).unsqueeze(1)
            log_nV = torch.log_softmax(logits_NV[piece], dim=-1, dtype=torch.float32)
            log_n1 = log_nV.gather(1, targets_n1)
            total -= log_n1.masked_fill(targets_N[piece].unsqueeze(1) == IGNORED, 0).sum()
            if gradient_NV is not None:
                gradient_nV = gradient_NV[piece]
                torch.exp(log_nV, out=gradient_nV)
                # p - 1 in fp32: of a probability near 1, 16 bits would leave nothing
                gradient_nV.scatter_(1, targets_n1, log_n1.expm1().to(gradient_nV.dtype))
        if gradient_NV is not None:
            gradient_NV.index_fill_(0, left_out, 0)
        ctx.save_for_backward(gradient_NV)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        # The scale is one over the step's tokens: a scalar tensor would be rounded to 16 bits, and all gradients with it;
        # with a dimension it keeps its fp32, and the product is rounded once, on its way into memory.
        torch.mul(gradient_NV, scale.reshape(1), out=gradient_NV)
        return gradient_NV, None, None


def _rows(logits_NV: Tensor) -> int:
    """Rows whose fp32 logits are held at once."""
    return max(1, SOFTMAX_BYTES // (4 * logits_NV.shape[1]))
