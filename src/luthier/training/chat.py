"""A conversation with a model at the terminal: the verb `chat`, once the model is open."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from luthier.errors import RequestError
from luthier.training.generate import Messages, stream

HELP = "Ctrl-C stops an answer, /reset starts afresh, /exit or Ctrl-D ends."


@dataclass(frozen=True)
class ChatOptions:
    """How the model is asked."""

    system: str | None = None
    """System message that every conversation begins with."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0: always the most likely token."""


def chat_once(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: ChatOptions,
    write: Callable[[str], None],
) -> None:
    """Answers one prompt, piece by piece, and ends the line; Ctrl-C stops the answer and is raised.

    Raises:
        RequestError: as `luthier.training.generate.stream` does.
    """
    _answer(model, tokenizer, [*_opening(options), {"role": "user", "content": prompt}], options, write)


def chat_loop(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    options: ChatOptions,
    *,
    read: Callable[[str], str],
    write: Callable[[str], None],
) -> None:
    """Talks until the user ends it; the model sees the whole conversation since the last /reset.

    Args:
        read: shows a prompt and returns a line, as `input` does (EOFError at the end, KeyboardInterrupt at Ctrl-C).
        write: shows a piece of text at once, without a line end of its own.
    """
    write(f"{HELP}\n")
    messages = _opening(options)
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write(f"\n{HELP}\n")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            messages = _opening(options)
            write("Started afresh.\n")
        elif line.startswith("/") and " " not in line:
            write(f"There is no command {line}. {HELP}\n")
        elif line:
            messages = _exchange(model, tokenizer, messages, line, options, write)


def _exchange(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    line: str,
    options: ChatOptions,
    write: Callable[[str], None],
) -> Messages:
    """The conversation with the question and its answer; as it was if the question cannot be asked."""
    asked = [*messages, {"role": "user", "content": line}]
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        write(piece)

    try:
        _answer(model, tokenizer, asked, options, show)
    except KeyboardInterrupt:
        write("\n")
    except RequestError as error:
        write(f"{error}\n")
        return messages
    return [*asked, {"role": "assistant", "content": "".join(shown).strip()}]


def _answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    options: ChatOptions,
    write: Callable[[str], None],
) -> None:
    pieces = stream(model, tokenizer, messages, max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    with closing(pieces):  # also when interrupted: the model must not go on thinking in its thread
        for piece in pieces:
            write(piece)
    write("\n")


def _opening(options: ChatOptions) -> Messages:
    return [{"role": "system", "content": options.system}] if options.system else []
