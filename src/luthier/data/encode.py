"""Samples as tokens: chat template, joined pairs or plain text, whichever the tokenizer and the data call for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.data.formats import Conversation, Text
from luthier.data.offenders import SampleError
from luthier.data.plain import PlainText
from luthier.data.template import ChatTemplate, Encoded, TrainOn


class Encoder:
    """Renders and tokenises samples of one source; what it returns depends on its arguments alone.

    The same class works in the process that reads the data and in the workers that help it.
    """

    def __init__(self, tokenizer: Any, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._plain = PlainText(tokenizer)
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None

    @property
    def end_of_turn(self) -> str | None:
        """What the chat template writes behind an answer; None without a template."""
        return self._template.end_of_turn if self._template else None

    def encode(self, contents: Sequence[Conversation | Text]) -> Sequence[Encoded | SampleError]:
        """Return (ids, mask) for each sample, or the error that says why it cannot be used; all are of one kind.

        Raises:
            RequestError: conversations need a chat template, and the tokenizer has none.
        """
        texts = [content for content in contents if isinstance(content, Text)]
        conversations = [content for content in contents if isinstance(content, Conversation)]
        if texts:
            return self._plain.encode_texts(texts)
        if self._template is None and all(each.separator is not None for each in conversations):
            return self._plain.encode_pairs(conversations, self._train_on)
        template = self._template or ChatTemplate(self._tokenizer)  # the latter raises: there is none
        return template.encode(conversations, self._train_on)
