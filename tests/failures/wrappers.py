"""Models as torch's own wrappers hold them, and the names that come out when somebody saves what they see."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def compiled(model: Any) -> Any:
    return torch.compile(model)


def compiled_layers(model: Any) -> Any:
    """Layer by layer, as regional compilation does; save_pretrained then writes `_orig_mod.` into the names."""
    _each_layer(model, torch.compile)
    return model


def checkpointed_layers(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    _each_layer(model, checkpoint_wrapper)
    return model


def data_parallel(model: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(model)


def fully_sharded(model: Any) -> Any:
    """FSDP over FSDP layers; with one process every parameter is whole."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    def shard(module: Any) -> Any:
        return FullyShardedDataParallel(
            module,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy.NO_SHARD,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _each_layer(model, shard)
        return shard(model)


def compiled_and_parallel(model: Any) -> Any:
    return torch.compile(data_parallel(model))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    wrapper.__name__: wrapper
    for wrapper in (compiled, compiled_layers, checkpointed_layers, data_parallel, fully_sharded, compiled_and_parallel)
}


def seen(model: Any, tied: tuple[str, ...] = ("lm_head.weight",)) -> dict[str, torch.Tensor]:
    """Every parameter by the name that the wrapped model gives it, a tied one once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if not name.endswith(tied)}


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A process group of this process alone, on gloo."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _each_layer(model: Any, wrap: Callable[[Any], Any]) -> None:
    layers = next(module for name, module in model.named_modules() if name.endswith("layers"))
    for index, layer in enumerate(layers):
        layers[index] = wrap(layer)
