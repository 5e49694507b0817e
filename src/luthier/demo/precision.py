"""Which precision trains faster on this processor: measured, because names and flags of processors do not tell."""

from __future__ import annotations

import time
from typing import Literal

import torch
from transformers import AutoModel, PreTrainedConfig

LAYERS = 2
TOKENS = 96

Precision = Literal["bf16", "fp32"]


def step_seconds(config: PreTrainedConfig) -> dict[Precision, float]:
    """Seconds of one forward and backward pass of the model's shapes on the CPU, by precision.

    Only two of the model's layers run, and no head, on a few tokens: processors without bf16 arithmetic emulate it
    and need twenty times as long, so a step of the whole model could take a minute. The model's weights are not read.
    """
    fp32 = _seconds(config, torch.float32, give_up=float("inf"))
    return {"fp32": fp32, "bf16": _seconds(config, torch.bfloat16, give_up=4 * fp32)}


def _seconds(config: PreTrainedConfig, dtype: torch.dtype, *, give_up: float) -> float:
    """The faster of two passes after a first one, which also allocates; the first one's time if it exceeds `give_up`."""
    small = type(config)(
        **{**config.to_dict(), "num_hidden_layers": LAYERS, "vocab_size": TOKENS, "pad_token_id": None}
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModel.from_config(small, dtype=dtype)
    first = _pass_seconds(model)
    return first if first > give_up else min(_pass_seconds(model), _pass_seconds(model))


def _pass_seconds(model: torch.nn.Module) -> float:
    model.zero_grad()
    start = time.perf_counter()
    model(input_ids=torch.arange(TOKENS)[None], use_cache=False).last_hidden_state.float().mean().backward()
    return time.perf_counter() - start
