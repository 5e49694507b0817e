"""Tokenised samples as they lie in the cache: memory-mapped arrays, and views on them.

A ``Shard`` is one tokenised source on disk. ``Tokens`` is a selection from one or several shards, numbered from 0,
with the shares that a mixture needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.order import Share

ARRAYS = {
    "ids": np.int32,
    "mask": np.bool_,
    "ends": np.int64,
    "trained": np.int32,
    "digests": np.uint64,
    "files": np.int32,
    "lines": np.int64,
    "records": np.uint8,
    "record_ends": np.int64,
}
"""The arrays of a shard. ``ids`` and ``mask`` hold all samples end to end, ``ends`` where each ends; ``trained``,
``digests`` (of the content), ``files`` and ``lines`` have one entry a sample; ``records`` is JSON, end to end."""


class Shard:
    """One tokenised source in the cache; nothing is read until it is asked for."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.facts = facts
        self.fingerprint: str = facts["fingerprint"]

    def array(self, name: str) -> NDArray:
        """Return one of ARRAYS, memory-mapped; an empty file gives an empty array."""
        path = self.folder / f"{name}.bin"
        if path.stat().st_size == 0:
            return np.empty(0, ARRAYS[name])
        return np.memmap(path, dtype=ARRAYS[name], mode="r")

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        return self.array("ids")

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        return self.array("mask")

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        return self.array("ends")

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        return self.array("digests")

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        return np.diff(self.ends, prepend=0).astype(np.int32)

    def __len__(self) -> int:
        return len(self.ends)

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        start, end = (int(self.ends[index - 1]) if index else 0), int(self.ends[index])
        return np.array(self.ids[start:end]), np.array(self.mask[start:end])

    def record(self, index: int) -> dict[str, Any]:
        """Return the sample's conversation as JSON data: ``messages`` and ``tools``; empty for plain text."""
        ends = self.array("record_ends")
        start, end = (int(ends[index - 1]) if index else 0), int(ends[index])
        return json.loads(bytes(self.array("records")[start:end])) if end > start else {}

    def place(self, index: int) -> str:
        """Return the ``file:line`` that a sample came from."""
        return f"{self.facts['files'][int(self.array('files')[index])]}:{int(self.array('lines')[index])}"


@dataclass(frozen=True)
class Part:
    """Samples of one shard: all of them, or those selected; ``weight`` as in the run file."""

    shard: Shard
    selection: NDArray[np.int64] | None = None
    weight: float | None = None

    def __len__(self) -> int:
        return len(self.shard) if self.selection is None else len(self.selection)

    def at(self, index: int) -> int:
        return index if self.selection is None else int(self.selection[index])

    def pick(self, values: NDArray) -> NDArray:
        return values if self.selection is None else values[self.selection]


class Tokens:
    """Tokenised samples, numbered from 0; ``[i]`` gives (ids int32, mask bool), True where a token is a target.

    The first token of a sample is never a target.
    """

    def __init__(self, parts: Sequence[Part], fingerprint: str) -> None:
        self.parts = tuple(parts)
        self.fingerprint = fingerprint
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens in each sample."""
        return np.concatenate([part.pick(part.shard.lengths) for part in self.parts])

    @cached_property
    def trained(self) -> NDArray[np.int32]:
        """Targets in each sample."""
        return np.concatenate([part.pick(part.shard.array("trained")) for part in self.parts])

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """A 64-bit digest of each sample's content, before truncation or splitting."""
        return np.concatenate([part.pick(part.shard.digests) for part in self.parts])

    @property
    def shares(self) -> tuple[Share, ...]:
        """The sources as an order needs them."""
        return tuple(
            Share(int(start), len(part), part.weight) for start, part in zip(self._starts, self.parts, strict=False)
        )

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        part = self.parts[number]
        return part.shard, part.at(index - int(self._starts[number]))

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        shard, place = self._locate(int(index))
        return shard.sample(place)

    def place(self, index: int) -> str:
        """Return the ``file:line`` that a sample came from."""
        shard, place = self._locate(index)
        return shard.place(place)

    def prompts(self, index: int) -> list[dict[str, Any]]:
        """Return the conversation up to the last assistant turn; empty for plain text."""
        messages = self._messages(index)
        return messages[: _last_assistant(messages)]

    def reference(self, index: int) -> str:
        """Return the content of the last assistant turn; empty for plain text."""
        messages = self._messages(index)
        last = _last_assistant(messages)
        return str(messages[last].get("content") or "") if last < len(messages) else ""

    def tools(self, index: int) -> list[dict[str, Any]] | None:
        """Return the tools offered in the conversation, as the chat template takes them."""
        shard, place = self._locate(index)
        return shard.record(place).get("tools")

    def _messages(self, index: int) -> list[dict[str, Any]]:
        shard, place = self._locate(index)
        return shard.record(place).get("messages", [])


def _last_assistant(messages: list[dict[str, Any]]) -> int:
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].get("role") == "assistant":
            return index
    return len(messages)
