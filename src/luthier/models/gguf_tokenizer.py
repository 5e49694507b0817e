"""The tokenizer inside a GGUF file.

A GGUF holds vocabulary, merges and special tokens, but of the rule by which text is cut before merging only a name
(`tokenizer.ggml.pre`). Transformers knows some of those names and takes GPT-2's rule for all others, which gives
other ids than the model was trained on: digits of SmolLM2 would be joined to the space before them.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from luthier.errors import ArtifactError
from luthier.models.gguf_header import GgufHeader
from luthier.models.source import BaseSource

# Which names share a rule: llama.cpp, src/llama-vocab.cpp.
_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe", "mellum"}
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "dbrx", "smaug-bpe"}
_QWEN2 = {"qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2"}
_QWEN35 = {"qwen35"}
_TEKKEN = {"tekken"}
_GPT4O = {"gpt-4o", "llama4", "minimax-m2"}

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}"
    r"| ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def open_gguf_tokenizer(source: BaseSource, header: GgufHeader) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer with its chat template, and what the user should know about it.

    Raises:
        ArtifactError: the file holds no tokenizer, or one of a kind that cannot be built.
    """
    path = source.path
    assert path is not None
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise ArtifactError(
            "this GGUF file holds no tokenizer.",
            code="no-tokenizer",
            where=str(path),
            remedy="Give a GGUF of the language model itself; parts (a projector, an adapter) have none.",
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise ArtifactError(
            f"its tokenizer ({header.metadata.get('tokenizer.ggml.model')}) cannot be built: {error}",
            code="gguf-tokenizer",
            where=str(path),
            remedy="Give the model's folder in transformers format instead.",
        ) from error
    notes = []
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        notes += _set_split(tokenizer.backend_tokenizer, header.metadata)
    tokenizer.model_max_length = header.metadata.get(
        f"{header.architecture}.context_length", tokenizer.model_max_length
    )
    tokenizer.init_kwargs.pop("gguf_file", None)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = ""
    return tokenizer, notes


def _set_split(tokenizer: Tokenizer, metadata: dict[str, Any]) -> list[str]:
    rule = metadata.get("tokenizer.ggml.pre", "")
    if rule in _GPT2:
        return []
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if rule in _SINGLE_DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif rule in _LLAMA3:
        split = _SPLIT.format(letter=r"\p{L}", digits=r"\p{N}{1,3}", letters=r"\p{L}")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), by_bytes])
    elif rule in _QWEN2:
        split = _SPLIT.format(letter=r"\p{L}", digits=r"\p{N}", letters=r"\p{L}")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), by_bytes])
    elif rule not in _QWEN35 | _TEKKEN | _GPT4O:
        return [
            f"The GGUF names {rule or 'no'} rule for cutting text before merging, which is not known here; GPT-2's is used. "
            "Compare some ids with the original tokenizer, or give the model's folder instead."
        ]
    return []
