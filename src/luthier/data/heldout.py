"""Holding out samples for evaluation, so that no content is on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luthier.data.order import Purpose, derive_key, scramble
from luthier.data.tokens import Part
from luthier.errors import RequestError


def hold_out(parts: Sequence[Part], share: float, seed: int) -> tuple[list[Part], list[Part]]:
    """Split samples into (train, eval) by a hash of seed and content; duplicates go to the same side.

    Every source gives its share; at least one sample is held out and one is left. Raises RequestError if there are
    not two different samples.
    """
    train, held_out = [], []
    for part in parts:
        kept, taken = _split(part, share, seed)
        train.append(kept)
        held_out.append(taken)
    if not sum(map(len, held_out)):
        largest = max(range(len(parts)), key=lambda number: len(parts[number]))
        train[largest], held_out[largest] = _split(parts[largest], share, seed, least=1)
    if not sum(map(len, train)) or not sum(map(len, held_out)):
        raise RequestError(
            f"There are too few different samples to hold out a share of {share:g}.",
            code="too-few-samples",
            where="data.eval",
            remedy="Give evaluation data of their own (`data.eval: path`), or leave `data.eval` out.",
        )
    return train, held_out


def _split(part: Part, share: float, seed: int, least: int = 0) -> tuple[Part, Part]:
    digests = part.pick(part.shard.digests)
    contents, content_of, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    by_hash = np.argsort(scramble(contents, derive_key(seed, Purpose.HELD_OUT)), kind="stable")
    wanted = max(least, round(share * len(digests)))
    # Contents are taken in the order of their hashes until the next would go beyond the share.
    taken = int(np.searchsorted(np.cumsum(sizes[by_hash]), wanted, side="right"))
    taken = min(max(taken, min(wanted, 1)), max(len(contents) - 1, 0))
    is_held_out = np.zeros(len(contents), np.bool_)
    is_held_out[by_hash[:taken]] = True
    held_out = is_held_out[content_of]
    numbers = np.arange(len(part.shard)) if part.selection is None else part.selection
    return Part(part.shard, numbers[~held_out], part.weight), Part(part.shard, numbers[held_out], part.weight)
