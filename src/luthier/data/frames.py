"""Messages between a process and the workers it started: a length, then a pickled value.

Both ends are this program, and nothing that lies on a disk passes through, so nothing foreign is unpickled.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import IO, Any

SIZE = 8
"""Bytes of a frame's length, little-endian, in front of it."""
READY = "ready"
"""The first answer, once the encoder is made."""


@dataclass(frozen=True)
class Failed:
    """The answer in place of a result: what was raised in the worker."""

    error: Exception


def send(stream: IO[bytes], value: Any) -> None:
    """Write one frame."""
    frame = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(len(frame).to_bytes(SIZE, "little"))
    stream.write(frame)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one frame; raises EOFError where the stream ends before the frame does."""
    return pickle.loads(_exactly(stream, int.from_bytes(_exactly(stream, SIZE), "little")))


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
