"""Saves a model as sharded training does: FSDP2 over gloo on several processes, through the real torch.distributed.checkpoint.

    python save_sharded.py REQUEST.json

The request: {"model": folder, "world": 4, "port": 29600, "saves": [{"form": "cookbook" | "flat" | "stateful" | "hf", "out": folder}],
"optimizer": true, "wrapped": false, "columns": false}.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp


def save(rank: int, request: dict) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"]), "RANK": str(rank), "WORLD_SIZE": str(request["world"])}  # fmt: skip
    import transformers
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (request["world"],))
    config = transformers.AutoConfig.from_pretrained(request["model"])
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(request["model"], dtype=torch.float32)
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2].isdigit() and "layers" in name]  # fmt: skip
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = None
    if request.get("optimizer"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = torch.arange(16)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    weights = model.state_dict()
    if request.get("columns"):
        weights = {n: distribute_tensor(t.full_tensor(), mesh, [Shard(t.ndim - 1)]) for n, t in weights.items()}
    if request.get("wrapped"):
        weights = {f"module._orig_mod.{name.replace('.mlp.', '._checkpoint_wrapped_module.mlp.')}": t for name, t in weights.items()}  # fmt: skip
    optim = get_optimizer_state_dict(model, optimizer) if optimizer else {}
    for each in request["saves"]:
        if each["form"] == "hf":
            dcp.save(weights, storage_writer=HuggingFaceStorageWriter(each["out"], save_distributed=True))
            continue
        nested = {"cookbook": {"model": weights, **({"optim": optim} if optim else {})}, "flat": weights,
                  "stateful": {"app": {"model": weights, "optim": optim}, "step": 3, "lr": [0.1, {"x": None}]}}  # fmt: skip
        dcp.save(nested[each["form"]], storage_writer=dcp.FileSystemWriter(each["out"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        asked = json.load(file)
    mp.spawn(save, (asked,), nprocs=asked["world"])
