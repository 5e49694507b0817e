"""Several processes that tokenise, for data large enough to be worth their start.

They are started as ``python -m luthier.data.worker``, not by multiprocessing: its ``fork`` would copy a process with
running threads, and its other ways import the caller's own script again. Until they are ready the calling process
tokenises itself, so that a start costs nothing but its share of the cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from luthier.data.encode import Encoder
from luthier.data.formats import Conversation, Text
from luthier.data.frames import READY, Failed, receive, send
from luthier.data.offenders import SampleError
from luthier.data.template import Encoded, TrainOn
from luthier.errors import LuthierError

ALONE = 4096
"""Samples that the calling process tokenises before it starts workers: a start takes as long as a few thousand do."""
FEWEST_CORES = 4
"""With two, the tokenizer's own threads and the process that reads already fill them (docs/log.md, 2026-11-22)."""
MOST_WORKERS = 16
"""Beyond that, the process that reads the data is what they would wait for."""
AHEAD = 2
"""Groups in flight for each worker, so that none waits for the next."""

Results = Sequence[Encoded | SampleError]


class Group(Protocol):
    """Samples tokenised in one call."""

    @property
    def contents(self) -> Sequence[Conversation | Text]: ...


G = TypeVar("G", bound=Group)


def worker_count() -> int:
    """Workers that are worth starting on the cores that this process may run on; 1 means none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if cores >= FEWEST_CORES else 1


def encode_in_order(
    groups: Iterable[G], encoder: Encoder, tokenizer: Any, train_on: TrainOn, *, workers: int
) -> Generator[tuple[G, Results], None, None]:
    """Yield every group with its results, in the order of the groups; workers help from ``ALONE`` samples on.

    What is raised by ``groups`` is raised once all groups before it have been yielded, as if nothing had been read
    ahead. Closing the iterator ends the workers.

    Raises:
        LuthierError: a worker has ended.
    """
    pool: _Pool | None = None
    pending: deque[tuple[G, Future[Results]]] = deque()
    seen = 0
    try:
        reading = iter(groups)
        while True:
            try:
                group = next(reading, None)
            except Exception:
                yield from _finished(pending)
                raise
            if group is None:
                break
            if pool is None and workers > 1 and seen >= ALONE:
                pool = _Pool(workers, tokenizer, train_on)
            seen += len(group.contents)
            if pool is None or not pool.ready():
                yield group, encoder.encode(group.contents)
                continue
            pending.append((group, pool.submit(group.contents)))
            if len(pending) > AHEAD * workers:
                yield from _finished(pending, leave=AHEAD * workers)
        yield from _finished(pending)
    finally:
        if pool is not None:
            pool.end()


def _finished(pending: deque[tuple[G, Future[Results]]], leave: int = 0) -> Iterator[tuple[G, Results]]:
    while len(pending) > leave:
        group, future = pending.popleft()
        yield group, future.result()


class _Pool:
    """Worker processes, each spoken to by one thread at a time."""

    def __init__(self, size: int, tokenizer: Any, train_on: TrainOn) -> None:
        self._workers = [_Worker() for _ in range(size)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(size)
        self._starting = [self._threads.submit(self._start, worker, tokenizer, train_on) for worker in self._workers]

    def _start(self, worker: _Worker, tokenizer: Any, train_on: TrainOn) -> None:
        worker.start(tokenizer, train_on)
        self._idle.put(worker)

    def ready(self) -> bool:
        """Whether every worker waits for samples; raises what went wrong with its start."""
        if not all(future.done() for future in self._starting):
            return False
        for future in self._starting:
            future.result()
        return True

    def submit(self, contents: Sequence[Conversation | Text]) -> Future[Results]:
        return self._threads.submit(self._encode, contents)

    def _encode(self, contents: Sequence[Conversation | Text]) -> Results:
        worker = self._idle.get()
        try:
            return worker.encode(contents)
        finally:
            self._idle.put(worker)

    def end(self) -> None:
        """End the processes at once, whatever they are at."""
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process and its two pipes."""

    def __init__(self) -> None:
        search = os.pathsep.join(sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "luthier.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # One process a core is enough: the tokenizer's own threads would only get into each other's way.
            env={**os.environ, "PYTHONPATH": search, "TOKENIZERS_PARALLELISM": "false"},
        )

    def start(self, tokenizer: Any, train_on: TrainOn) -> None:
        """Hand over what the encoder is made from, and wait until it is made."""
        answer = self._ask((tokenizer, train_on))
        assert answer == READY

    def encode(self, contents: Sequence[Conversation | Text]) -> Results:
        answer = self._ask(contents)
        if isinstance(answer, Failed):
            raise answer.error
        return answer

    def _ask(self, value: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            send(self._process.stdin, value)
            return receive(self._process.stdout)
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise LuthierError(
                f"A process that tokenised a part of the data has ended ({how}).",
                code="tokenising-ended",
                where="data.train",
                remedy="Signal 9 mostly means that memory ran out: free some, or let the run use fewer cores "
                "(`taskset -c 0` leaves one). Then start again; what was tokenised before is kept.",
            ) from None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Take leave of a killed process: no zombie and no open pipe stays."""
        self._process.communicate()
