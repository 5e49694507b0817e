"""Steps: which samples an optimiser step sees, and as which tensors.

A step is a function of (tokens, config, number). Nothing depends on which steps were asked for before; what is kept
between calls is a table of the current epoch's boundaries, which only saves time.

Packed rows need no attention mask: position ids restart at 0 with each sample, and transformers derives the
block-diagonal causal mask from them (``masking_utils.find_packed_sequence_indices``) as long as ``attention_mask`` is
None. Padding behind the shorter rows of a micro-batch restarts too, as a sample that nobody looks at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import TrainConfig
from luthier.data.order import Order, Purpose, Share, derive_key, permute
from luthier.data.packing import best_fit_decreasing

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a token that is no target, as torch's cross entropy has it."""
DEFAULT_BATCH_SAMPLES = 16
SORTED_BATCHES = 64
"""Batches whose samples are sorted by length together, where rows are not packed."""
CHUNK = 1 << 20
"""Samples looked at together when an epoch is cut into windows of tokens."""


class Samples(Protocol):
    """What batches need of ``Tokens``."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]: ...
    @property
    def lengths(self) -> NDArray[np.int32]: ...
    @property
    def trained(self) -> NDArray[np.int32]: ...
    @property
    def shares(self) -> tuple[Share, ...]: ...
    def place(self, index: int) -> str: ...


@dataclass(frozen=True)
class MicroBatch:
    """Rows computed at once; int64 tensors on the CPU of shape (rows, longest row).

    ``labels`` equal ``input_ids`` at targets and are -100 elsewhere; they are not shifted. ``attention_mask`` is None
    where rows are packed or none is padded.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    tokens: int
    """Tokens without padding."""
    trained_tokens: int
    """Targets."""


@dataclass(frozen=True)
class StepBatch:
    """Everything one optimiser step sees."""

    micro_batches: list[MicroBatch]
    trained_tokens: int
    """Targets in the step: the denominator of its loss."""
    tokens: int
    """Tokens without padding."""
    samples: int
    epoch: float
    """Epochs completed when the step is done."""
    indices: list[int]
    """The samples, in the order of the epoch."""


class Batches:
    """The steps of a run over some samples, each computed from its number alone."""

    def __init__(self, tokens: Samples, train: TrainConfig, *, pad_id: int) -> None:
        if len(tokens) == 0:
            raise ValueError("there are no samples to make batches of")
        self._tokens = tokens
        self._train = train
        self._pad_id = pad_id
        self._order = Order(tokens.shares, train.seed)
        self._row_length = max(train.max_length or 0, int(tokens.lengths.max()))
        self._epoch_edges: tuple[int, NDArray[np.int64]] | None = None
        if train.batch_tokens is None:
            self._samples_per_step = train.batch_samples or DEFAULT_BATCH_SAMPLES
            self.steps_per_epoch = -(-len(self._order) // self._samples_per_step)
        else:
            expected = self._expected_tokens()
            self.steps_per_epoch = max(1, min(len(self._order), -(-expected // train.batch_tokens)))

    def step(self, number: int) -> StepBatch:
        """Return the 0-based step ``number`` of the run; its epoch is ``number // steps_per_epoch``."""
        indices = self.step_samples(number)
        rows = self._rows(indices)
        size = self._train.micro_batch
        micro_batches = [self._micro_batch(rows[at : at + size]) for at in range(0, len(rows), size)]
        return StepBatch(
            micro_batches=micro_batches,
            trained_tokens=sum(batch.trained_tokens for batch in micro_batches),
            tokens=sum(batch.tokens for batch in micro_batches),
            samples=len(indices),
            epoch=(number + 1) / self.steps_per_epoch,
            indices=[int(index) for index in indices],
        )

    def place(self, index: int) -> str:
        """Return the ``file:line`` that a sample came from."""
        return self._tokens.place(index)

    def step_samples(self, number: int) -> NDArray[np.int64]:
        """Return the samples of a step without making tensors of them."""
        if number < 0:
            raise IndexError(f"step {number}")
        epoch, place = divmod(number, self.steps_per_epoch)
        if self._train.batch_tokens is not None:
            edges = self._edges(epoch)
            return self._order.samples(epoch, np.arange(edges[place], edges[place + 1]))
        if self._train.packing:
            start = place * self._samples_per_step
            return self._order.samples(epoch, np.arange(start, min(start + self._samples_per_step, len(self._order))))
        return self._grouped_by_length(epoch, place)

    def places(self, number: int) -> tuple[int, int]:
        """Return (tokens, places for tokens in its rows, padding included) of a step without making tensors of it."""
        lengths = self._tokens.lengths
        rows = [int(lengths[row].sum()) for row in self._rows(self.step_samples(number))]
        size = self._train.micro_batch
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        return sum(rows), sum(len(batch) * max(batch) for batch in batches)

    def _expected_tokens(self) -> int:
        """Tokens of an epoch: exact, or the mean over epochs where a source is not seen exactly once."""
        lengths = self._tokens.lengths
        if not self._order.cycles:
            return int(lengths.sum(dtype=np.int64))
        shares = [share for share in self._tokens.shares if share.size]
        means = [float(lengths[share.start : share.start + share.size].mean()) for share in shares]
        return round(sum(count * mean for count, mean in zip(self._order.counts, means, strict=True)))

    def _edges(self, epoch: int) -> NDArray[np.int64]:
        """Cut an epoch into windows of equal tokens: step k is the positions from edge k up to edge k + 1.

        A sample belongs to the window its first token falls into. Where a sample is longer than a window, the steps
        that would be empty take the next sample each.
        """
        if self._epoch_edges is not None and self._epoch_edges[0] == epoch:
            return self._epoch_edges[1]
        steps, size = self.steps_per_epoch, len(self._order)
        chunks = [(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
        sums = [int(self._lengths_at(epoch, *chunk).sum(dtype=np.int64)) for chunk in chunks]
        total = sum(sums)
        targets = np.array([total * step // steps + (total * step % steps > 0) for step in range(steps)], np.int64)
        edges = np.full(steps + 1, size, np.int64)
        begin = 0
        for (start, stop), tokens in zip(chunks, sums, strict=True):
            first, last = np.searchsorted(targets, [begin, begin + tokens])
            if last > first:
                lengths = self._lengths_at(epoch, start, stop)
                starts = begin + np.cumsum(lengths, dtype=np.int64) - lengths
                edges[first:last] = start + np.searchsorted(starts, targets[first:last])
            begin += tokens
        places = np.arange(steps + 1)
        edges = np.maximum.accumulate(edges - places) + places
        edges = np.minimum(edges, size - (steps - places))
        self._epoch_edges = (epoch, edges)
        return edges

    def _lengths_at(self, epoch: int, start: int, stop: int) -> NDArray[np.int32]:
        return self._tokens.lengths[self._order.samples(epoch, np.arange(start, stop))]

    def _grouped_by_length(self, epoch: int, place: int) -> NDArray[np.int64]:
        size = self._samples_per_step
        block, within = divmod(place, SORTED_BATCHES)
        start = block * SORTED_BATCHES * size
        stop = min(start + SORTED_BATCHES * size, len(self._order))
        samples = self._order.samples(epoch, np.arange(start, stop))
        samples = samples[np.lexsort((samples, self._tokens.lengths[samples]))]
        whole = len(samples) // size
        if within < whole:  # a last, smaller batch stays last
            key = derive_key(self._train.seed, Purpose.BATCHES, epoch, block)
            within = int(permute(np.array([within]), whole, key)[0])
        return samples[within * size : (within + 1) * size]

    def _rows(self, indices: NDArray[np.int64]) -> list[list[int]]:
        """Arrange a step's samples into rows, each a list of samples."""
        lengths = self._tokens.lengths[indices]
        if self._train.packing:
            packed = best_fit_decreasing(lengths.tolist(), self._row_length)
            return [[int(indices[item]) for item in row] for row in packed]
        by_length = np.lexsort((np.arange(len(indices)), -lengths))
        return [[int(indices[item])] for item in by_length]

    def _micro_batch(self, rows: list[list[int]]) -> MicroBatch:
        import torch

        samples = [[self._tokens[index] for index in row] for row in rows]
        lengths = [sum(len(ids) for ids, _ in row) for row in samples]
        shape = (len(rows), max(lengths))
        input_ids = np.full(shape, self._pad_id, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        positions = np.zeros(shape, np.int64)
        trained = 0
        for number, row in enumerate(samples):
            at = 0
            for ids, mask in row:
                end = at + len(ids)
                targets = mask.copy()
                targets[0] = False  # nothing before it within its own sample predicts it
                input_ids[number, at:end] = ids
                labels[number, at:end] = np.where(targets, ids, IGNORED)
                positions[number, at:end] = np.arange(len(ids))
                trained += int(targets.sum())
                at = end
            positions[number, at:] = np.arange(shape[1] - at)
        padded = min(lengths) < shape[1]
        attention_mask = None
        if padded and not self._train.packing:
            columns = np.arange(shape[1])
            inside = columns < np.array(lengths)[:, None]
            attention_mask = torch.from_numpy(inside.astype(np.int64))
            positions = np.broadcast_to(columns, shape).copy()
        return MicroBatch(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(positions),
            attention_mask=attention_mask,
            tokens=sum(lengths),
            trained_tokens=trained,
        )
