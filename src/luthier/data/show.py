"""What `luthier data RUN.yaml` prints: counts, lengths, padding, and samples as the model will see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier.config.schema import RunConfig
from luthier.data.batches import Batches
from luthier.data.prepare import Prepared, describe, repeats
from luthier.data.tokens import Tokens

if TYPE_CHECKING:
    from rich.console import Console

SAMPLES = 3
BINS = 10
WIDTH = 40
STEPS_LOOKED_AT = 50
LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, each of which may be a token."""
TRAINED, UNTRAINED = "bold green", "bright_black"
MARKS = ("⟦", "⟧")
"""Put around trained text where there are no colours."""
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
"""Control characters as Unicode's pictures of them: what data hold must not command the terminal."""


def show(prepared: Prepared, config: RunConfig, tokenizer: Any, console: Console, *, samples: int = SAMPLES) -> None:
    """Print a run's data to a rich console."""
    facts = prepared.facts
    for part in prepared.train.parts:
        for line in describe(part.shard, facts["max_length"]):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in _overview(facts):
        console.print(line, markup=False, highlight=False)
    console.print("\nLengths in tokens", style="bold")
    for line in histogram(prepared.train.lengths):
        console.print(line, markup=False, highlight=False)
    console.print("\nBatches", style="bold")
    for line in _batches(prepared.train, config):
        console.print(line, markup=False, highlight=False)
    step = max(1, len(prepared.train) // max(samples, 1))
    for index in range(0, len(prepared.train), step)[:samples]:
        _show_sample(prepared.train, index, tokenizer, console)


def _overview(facts: dict[str, Any]) -> list[str]:
    share = 100 * facts["trained_tokens"] / facts["tokens"]
    lines = [f"{facts['samples']:,} samples to train on, {facts['tokens']:,} tokens, {share:.1f} % of them trained"]
    if facts["eval_samples"]:
        lines.append(f"{facts['eval_samples']:,} samples held out for evaluation")
    return lines + repeats(facts)


def histogram(lengths: NDArray[np.int32]) -> list[str]:
    """Draw how many samples have which length; one line a range of lengths."""
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // BINS)
    counts = np.bincount((lengths - low) // width)
    most = counts.max()
    lines = []
    for number, count in enumerate(counts):
        start = low + number * width
        bar = "█" * round(WIDTH * count / most)
        lines.append(f"{start:>8,} to {start + width - 1:>8,} {count:>9,} {bar}".rstrip())
    return lines


def _batches(tokens: Tokens, config: RunConfig) -> list[str]:
    batches = Batches(tokens, config.train, pad_id=0)
    steps = np.unique(np.linspace(0, batches.steps_per_epoch - 1, STEPS_LOOKED_AT).astype(int))
    sizes = [batches.places(int(step)) for step in steps]
    held, places = (sum(column) for column in zip(*sizes, strict=True))
    packed = "packed into rows" if config.train.packing else "one sample a row, grouped by length"
    return [
        f"{batches.steps_per_epoch:,} steps an epoch of about {held // len(sizes):,} tokens, {packed}",
        f"{100 * (1 - held / places):.1f} % of the places hold padding (over {len(sizes)} steps)",
    ]


def _show_sample(tokens: Tokens, index: int, tokenizer: Any, console: Console) -> None:
    from rich.text import Text

    ids, mask = tokens[index]
    title = f"\nSample {index}, {tokens.place(index)}: {len(ids):,} tokens, {int(mask.sum()):,} trained"
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    text = Text()
    for piece, trained in segments(ids.tolist(), mask.tolist(), tokenizer):
        piece = piece.translate(_VISIBLE)
        if coloured:
            text.append(piece, style=TRAINED if trained else UNTRAINED)
        else:
            text.append(f"{MARKS[0]}{piece}{MARKS[1]}" if trained else piece)
    console.print(text, highlight=False, soft_wrap=True)


def segments(ids: Sequence[int], mask: Sequence[bool], tokenizer: Any) -> list[tuple[str, bool]]:
    """Cut a sample into stretches of text that are trained or not.

    A character whose bytes lie in several tokens stays whole: the border moves behind it.
    """
    pieces: list[tuple[str, bool]] = []
    shown = start = 0
    while start < len(ids):
        end = start + 1
        while end < len(ids) and mask[end] == mask[start]:
            end += 1
        text = _decode(tokenizer, ids[:end])
        for longer in range(end + 1, min(end + LONGEST_CHARACTER, len(ids) + 1)):
            if not text.endswith("\ufffd"):
                break
            end, text = longer, _decode(tokenizer, ids[:longer])
        pieces.append((text[shown:], bool(mask[start])))
        shown, start = len(text), end
    return pieces


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
