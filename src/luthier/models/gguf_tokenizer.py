"""The tokenizer inside a GGUF file.

A GGUF holds vocabulary, merges and special tokens, but of the rule by which text is cut before merging only a name
(`tokenizer.ggml.pre`). Transformers knows some of those names and takes GPT-2's rule for all others, which gives
other ids than the model was trained on: digits of SmolLM2 would be joined to the space before them. Its versions up to
5.17 at least also read Gemma's vocabulary of pieces with other ids and without its special tokens, and say nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from luthier.artifacts.gguf_header import GgufHeader
from luthier.errors import ArtifactError
from luthier.models.source import BaseSource

# Which names share a rule: llama.cpp, src/llama-vocab.cpp.
_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe", "mellum"}
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "dbrx", "smaug-bpe"}
_QWEN2 = {"qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2"}
_QWEN35 = {"qwen35"}
_KNOWN_TO_TRANSFORMERS = {"tekken", "gpt-4o", "llama4", "minimax-m2"}

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_NAMED = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

# Strings on which tokenizers differ: digits, contractions, spaces, line ends, scripts, marks, emoji, bytes.
TRICKY = (
    "Hello world", " leading", "trailing ", "  two  three   ", "\ttab\t\ttabs", "line\nline\n\nline\r\nline\n\n\n", " \n \n", "\n  x",
    "1", "12", "123", "1234", "12345.67", "x1y22z333", " 42", "1,234,567", "I'll I'LL we've O'Neil 's 'S don't", "a.b.c...", "!?!? ?!", "camelCase HTTPServer iPhone's ÉCOLE", "http://x.y/z/\n",
    "foo_bar-baz/qux", "if (x == 1) {\n    return y;\n}\n", "Grüße, naïve café", "你好，世界", "日本語テキスト", "한국어", "русский текст", "العربية", "हिन्दी",
    "ไทย", "👋🏽👩‍👩‍👧", "e\u0301", "\u200b\u00a0x", "½ ² Ⅳ ٣", "<html>&amp;</html>", '{"key": [1, 2.5, null]}', "🦙", "ﬁ", "mixed中文and英文123", "",
)  # fmt: skip

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}"
    r"| ?[^\s{letters}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_UPPER, _LOWER = r"\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}", r"\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}"
_CASED = (
    rf"[^\r\n\p{{{{L}}}}\p{{{{N}}}}]?[{_UPPER}]*[{_LOWER}]+{{ending}}|[^\r\n\p{{{{L}}}}\p{{{{N}}}}]?[{_UPPER}]+[{_LOWER}]*{{ending}}"
    r"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    rule = header.metadata.get("tokenizer.ggml.pre", "")
    by_bytes = header.metadata.get("tokenizer.ggml.model") == "gpt2"
    pieces = header.metadata.get("tokenizer.ggml.model") == "llama" and "tokenizer.ggml.scores" in header.metadata
    known = _cut(rule)
    cut = known or _cut("gpt-2") if by_bytes and rule not in _KNOWN_TO_TRANSFORMERS else None
    try:
        if cut:
            tokenizer = _byte_level(header.metadata, cut)
        elif pieces:
            tokenizer = _sentencepiece(header.metadata)
        else:
            tokenizer = _by_transformers(path)
    except (ValueError, KeyError, IndexError, AttributeError, NotImplementedError, OSError) as error:
        raise ArtifactError(
            f"its tokenizer ({header.metadata.get('tokenizer.ggml.model')}) cannot be built: {error}",
            code="gguf-tokenizer",
            where=str(path),
            remedy="Give the model's folder in transformers format instead.",
        ) from error
    tokenizer.model_max_length = header.metadata.get(
        f"{header.architecture}.context_length", tokenizer.model_max_length
    )
    if known or cut is None:
        return tokenizer, []
    return tokenizer, [
        f"The GGUF names {rule or 'no'} rule for cutting text before merging, which is not known here; GPT-2's is used. "
        "Compare some ids with the original tokenizer, or give the model's folder instead."
    ]


def _byte_level(metadata: dict[str, Any], cut: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerBase:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, metadata, begins=False)


def _sentencepiece(metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    """SentencePiece's BPE: the two neighbours that make the piece of the highest score are joined first."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    scores: list[float] = metadata["tokenizer.ggml.scores"]
    kinds = metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind == NORMAL:
            halves = [(token[:at], token[at:]) for at in range(1, len(token))]
            merges += [(-score, vocabulary[a], vocabulary[b], (a, b)) for a, b in halves if a in vocabulary and b in vocabulary]  # fmt: skip
    merges.sort()
    names = _names(metadata)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[pair for *_, pair in merges],
            unk_token=names.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = "\u2581"
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    as_pieces = normalizers.Replace(" ", space)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), as_pieces]) if prefixed else as_pieces
    stripped = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])  # fmt: skip
    return _finished(backend, metadata, begins=True)


def _finished(backend: Tokenizer, metadata: dict[str, Any], *, begins: bool) -> PreTrainedTokenizerBase:
    """With its special tokens and template; ``begins``: whether a text gets the first token where the file does not say."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])
    names = _names(metadata)
    first = metadata.get("tokenizer.ggml.add_bos_token", begins) and "bos_token" in names
    before = [names["bos_token"]] if first else []
    after = [names["eos_token"]] if metadata.get("tokenizer.ggml.add_eos_token") and "eos_token" in names else []
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, backend.token_to_id(token)) for token in (*before, *after)],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _names(metadata: dict[str, Any]) -> dict[str, str]:
    return {name: metadata["tokenizer.ggml.tokens"][metadata[key]] for name, key in _NAMED.items() if key in metadata}


def _by_transformers(path: Path) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.init_kwargs.pop("gguf_file", None)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = ""
    return tokenizer


def rule_of(tokenizer: Tokenizer) -> str | None:
    """The name in llama.cpp of the rule by which a byte-level tokenizer cuts text; None where none of those here is it.

    It is told by its behaviour, since the same rule is written down in several ways.
    """
    if tokenizer.pre_tokenizer is None:
        return None
    ignores = json.loads(tokenizer.to_str())["model"].get("ignore_merges", False)
    names = ("gpt-2", "smollm", "llama-bpe" if ignores else "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")
    for name in names:
        cut = _cut(name)
        assert cut is not None
        if all(cut.pre_tokenize_str(text) == tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in TRICKY):
            return name
    return None


def _cut(rule: str) -> pre_tokenizers.PreTokenizer | None:
    """The cutting rule by its name in the file; None for one that is not written down here."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule in _GPT2:
        return words
    if rule in _SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if rule in _LLAMA3:
        split = _SPLIT.format(letter=r"\p{L}", digits=r"\p{N}{1,3}", letters=r"\p{L}")
    elif rule in _QWEN2:
        split = _SPLIT.format(letter=r"\p{L}", digits=r"\p{N}", letters=r"\p{L}")
    elif rule in _QWEN35:
        split = _SPLIT.format(letter=r"[\p{L}\p{M}]", digits=r"\p{N}", letters=r"\p{L}\p{M}")
    elif rule == "tekken":
        split = _CASED.format(ending="", digits=r"\p{N}")
    elif rule == "gpt-4o":
        split = _CASED.format(ending=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", digits=r"\p{N}{1,3}")
    else:
        return None
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), by_bytes])
