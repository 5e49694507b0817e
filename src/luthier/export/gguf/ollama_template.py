"""A chat template in Ollama's language: what stands before and after each role's text, told by rendering probes.

Ollama knows some templates by their text and takes bare prompts for all others, so a fine-tuned model's own would get
lost. Most are a text before and after each message; those are found by rendering conversations of marks, written down
for Ollama, and compared on further conversations. Templates of another form yield nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
_MARKS = ("\ue0010\ue001", "\ue0011\ue001", "\ue0012\ue001")  # of a private area, so that no template holds them


@dataclass(frozen=True)
class Parts:
    """The texts around each role's, what begins a conversation without a system message, and what asks for an answer."""

    around: dict[str, tuple[str, str]]
    default: str
    asks: str

    def render(self, messages: Messages) -> str:
        body = "".join(self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages)
        return ("" if any(m["role"] == "system" for m in messages) else self.default) + body + self.asks

    def for_ollama(self) -> str:
        """The same in Go's template language."""
        branches = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in self.around.items()
        )
        default = f"{{{{ if not .System }}}}{self.default}{{{{ end }}}}" if self.default else ""
        return f"{default}{{{{ range .Messages }}}}{{{{ {branches}{{{{ end }}}}{{{{ end }}}}{self.asks}"


def ollama_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's chat template for a Modelfile; None where it has none, or one of another form."""
    if not tokenizer.chat_template:
        return None
    try:
        parts = _parts(tokenizer)
        good = parts is not None and all(parts.render(each) == _rendered(tokenizer, each) for each in _conversations())
    except (jinja2.TemplateError, TypeError, KeyError, ValueError):  # it takes no such conversation
        return None
    if parts is None or not good:
        return None
    texts = [*(text for pair in parts.around.values() for text in pair), parts.default, parts.asks]
    return None if any("{{" in text or '"""' in text for text in texts) else parts.for_ollama()


def _parts(tokenizer: PreTrainedTokenizerBase) -> Parts | None:
    system, user, answer = (
        {"role": role, "content": mark} for role, mark in zip(ROLES, _MARKS)
    )  # fmt: skip
    again = {"role": "user", "content": _MARKS[0]}
    after_user = _rendered(tokenizer, [user], ask=False).partition(_MARKS[1])[2]
    after_answer = _rendered(tokenizer, [user, answer], ask=False).partition(_MARKS[2])[2]
    first, rest = _cut(_rendered(tokenizer, [user, answer, again]), _MARKS[1])
    to_answer, rest = _cut(rest, _MARKS[2])
    to_user, to_end = _cut(rest, _MARKS[0])
    starts = ((to_answer, after_user), (to_user, after_answer), (to_end, after_user))
    if not all(text.startswith(before) for text, before in starts):
        return None
    before_answer, before_user, asks = (text[len(before) :] for text, before in starts)
    before_system, rest = _cut(_rendered(tokenizer, [system, user]), _MARKS[0])
    after_system = _cut(rest, _MARKS[1])[0]
    if not first.endswith(before_user) or not after_system.endswith(before_user):
        return None
    after_system = after_system[: len(after_system) - len(before_user)]
    around = {
        "system": (before_system, after_system), "user": (before_user, after_user), "assistant": (before_answer, after_answer)
    }  # fmt: skip
    return Parts(around, first[: len(first) - len(before_user)], asks)


def _conversations() -> list[Messages]:
    def turns(*texts: str, system: str | None = None) -> Messages:
        told = [{"role": "system", "content": system}] if system else []
        return [*told, *({"role": ROLES[1 + index % 2], "content": text} for index, text in enumerate(texts))]

    return [
        turns("A?"),
        turns("A?", "B.", "C?"),
        turns("A?", system="S."),
        turns("A?", "B.", "C?", "D.", "E?", system="S."),
    ]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, ask: bool = True) -> str:
    """The conversation as text, without the token that llama.cpp puts first by itself."""
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and bool(tokenizer.bos_token)
    return str(text).removeprefix(str(tokenizer.bos_token)) if begins else str(text)


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError("the template leaves a message out")
    return before, after
