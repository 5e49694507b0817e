"""Conversations as token ids with an exact loss mask; the tokenizer's own Jinja template is the only truth.

What the assistant says is found in the rendered text as character spans, then carried over to tokens by the
tokenizer's offsets. With ``{% generation %}`` markers the template says itself where the spans are. Without, a span
begins where the rendering of the messages before it, with generation prompt, ends; and it ends with the turn's end
token. Both are verified against the full rendering. Templates that render an earlier turn differently once others
follow (dropping its reasoning, say) are not prefixes of themselves; there, a stand-in text in place of a message's
content shows where its neighbours begin.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.data.formats import Conversation, Message
from luthier.data.offenders import SampleError
from luthier.errors import RequestError

TrainOn = Literal["assistant", "last", "all"]
Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]
Span = tuple[int, int]
_MARKED = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")
_STAND_IN = "Qx7STANDINx7Q"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the character spans that the assistant wrote."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """Renders and tokenises conversations with one tokenizer.

    Raises RequestError if the tokenizer has no chat template or cannot say which characters a token stands for.
    """

    def __init__(self, tokenizer: Any) -> None:
        require_offsets(tokenizer)
        if not tokenizer.chat_template:
            raise RequestError(
                "The data holds conversations, and the tokenizer has no chat template to write them with.",
                code="no-template",
                where="model.template",
                remedy="Set `model.template: chatml`, or the path to a Jinja file: `model.template: path.jinja`.",
            )
        self._tokenizer = tokenizer
        self._control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, self._control)) or r"(?!)")
        self.end_of_turn = self._find_end_of_turn()
        """What the template writes behind an answer, up to and with the end token; empty if it writes none."""
        hello = [{"role": "user", "content": "Hello"}]
        self._asks = self._try_render(hello, None, prompt=True) != self._try_render(hello, None)

    def encode(self, conversations: Sequence[Conversation], train_on: TrainOn) -> list[Encoded | SampleError]:
        """Return (ids int32, mask bool) for each conversation, or the error that says why it cannot be used."""
        results: list[Encoded | SampleError] = []
        rendered: list[Rendered] = []
        places: list[int] = []
        for conversation in conversations:
            try:
                rendered.append(self.render_with_spans(conversation, train_on))
            except SampleError as error:
                results.append(error)
                continue
            places.append(len(results))
            results.append(_NOTHING)
        encoded = encode_texts(self._tokenizer, [each.text for each in rendered])
        for place, (ids, starts, ends), each in zip(places, encoded, rendered, strict=True):
            mask = np.full(len(ids), train_on == "all")
            for start, end in each.spans if train_on != "all" else []:
                # A token across the border belongs to the assistant if it holds any of its text.
                mask[np.searchsorted(ends, start, side="right") : np.searchsorted(starts, end, side="left")] = True
            results[place] = (ids, mask)
        return results

    def render(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, prompt: bool = False) -> str:
        """Return the template's text for messages; ``prompt`` adds what asks for the next answer."""
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            raise SampleError(f"is refused by the chat template ({error})") from None

    def render_with_spans(self, conversation: Conversation, train_on: TrainOn) -> Rendered:
        """Return a conversation's text and what in it is to be trained; raises SampleError."""
        messages, tools = conversation.messages, conversation.tools
        template = self._tokenizer.get_chat_template(None, tools)
        if train_on == "all":
            text = self.render(messages, tools)
            self._check_tools(messages, tools)
            return Rendered(text, [])
        if _MARKED.search(template):
            text, spans = self._marked(messages, tools, template)
        else:
            text = self.render(messages, tools)
            spans = self._found(text, messages, tools)
        self._check_tools(messages, tools)
        return Rendered(text, spans[-1:] if train_on == "last" else spans)

    def _marked(self, messages: list[Message], tools: Any, template: str) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            raise SampleError(f"is refused by the chat template ({error})") from None
        (text,), (marked,) = rendered
        return text, [(start, self._end_after(text, start, end)) for start, end in marked if end > start]

    def _end_after(self, text: str, start: int, end: int) -> int:
        """Move a marked span's end to just behind the end token, which authors of templates mark or leave out."""
        if self.end_of_turn and text.startswith(self.end_of_turn, end):
            return end + len(self.end_of_turn)
        return self._behind_last_control(text, start, end) or end

    def _behind_last_control(self, text: str, start: int, end: int) -> int | None:
        """Return the end of the last control token in a stretch if only white space follows it."""
        last = None
        for match in self._control_pattern.finditer(text, start, end):
            last = match.end()
        return last if last is not None and not text[last:end].strip() else None

    def _found(self, text: str, messages: list[Message], tools: Any) -> list[Span]:
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._turn_start(text, messages, tools, index)
            end = self._turn_end(text, messages, tools, index, start)
            if end <= start or (spans and start < spans[-1][1]):
                raise _not_found(index)
            spans.append((start, end))
        return spans

    def _turn_start(self, text: str, messages: list[Message], tools: Any, index: int) -> int:
        before = self._try_render(messages[:index], tools, prompt=True) if index else None
        follows = before is not None and text.startswith(before)
        if follows and self._asks:
            return len(before or "")
        header = self._up_to_content(messages, tools, index)
        if header is not None and text.startswith(header):
            # A template that writes nothing to ask for an answer leaves the space before it to the model.
            return len(header) if self._asks else len(header.rstrip())
        if follows and header is None and messages[index].get("tool_calls"):  # some show calls in place of the content
            return len(before or "")
        raise _not_found(index)

    def _turn_end(self, text: str, messages: list[Message], tools: Any, index: int, start: int) -> int:
        if self.end_of_turn and not messages[index].get("tool_calls") and not self._said(messages[index]):
            first = text.find(self.end_of_turn, start)
            if first >= 0 and not self._control_pattern.search(text, start, first):
                return first + len(self.end_of_turn)
        if index == len(messages) - 1:
            limit, exact = len(text), True
        else:
            through = self._try_render(messages[: index + 1], tools)
            exact = through is not None and text.startswith(through)
            if through is not None and exact:
                limit = len(through)
            else:
                following = self._up_to_content(messages, tools, index + 1)
                if following is None:
                    raise _not_found(index)
                limit = _common_prefix(following, text)
        end = text.rfind(self.end_of_turn, start, limit) if self.end_of_turn else -1
        behind = end + len(self.end_of_turn)
        if end >= 0 and (not exact or not self._control_pattern.sub("", text[behind:limit]).strip()):
            return behind
        behind_control = self._behind_last_control(text, start, limit) if exact else None
        if behind_control is not None:
            return behind_control
        if not self.end_of_turn and exact:
            return start + len(text[start:limit].rstrip())
        raise _not_found(index)

    def _said(self, message: Message) -> bool:
        """Whether a message's own text holds what the template ends a turn with."""
        return any(self.end_of_turn in value for value in message.values() if isinstance(value, str))

    def _up_to_content(self, messages: list[Message], tools: Any, index: int) -> str | None:
        """Return the rendering of the whole conversation up to one message's content; None if it shows nowhere."""
        replaced = [*messages]
        replaced[index] = {**messages[index], "content": _STAND_IN}
        rendered = self._try_render(replaced, tools)
        if rendered is None or _STAND_IN not in rendered:
            return None
        return rendered[: rendered.index(_STAND_IN)]

    def _check_tools(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> None:
        """Raise SampleError if the template leaves out what a sample says about tools, as templates without tools do."""
        called = [call["function"]["name"] for message in messages for call in message.get("tool_calls", [])]
        if not called and not tools:
            return
        renamed = [
            {**message, "tool_calls": [_renamed(call) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in messages
        ]
        rendered = self._try_render(renamed, None) if called else None
        if rendered is not None and rendered.count(_STAND_IN) < len(called):
            raise _left_out("tool calls", called[0])
        offered = [_renamed(tool) for tool in tools or []]
        rendered = self._try_render(messages, offered) if offered else None
        if rendered is not None and _STAND_IN not in rendered:
            raise _left_out("tools", str((tools or [{}])[0].get("function", {}).get("name")))

    def _try_render(self, messages: list[Message], tools: Any, *, prompt: bool = False) -> str | None:
        """Render part of a conversation; None if the template refuses it, as some do where no user speaks."""
        try:
            return self.render(messages, tools, prompt=prompt)
        except SampleError:
            return None

    def _find_end_of_turn(self) -> str:
        rendered = self._try_render(
            [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _STAND_IN}], None
        )
        if rendered is None or _STAND_IN not in rendered:
            return ""
        tail = rendered[rendered.rindex(_STAND_IN) + len(_STAND_IN) :]
        match = self._control_pattern.search(tail)
        return tail[: match.end()] if match and not tail[: match.start()].strip() else ""


def end_token(tokenizer: Any) -> int | None:
    """Return the id of the control token that ends an assistant's turn; None where the template writes none.

    What an answer is taught to end with is what generation has to stop at, and is often not the tokenizer's end token.
    """
    if not tokenizer.chat_template or not tokenizer.is_fast:
        return None
    ids = tokenizer(ChatTemplate(tokenizer).end_of_turn, add_special_tokens=False)["input_ids"]
    # An ordinary word would cut answers short.
    return ids[-1] if ids and ids[-1] in tokenizer.get_added_vocab().values() else None


_NOTHING: Encoded = (np.empty(0, np.int32), np.empty(0, np.bool_))


def _not_found(index: int) -> SampleError:
    return SampleError(
        f"message {index + 1} (assistant) cannot be found in what the chat template makes of the conversation; mark the "
        "answers in the template with {% generation %}, or set `data.train_on: all`"
    )


def _renamed(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool, or a call of one, with a stand-in for its name."""
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": {**tool["function"], "name": _STAND_IN}}
    return {**tool, "name": _STAND_IN}


def _left_out(what: str, name: str) -> SampleError:
    return SampleError(
        f"has {what} ({name}), which the chat template does not write; set `model.template` to one that does"
    )


def _common_prefix(one: str, other: str) -> int:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def require_offsets(tokenizer: Any) -> None:
    """Raise RequestError if the tokenizer cannot say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError(
            f"The tokenizer ({type(tokenizer).__name__}) cannot say which characters a token stands for, which the "
            "loss mask needs.",
            code="slow-tokenizer",
            where="model.path",
            remedy="Use a base with a tokenizer.json file; transformers writes one when it saves a fast tokenizer.",
        )


def encode_texts(
    tokenizer: Any, texts: Sequence[str]
) -> list[tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]]:
    """Tokenise texts as they stand, in parallel: for each its ids, and where each token's characters start and end."""
    if not texts:
        return []
    encodings = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    results = []
    for ids, offsets in zip(encodings["input_ids"], encodings["offset_mapping"], strict=True):
        pairs = np.asarray(offsets, np.int64).reshape(-1, 2)
        results.append((np.asarray(ids, np.int32), pairs[:, 0], pairs[:, 1]))
    return results
