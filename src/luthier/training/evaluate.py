"""Loss and perplexity on held-out data: the same number for the same weights and data, whatever the run is doing."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from luthier.config.schema import TrainConfig
from luthier.data.batches import IGNORED, MicroBatch, Samples
from luthier.errors import RequestError
from luthier.objectives import causal_loss


@dataclass(frozen=True)
class EvalResult:
    """What a model makes of held-out data."""

    loss: float
    """Mean negative log-likelihood of a target, in nats."""
    perplexity: float
    """exp(loss)."""
    tokens: int
    """Targets that were averaged over."""
    seconds: float


def evaluate_loss(
    model: nn.Module, tokens: Samples, train_config: TrainConfig, *, pad_id: int, device: torch.device
) -> EvalResult:
    """Mean loss over every target of the held-out samples, in evaluation mode and without gradients.

    Samples stand one a row, sorted by length, as many at once as a training micro-batch holds tokens
    (`micro_batch × max_length`). No random number is drawn, and the mode of every module is restored.

    Raises:
        RequestError: no held-out token is a target.
    """
    start = time.perf_counter()
    total, count = 0.0, 0
    with evaluation_mode(model):
        for indices in _batches(tokens.lengths, _limit(train_config, tokens.lengths)):
            loss = causal_loss(model, _padded(tokens, indices, pad_id, device))
            total += loss.sum.item()
            count += loss.count
    if count == 0:
        raise RequestError(
            "no token of the held-out data is trained on, so there is no loss to measure.",
            code="nothing-to-evaluate",
            where="data.eval",
            remedy="`luthier data` shows which tokens count; see data.train_on.",
        )
    mean = total / count
    perplexity = math.exp(mean) if mean < 700 else math.inf  # exp overflows from 710 on
    return EvalResult(mean, perplexity, count, time.perf_counter() - start)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; afterwards each module is in the mode it was in before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _limit(train_config: TrainConfig, lengths: np.ndarray) -> int:
    """Most places, padding included, of one batch."""
    longest = int(lengths.max(initial=1))
    return train_config.micro_batch * max(train_config.max_length or longest, longest)


def _batches(lengths: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Indices of samples, short ones first, such that rows × longest row stays within the limit."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end - start + 1) * int(lengths[order[end]]) > limit:
            yield order[start:end]
            start = end


def _padded(tokens: Samples, indices: np.ndarray, pad_id: int, device: torch.device) -> MicroBatch:
    samples = [tokens[int(index)] for index in indices]
    shape = (len(samples), max(len(ids) for ids, _ in samples))
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    mask = np.zeros(shape, np.int64)
    for row, (ids, is_target) in enumerate(samples):
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = np.where(is_target, ids, IGNORED)
        mask[row, : len(ids)] = 1
    labels[:, 0] = IGNORED  # nothing stands before it
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        labels=torch.from_numpy(labels),
        position_ids=torch.arange(shape[1], device=device).expand(shape),
        attention_mask=None if mask.all() else torch.from_numpy(mask).to(device),
        tokens=int(mask.sum()),
        trained_tokens=int((labels != IGNORED).sum()),
    )
