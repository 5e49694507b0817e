"""What a base is, read from its config and its files' headers alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from luthier.artifacts.gguf_header import read_gguf_header
from luthier.artifacts.tensorfile import read_header
from luthier.config.schema import ModelConfig
from luthier.models.check_folder import read_json, weight_files
from luthier.models.source import find_source

_FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True)
class BaseFacts:
    """A base model's facts; None where its files do not say.

    Attributes:
        architecture: class name (`LlamaForCausalLM`), or the GGUF's architecture.
        parameters: numbers in all tensors of the files; tied weights count once.
        dtype: of most parameters: bf16, fp16, fp32, or the file's own name for another.
        max_positions: longest sequence in tokens.
        tied: whether the head shares the embeddings' weights.
        licence: from the front matter of the README, or the GGUF's metadata.
    """

    kind: str
    architecture: str | None
    model_type: str | None
    parameters: int
    dtype: str
    vocabulary: int | None
    layers: int | None
    max_positions: int | None
    tied: bool
    has_tokenizer: bool
    has_template: bool
    licence: str | None


def base_facts(path: Path) -> BaseFacts:
    """Facts of a transformers folder or a GGUF file, without reading weights; raises as opening it would."""
    source = find_source(ModelConfig(path=str(path)))
    assert source.path is not None, "a path that exists is no hub id"
    return _gguf(source.path) if source.kind == "gguf" else _folder(source.path)


def _folder(folder: Path) -> BaseFacts:
    config = read_json(folder / "config.json")
    text = config.get("text_config") or config
    counts: Counter[str] = Counter()
    for file in weight_files(folder):
        for place in read_header(file)[0].values():
            counts[place.spec.dtype] += math.prod(place.spec.shape)
    dtype = counts.most_common(1)[0][0]
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    return BaseFacts(
        kind="folder",
        architecture=next(iter(config.get("architectures") or []), None),
        model_type=config.get("model_type"),
        parameters=sum(counts.values()),
        dtype=_FLOATS.get(dtype, dtype),
        vocabulary=text.get("vocab_size"),
        layers=text.get("num_hidden_layers", text.get("n_layer")),
        max_positions=text.get("max_position_embeddings", text.get("n_positions")),
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        has_tokenizer=any((folder / name).is_file() for name in names),
        has_template="chat_template" in settings or (folder / "chat_template.jinja").is_file(),
        licence=_licence(folder / "README.md"),
    )


def _gguf(path: Path) -> BaseFacts:
    header = read_gguf_header(path)
    data = header.metadata
    counts: Counter[str] = Counter()
    for tensor in header.tensors.values():
        counts[tensor.kind.name] += math.prod(tensor.shape)
    dtype = counts.most_common(1)[0][0]
    tokens = data.get("tokenizer.ggml.tokens")

    def of(key: str) -> Any:
        return data.get(f"{header.architecture}.{key}")

    return BaseFacts(
        kind="gguf",
        architecture=header.architecture,
        model_type=header.architecture,
        parameters=sum(counts.values()),
        dtype=_FLOATS.get(dtype, dtype),
        vocabulary=of("vocab_size") or (len(tokens) if tokens else None),
        layers=of("block_count"),
        max_positions=of("context_length"),
        tied="output.weight" not in header.tensors,
        has_tokenizer=tokens is not None,
        has_template="tokenizer.chat_template" in data,
        licence=data.get("general.license"),
    )


def _licence(readme: Path) -> str | None:
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    try:
        front = yaml.safe_load(text[3:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return None  # a model card that is no valid YAML says nothing
    value = front.get("license") if isinstance(front, dict) else None
    return str(value) if value else None
