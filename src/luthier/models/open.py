"""Opening a base: a folder, a hub id or a GGUF file in, a model with its tokenizer out, or an error; never random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from luthier.config.schema import ModelConfig
from luthier.models.precision import DTYPES, resolve_precision
from luthier.models.source import BaseSource, find_source

__all__ = ["Base", "BaseSource", "open_base", "open_tokenizer", "resolve_precision"]


@dataclass
class Base:
    """A base model in evaluation mode with its tokenizer.

    Attributes:
        new_token_ids: ids of `model.new_tokens`, whose embedding rows are to be trained.
        notes: what was decided on the way and the user should know, one sentence each.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: BaseSource
    new_token_ids: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


def open_base(model: ModelConfig, *, device: str | torch.device = "cpu") -> Base:
    """Opens a base model on `device`, in its precision, with its tokenizer."""
    source = find_source(model)
    tokenizer = open_tokenizer(model)
    options: dict[str, Any] = {}
    if model.attention is not None:
        options["attn_implementation"] = model.attention
    loaded = AutoModelForCausalLM.from_pretrained(
        source.path or source.name, dtype=DTYPES[resolve_precision(model, device)], device_map={"": device}, **options
    )
    return Base(loaded, tokenizer, source)


def open_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Opens a base's tokenizer with the run's template and new tokens applied; no weights are read."""
    source = find_source(model)
    return AutoTokenizer.from_pretrained(source.path or source.name)
