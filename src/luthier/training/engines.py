"""The optimisers of torch and bitsandbytes behind ``optimizers.Optimizer``, and the states each starts with.

They create their states in their first step; here they exist from the beginning, so that a checkpoint's tensors are known
before step 1 and can be loaded without one. A test holds these states against what each library creates itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from luthier.config.schema import OptimConfig
from luthier.errors import RequestError

EngineName = Literal["AdamW", "AdamW 8-bit", "Adafactor", "Muon"]


@dataclass(frozen=True)
class Group:
    """Tensors updated with the same settings.

    Attributes:
        weights: what is updated: parameters, or their masters.
        lr: peak rate.
        weight_decay: decoupled decay.
    """

    weights: list[torch.Tensor]
    lr: float
    weight_decay: float

    def as_torch(self) -> dict[str, Any]:
        """The group as ``torch.optim`` takes it."""
        return {"params": self.weights, "lr": self.lr, "weight_decay": self.weight_decay}


def make(name: EngineName, groups: Sequence[Group], optim: OptimConfig) -> torch.optim.Optimizer:
    """Build one optimiser over ``groups``, its states at zero.

    Raises RequestError where 8-bit states do not work on the weights' device.
    """
    engine: Any = _build(name, [group.as_torch() for group in groups], optim)
    for index, group in enumerate(engine.param_groups):
        for position, weight in enumerate(group["params"]):
            if name == "AdamW 8-bit":
                engine.init_state(group, weight, index, position)
            else:
                engine.state[weight] = _initial(name, weight, bool(group.get("fused")))
    return engine


def works_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's fused AdamW runs on this device; found by a step on one number."""
    weight = torch.zeros(1, device=device, dtype=dtype)
    weight.grad = torch.zeros_like(weight)
    try:
        torch.optim.AdamW([weight], fused=True).step()
    except RuntimeError:
        return False
    return True


def _build(name: EngineName, groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    if name == "Muon":
        # the update's root mean square is AdamW's, so one `optim.lr` suits both (arXiv:2502.16982)
        return torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")
    if name == "Adafactor":
        # foreach would hold every tensor's update at once: the memory that Adafactor is chosen to save
        return torch.optim.Adafactor(groups, foreach=False)
    if name == "AdamW 8-bit":
        return _eight_bit(groups, optim)
    kinds = {(weight.device, weight.dtype) for group in groups for weight in group["params"]}
    fused = all(works_fused(device, dtype) for device, dtype in kinds)
    return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=fused, foreach=not fused)


def _initial(name: EngineName, weight: torch.Tensor, fused: bool) -> dict[str, torch.Tensor]:
    if name == "Muon":
        return {"momentum_buffer": torch.zeros_like(weight)}
    if name == "AdamW":
        step = torch.zeros((), dtype=torch.float32, device=weight.device if fused else "cpu")
        return {"step": step, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
    step = torch.zeros((), dtype=torch.float32)
    if weight.ndim < 2:
        return {"step": step, "variance": torch.zeros_like(weight)}
    row, column = list(weight.shape), list(weight.shape)
    row[-1], column[-2] = 1, 1
    return {"step": step, "row_var": weight.new_zeros(row), "col_var": weight.new_zeros(column)}


def _eight_bit(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """bitsandbytes' blockwise AdamW; tensors below 4,096 elements keep fp32 states in it."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise RequestError(
            f"`optim.states: 8bit` needs bitsandbytes, which can't be imported: {error}.",
            code="bitsandbytes",
            where="optim.states",
            remedy='`pip install "luthier[bitsandbytes]"`, or take `optim.states: 32bit`.',
        ) from error
    device = groups[0]["params"][0].device
    trial = torch.zeros(4096, device=device)
    trial.grad = torch.zeros_like(trial)
    try:
        AdamW8bit([trial]).step()
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        raise RequestError(
            f"bitsandbytes' 8-bit AdamW does not work on {device}: {error}.",
            code="bitsandbytes",
            where="optim.states",
            remedy="Take `optim.states: 32bit`.",
        ) from error
    return AdamW8bit(groups, betas=optim.betas, eps=optim.eps)
