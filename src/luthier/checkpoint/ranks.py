"""The processes that save together. One process alone is the ordinary case and needs no process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from luthier.errors import LuthierError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``size``; ``group`` is a torch process group whose collectives run on the CPU."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """The ranks of a process group (gloo, or one that has gloo for the CPU)."""
        import torch.distributed as dist

        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def sharing_failure(self) -> Iterator[None]:
        """Leave the block on all ranks normally, or on all of them with an error: nobody waits for a dead one."""
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self.gather(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise LuthierError(f"rank {rank} could not save: {message}", code="other-rank")
