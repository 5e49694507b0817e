"""Evaluations during a run: held-out loss, generated answers, metrics; one record each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from luthier.config.schema import RunConfig
from luthier.data.tokens import Tokens
from luthier.training.evaluate import evaluate_loss
from luthier.training.generate import answers
from luthier.training.metrics import score

METRIC_SAMPLES = 64
"""Held-out samples that metrics are computed on where `evaluate.generate` names no number."""


class Measurer:
    """Measures a model on held-out samples, always the same ones."""

    def __init__(self, config: RunConfig, tokenizer: Any, held_out: Tokens | None, device: torch.device) -> None:
        self._config, self._tokenizer, self._held_out, self._device = config, tokenizer, held_out, device

    @property
    def has_data(self) -> bool:
        return self._held_out is not None

    def measure(self, model: nn.Module, step: int, say: Callable[[str], None]) -> dict[str, Any]:
        """One ``eval`` record of metrics.jsonl; at step 0 it is the base model's."""
        assert self._held_out is not None
        result = evaluate_loss(
            model, self._held_out, self._config.train, pad_id=self._tokenizer.pad_token_id, device=self._device
        )
        record: dict[str, Any] = {
            "kind": "eval",
            "step": step,
            "time": time.time(),
            "eval_loss": result.loss,
            "perplexity": result.perplexity,
            "tokens": result.tokens,
        }
        if step == 0:
            record["base"] = True
        record |= self._answers(model)
        shown = "  ".join(f"{k.removeprefix('metric/')} {v:.3f}" for k, v in record.items() if k.startswith("metric/"))
        name = "base model" if step == 0 else f"step {step}"
        say(f"evaluation, {name}: loss {result.loss:.4f}, perplexity {result.perplexity:.2f}  {shown}".rstrip())
        return record

    def _answers(self, model: nn.Module) -> dict[str, Any]:
        settings = self._config.evaluate
        if (not settings.generate and not settings.metrics) or self._config.method == "pretrain":
            return {}
        assert self._held_out is not None
        count = min(len(self._held_out), settings.generate or METRIC_SAMPLES)
        prompts = [self._held_out.prompts(index) for index in range(count)]
        references = [self._held_out.reference(index) for index in range(count)]
        tools = [self._held_out.tools(index) for index in range(count)]
        given = answers(model, self._tokenizer, prompts, tools=tools, max_new_tokens=settings.max_new_tokens)
        scores = score(settings.metrics, given, references) if settings.metrics else {}
        samples = [
            {"prompt": p[-1]["content"], "reference": r, "answer": a} for p, r, a in zip(prompts, references, given)
        ]
        return {**{f"metric/{name}": value for name, value in scores.items()}, "samples": samples[:8]}
