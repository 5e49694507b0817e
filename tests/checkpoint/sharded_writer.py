"""One of several gloo processes that hold FSDP2 shards and write or read one folder; run by test_sharded_writer."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.checkpoint.checkpoints import Checkpoints
from luthier.checkpoint.ranks import Ranks


def sharded(folder: Path, mesh) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train_once(model: torch.nn.Module) -> torch.optim.Optimizer:
    """One step on the same batch on every rank: averaged gradients are one process's gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(3, 35)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter in model.parameters():  # the same numbers whatever the order of an all-reduce
        grad = parameter.grad
        (grad.to_local() if isinstance(grad, DTensor) else grad).copy_(local_pattern(parameter))
    optimizer.step()
    return optimizer


def local_pattern(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a gradient that is a function of the element alone."""
    whole = (torch.arange(parameter.numel(), dtype=torch.float32) % 97 / 97 - 0.5).view(parameter.shape)
    if not isinstance(parameter, DTensor):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()


def main(action: str, base: str, run: str, rank: str, size: str, port: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=int(size))
    mesh = init_device_mesh("cpu", (int(size),))
    model = sharded(Path(base), mesh)
    checkpoints = Checkpoints(run, tokenizer=AutoTokenizer.from_pretrained(base), ranks=Ranks.of(dist.group.WORLD))
    if action == "write":
        optimizer = train_once(model)
        checkpoints.save(1, model, optimizer, {"note": "sharded"})
        checkpoints.wait()
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5.0)
        assert checkpoints.restore(model, optimizer) == 1
        assert optimizer.param_groups[0]["lr"] == 1e-2
        if int(rank) == 0:
            Path(run, f"read-by-{size}.txt").write_text("begun")
        checkpoints.save(2, model, optimizer)  # what was read, written again, must be the same bytes
        checkpoints.wait()
    dist.barrier()
    dist.destroy_process_group()
