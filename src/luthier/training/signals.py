"""Stopping on request: finish the step, publish, leave. A second interrupt leaves at once, and so does one after the last step."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked the run to stop, and how."""

    def __init__(self) -> None:
        self.reason = ""
        self._leaving: Callable[[str], Exception] | None = None

    def leave_at_once(self, error: Callable[[str], Exception]) -> None:
        """From here on a request raises ``error(reason)`` where the program stands; one made before raises it now."""
        self._leaving = error
        if self.reason:
            raise error(self.reason)

    def take(self, reason: str) -> None:
        """Note a request, or leave."""
        self.reason = reason
        if self._leaving is not None:
            raise self._leaving(reason)

    def __bool__(self) -> bool:
        return bool(self.reason)


@contextmanager
def stoppable(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request while the block runs; the handlers found are put back afterwards.

    Outside the main thread signals cannot be handled, and the request stays empty.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.take(name)
        text = f"{name}: finishing this step and publishing a checkpoint; interrupt again to leave at once"
        # This thread may have been interrupted while printing, or while starting a thread, and hold the locks that
        # `say` or `threading.Thread` need; it would wait for itself for ever.
        _thread.start_new_thread(say, (text,))

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
