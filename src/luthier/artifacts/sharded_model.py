"""Which tensors of a sharded save are the model's, and what each is called within it.

A save holds a nested state dict flattened to dotted names: ``{"model": …, "optim": …}`` by llama-cookbook and accelerate, a class
of one's own around both by torch's tutorial, or the model's tensors alone. Where the save says how it was nested, that is
followed; else names tell.
"""

from __future__ import annotations

from luthier.artifacts.sharded import Sharded, ShardedTensor
from luthier.errors import ArtifactError

OPTIMIZER = ("optim", "optimizer", "optimizers", "optim_state", "optimizer_state", "opt", "ema", "lr_scheduler", "scheduler", "scaler", "dataloader", "train_state", "extra_state")  # fmt: skip
_MOMENTS = (".exp_avg", ".exp_avg_sq", ".max_exp_avg_sq", ".momentum_buffer", ".step")
_KEYS = ("app.model.", "state_dict.", "model_state_dict.", "model.")
_INNER = ("model.model.", "model.lm_head.", "model.language_model.model.", "model.language_model.lm_head.")


def model_tensors(found: Sharded) -> tuple[dict[str, ShardedTensor], list[str]]:
    """A save's tensors by the name each has within its model, and the names of the others: an optimiser's, counters.

    Raises:
        ArtifactError: none is a model's.
    """
    kept: dict[str, ShardedTensor] = {}
    left = list(found.others)
    for name, tensor in found.tensors.items():
        inner = tensor.path[-1] if len(tensor.path) > 1 else name
        if _is_optimizers(tensor.path or (name,)):
            left.append(name)
        else:
            kept[name] = tensor
            tensor.path = (*tensor.path[:-1], inner)
    names = _common_prefix_off({name: tensor.path[-1] for name, tensor in kept.items()})
    if not kept:
        raise ArtifactError("no tensor here is a model's.", code="no-tensors", where=str(found.folder), remedy="Name the folder of the weights; this one is an optimiser's.")  # fmt: skip
    return {names[name]: tensor for name, tensor in kept.items()}, sorted(left)


def _is_optimizers(path: tuple[str, ...]) -> bool:
    """Whether an entry's place in the state dict, or its name, is that of an optimiser's state."""
    containers = [part for whole in path[:2] for part in whole.split(".")[:2]]
    return any(part in OPTIMIZER for part in containers) or path[-1].endswith(_MOMENTS)


def _common_prefix_off(names: dict[str, str]) -> dict[str, str]:
    """Names without the key that a state dict was saved under, where the folder doesn't tell which key that was."""
    for key in _KEYS:
        every = all(name.startswith(key) for name in names.values())
        if every and (key != "model." or any(name.startswith(_INNER) for name in names.values())):
            return {full: name.removeprefix(key) for full, name in names.items()}
    return names
