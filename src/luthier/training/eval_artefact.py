"""``luthier eval``: held-out loss and task metrics of any artefact, one or two side by side."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.config.read import read_run
from luthier.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from luthier.data.prepare import as_sources, longest_row, prepare
from luthier.data.tokens import Tokens
from luthier.errors import RequestError
from luthier.training.evaluate import evaluate_loss
from luthier.training.generate import answers
from luthier.training.metrics import resolve, score


@dataclass(frozen=True)
class Measured:
    """One artefact's results."""

    path: str
    loss: float
    perplexity: float
    tokens: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """The results of one artefact or of several, on the same samples."""

    data: str
    samples: int
    results: tuple[Measured, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "samples": self.samples,
            "results": [
                {"path": r.path, "loss": r.loss, "perplexity": r.perplexity, "tokens": r.tokens, "metrics": r.metrics}
                for r in self.results
            ],
        }

    def __str__(self) -> str:
        names = list(self.results[0].metrics)
        head = f"{self.data}: {self.samples} samples, {self.results[0].tokens} tokens"
        columns = ["loss", "perplexity", *names]
        lines = [head, "  ".join(f"{column:>10}" for column in columns)]
        for result in self.results:
            values = [result.loss, result.perplexity, *result.metrics.values()]
            lines.append("  ".join(f"{value:>10.4f}" for value in values) + f"  {result.path}")
        return "\n".join(lines)


def evaluate_artefacts(
    paths: Sequence[str],
    data: str,
    *,
    metrics: Sequence[str] = (),
    limit: int | None = None,
    max_new_tokens: int = 128,
    base: str | None = None,
    load: Callable[..., tuple[Any, Any]],
) -> Comparison:
    """Measure artefacts on the same held-out samples, one after the other.

    Args:
        data: a data file or glob, or a run file (.yaml) whose ``data.eval`` is used.
        limit: samples used of each source at most, the first ones.
        load: opens a path; given by the caller, because opening anything is the library's face, above this.

    Raises:
        RequestError: a metric, the data or a path is wrong.
    """
    resolve(metrics)
    asked = _data_config(data, limit)
    results = []
    count = 0
    for path in paths:
        model, tokenizer = load(path, base=base)
        config = _for_model(asked, model)
        held_out = _tokens(config, tokenizer, path)
        count = len(held_out)
        device = next(model.parameters()).device
        loss = evaluate_loss(model, held_out, config.train, pad_id=tokenizer.pad_token_id, device=device)
        values: dict[str, float] = {}
        if metrics:
            prompts = [held_out.prompts(index) for index in range(count)]
            tools = [held_out.tools(index) for index in range(count)]
            given = answers(model, tokenizer, prompts, tools=tools, max_new_tokens=max_new_tokens)
            values = score(metrics, given, [held_out.reference(index) for index in range(count)])
        results.append(Measured(path, loss.loss, loss.perplexity, loss.tokens, values))
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Comparison(data, count, tuple(results))


def _data_config(data: str, limit: int | None) -> RunConfig:
    """A config that holds nothing but the samples, and how they are read."""
    train = TrainConfig(packing=False)
    if data.endswith((".yaml", ".yml")):
        run = read_run(data)
        if run.data.eval is None or isinstance(run.data.eval, float | int):
            raise RequestError(
                "this run file has no held-out source of its own.",
                code="no-eval-data",
                where=f"{data}: data.eval",
                remedy="Name a data file instead, or set data.eval to one.",
            )
        train = run.train.model_copy(update={"packing": False})
        sources = [_limited(source, limit) for source in as_sources(run.data.eval)]
        settings = run.data.model_copy(update={"train": sources, "eval": None})
        return RunConfig(model=run.model, data=settings, method=run.method, train=train, output="eval")
    if not os.path.exists(data) and not any(mark in data for mark in "*?["):
        raise RequestError("there is no such data file.", code="no-such-data", where=data, remedy="Check the path.")
    source = SourceConfig(path=str(Path(data).expanduser()), limit=limit)
    return RunConfig(model=ModelConfig(path="eval"), data=DataConfig(train=source), train=train, output="eval")


def _limited(source: SourceConfig, limit: int | None) -> SourceConfig:
    """The first samples of a source: as many as both its own limit and the one asked for allow."""
    limits = [each for each in (source.limit, limit) if each is not None]
    return source.model_copy(update={"limit": min(limits, default=None)})


def _for_model(config: RunConfig, model: Any) -> RunConfig:
    """The config with its longest row filled in, which the model's positions may bound."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    train = config.train.model_copy(update={"max_length": longest_row(config.train.max_length, positions)})
    return config.model_copy(update={"train": train})


def _tokens(config: RunConfig, tokenizer: Any, path: str) -> Tokens:
    try:
        return prepare(config, tokenizer, say=lambda text: None).train
    except RequestError as error:
        if error.code == "no-template":
            raise RequestError(error.message, code=error.code, where=path, remedy="Evaluate an artefact that has a chat template, such as the run's final/.") from None  # fmt: skip
        raise
