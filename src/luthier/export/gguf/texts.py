"""The texts of a GGUF's proof: tricky strings, special tokens amid text, rendered conversations; and their tokens compared.

llama.cpp differs from some tokenizers in two ways that no file can mend. It never composes Unicode (NFC); such strings are
left out, and the file's card says so. And where SentencePiece puts a space before a text, llama.cpp puts one before
every piece between special tokens, and before a text that begins with one, where transformers 5 does not: then the
proof is inconclusive and says how many strings that concerns.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.export.proof.prober import read_texts
from luthier.export.proof.prove import MESSAGES, TEXTS
from luthier.models.gguf_tokenizer import TRICKY


@dataclass
class TextsCompared:
    """What was compared, what differs, and what differs by llama.cpp's spaces only."""

    covered: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    spaces: str | None = None


def proof_texts(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    """The strings whose tokens are compared; special tokens are those that have one of the embedding's rows."""
    found = [*TEXTS, *TRICKY]
    for token in _specials(tokenizer, rows)[:6]:
        found += [f"{token}x", f"x{token}\ny", f"x {token} y", f"{token}{token}"]
    if tokenizer.chat_template:
        found += [text for text in read_texts(tokenizer, MESSAGES, [])[0] if not text.startswith("refused")]
    return [text for text in found if unicodedata.is_normalized("NFC", text)] if composes(tokenizer) else found


def compare_texts(
    tokenizer: PreTrainedTokenizerBase, rows: int, tokens: Sequence[Sequence[int]], rendered: Sequence[str]
) -> TextsCompared:
    """Compare llama.cpp's tokens of `proof_texts`, and its rendering of the probe conversations, with the tokenizer's."""
    result, texts = TextsCompared(), proof_texts(tokenizer, rows)
    ours = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    other = [text for text, left, right in zip(texts, ours, tokens, strict=True) if left != list(right)]
    spared = _spares_spaces(tokenizer)
    spaces = [
        text
        for text in other
        if spared and (text.startswith(" ") or any(token in text for token in _specials(tokenizer, rows)))
    ]
    rest = [text for text in other if text not in spaces]
    if rest:
        result.differences.append(f"llama.cpp cuts {len(rest)} of {len(texts)} strings into other tokens, such as {rest[0]!r}")  # fmt: skip
    if spaces:
        result.spaces = f"llama.cpp puts a space before texts and behind special tokens where this tokenizer does not, which changes the tokens of {len(spaces)} of {len(texts)} strings, such as {spaces[0]!r}"  # fmt: skip
    result.covered.append(f"tokens of {len(texts)} strings")
    if tokenizer.chat_template:
        _compare_rendered(tokenizer, rendered, result)
    return result


def composes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer brings text to Unicode's composed form first."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"


def _compare_rendered(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[str], result: TextsCompared) -> None:
    ours, _ = read_texts(tokenizer, MESSAGES, [])
    pairs = [(left, right) for left, right in zip(ours, rendered, strict=True) if not left.startswith("refused")]
    bos = tokenizer.bos_token or ""
    if any(left not in (right, bos + right) for left, right in pairs):  # llama.cpp leaves a BOS to its tokenizer
        result.differences.append("llama.cpp renders the chat template differently")
    result.covered.append(f"{len(pairs)} conversations in the chat template")


def _specials(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)
    return list(dict.fromkeys(str(token) for token, index in named if index < rows))


def _spares_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a space comes before the first piece of a text only, and not before one that begins with a space."""
    part: Mapping[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer") or {}
    steps = part.get("pretokenizers") or [part]
    return any(step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never" for step in steps)
