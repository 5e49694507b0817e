"""The part of each tensor that this process holds, as a copy in host memory.

FSDP2 shards along dimension 0, so a shard is one stretch of the whole tensor's elements: a start and a length. A
tensor that is sharded otherwise is gathered; one that every process holds is written by the first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as RowShard

from luthier.checkpoint.dtypes import bytes_of
from luthier.checkpoint.ranks import Ranks


@dataclass(frozen=True)
class Shard:
    """Elements ``[start, start + data.numel())`` of a tensor; ``data`` is contiguous and on the CPU."""

    data: torch.Tensor
    start: int

    @property
    def bytes(self) -> memoryview:
        """The data's bytes, not a copy."""
        return bytes_of(self.data)


def stretch_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """This process's stretch of a tensor (not a copy) and its first element.

    None where what it holds is no single stretch: sharded along another dimension, or along several.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    sharded = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    local = tensor.to_local().detach()
    if not sharded:
        return local, 0
    placement = tensor.placements[sharded[0]]
    if len(sharded) > 1 or type(placement) is not RowShard or placement.dim != 0:
        return None
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    rows = -(-tensor.shape[0] // mesh.size(sharded[0]))  # torch.chunk's rule: the last ones get less, or nothing
    row = tensor.numel() // tensor.shape[0] if tensor.shape[0] else 0
    return local, min(coordinate[sharded[0]] * rows, tensor.shape[0]) * row


def writes(tensor: torch.Tensor, ranks: Ranks) -> bool:
    """Whether this process writes its part: of replicas only the first does."""
    if not isinstance(tensor, DTensor):
        return ranks.rank == 0
    coordinate = tensor.device_mesh.get_coordinate()
    replicas = [i for i, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return coordinate is not None and all(coordinate[i] == 0 for i in replicas)


@dataclass(frozen=True)
class Form:
    """What a buffer must look like to take a copy of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    pinned: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        return cls(tensor.shape, tensor.dtype, tensor.device.type == "cuda")


def forms_of(tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, Form]:
    """The forms of what this process will copy; holds on to none of the tensors."""
    found = {name: stretch_of(tensor) for name, tensor in tensors.items() if writes(tensor, ranks)}
    return {name: Form.of(stretch[0]) for name, stretch in found.items() if stretch and stretch[0].numel()}


class HostBuffers:
    """Host memory for snapshots, allocated once and reused: a training run saves the same tensors again and again."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def snapshot(
        self, tensors: Mapping[str, torch.Tensor], ranks: Ranks, gathered: Collection[str] = ()
    ) -> dict[str, Shard]:
        """Copy this process's part of every tensor; the copies are valid until the next call.

        Tensors named in ``gathered``, and those that are no stretch of rows, are brought whole to the first rank,
        which is a collective call. Returns when the copying is done, so that the next step may change the originals.
        """
        shards: dict[str, Shard] = {}
        devices = set()
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor) and (name in gathered or stretch_of(tensor) is None):
                tensor = tensor.full_tensor()
            local, start = stretch_of(tensor) or (tensor, 0)
            if local.numel() == 0 or not writes(tensor, ranks):
                continue
            buffer = self._buffer(name, Form.of(local))
            buffer.copy_(local, non_blocking=True)
            if local.device.type != "cpu":
                devices.add(local.device)
            shards[name] = Shard(buffer, start)
        for device in devices:
            torch.accelerator.synchronize(device)
        return shards

    def reserve(self, forms: Mapping[str, Form]) -> None:
        """Allocate what `snapshot` will copy into; pinning tens of GiB takes seconds, copying doesn't."""
        for name, form in forms.items():
            self._buffer(name, form)

    def _buffer(self, name: str, form: Form) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != form.shape or buffer.dtype != form.dtype:
            buffer = torch.empty(form.shape, dtype=form.dtype, device="cpu", pin_memory=form.pinned)
            self._buffers[name] = buffer
        return buffer
