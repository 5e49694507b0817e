"""Text without a chat template: plain texts, and prompts with their completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.data.formats import Conversation, Text
from luthier.data.template import Encoded, TrainOn, encode_texts, require_offsets


class PlainText:
    """Tokenises text as it stands, with the tokenizer's begin token where it has one, and its end token behind."""

    def __init__(self, tokenizer: Any) -> None:
        require_offsets(tokenizer)
        self._tokenizer = tokenizer
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        begins = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
        self._begin = np.array([begin] if begins else [], np.int32)
        self._end = np.array([] if end is None else [end], np.int32)

    def encode_texts(self, texts: Sequence[Text]) -> list[Encoded]:
        """Return (ids, mask) for each text, every token trained; the end token follows only a text's end."""
        encoded = encode_texts(self._tokenizer, [text.text for text in texts])
        results = []
        for text, (ids, _, _) in zip(texts, encoded, strict=True):
            ids = np.concatenate([self._begin, ids, self._end if text.whole else self._end[:0]])
            results.append((ids, np.ones(len(ids), np.bool_)))
        return results

    def encode_pairs(self, pairs: Sequence[Conversation], train_on: TrainOn) -> list[Encoded]:
        """Return (ids, mask) for each prompt with its completion: turns one after the other, the answers trained."""
        texts, spans = zip(*(self._join(pair) for pair in pairs), strict=True)
        results = []
        for (ids, starts, ends), answers in zip(encode_texts(self._tokenizer, texts), spans, strict=True):
            mask = np.full(len(ids), train_on == "all")
            for start, end in answers[-1:] if train_on == "last" else answers:
                # A token across the border belongs to the answer if it holds any of its text.
                mask[np.searchsorted(ends, start, side="right") : np.searchsorted(starts, end, side="left")] = True
            ids = np.concatenate([self._begin, ids, self._end])
            outside = np.full(len(self._begin), train_on == "all")
            results.append((ids, np.concatenate([outside, mask, np.ones(len(self._end), np.bool_)])))
        return results

    def _join(self, pair: Conversation) -> tuple[str, list[tuple[int, int]]]:
        text, spans = "", []
        for number, message in enumerate(pair.messages):
            text += (pair.separator or "") if number else ""
            if message["role"] == "assistant":
                spans.append((len(text), len(text) + len(message["content"])))
            text += message["content"]
        return text, spans
