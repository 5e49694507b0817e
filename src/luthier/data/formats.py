"""What a record means: recognised by its columns, and brought into one of two forms.

A ``Conversation`` is rendered by the tokenizer's chat template; a ``Text`` is tokenised as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.data.offenders import SampleError
from luthier.errors import RequestError

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that make a format, in the order they are looked for."""
KNOWN_FIELDS = {
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "text",
    "system",
    "tools",
    "history",
}


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them.

    ``separator`` stands between the turns where there is no chat template; None if the data need one.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    separator: str | None = None


@dataclass(frozen=True)
class Text:
    """Plain text; ``whole`` is False for a portion that goes on in the next sample."""

    text: str
    whole: bool = True


def map_columns(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Rename a record's columns to our field names; raises SampleError for a column that is not there."""
    if not columns:
        return dict(values)
    missing = [column for column in columns.values() if column not in values]
    if missing:
        raise SampleError(f"has no column {missing[0]!r} (it has {_listed(values)})")
    taken = set(columns.values())
    renamed = {name: value for name, value in values.items() if name not in taken and name not in columns}
    renamed.update({ours: values[theirs] for ours, theirs in columns.items()})
    return renamed


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise RequestError for a field name that no format has."""
    for name in columns:
        if name not in KNOWN_FIELDS:
            raise RequestError(
                f"{name!r} is not a field that samples have.",
                code="unknown-field",
                where=f"data.columns.{name}",
                remedy=f"Left of the colon stands one of {', '.join(sorted(KNOWN_FIELDS))}; right of it your column.",
            )


def recognise(values: Mapping[str, Any]) -> str | None:
    """Name a record's format; "preference" for chosen and rejected answers, None if nothing fits."""
    if {"chosen", "rejected"} <= values.keys() or {"prompt", "completion", "label"} <= values.keys():
        return "preference"
    for name, needed in FIELDS.items():
        if all(field in values for field in needed):
            return name
    return None


def require_format(values: Mapping[str, Any], place: str) -> str:
    """Name the format of a source by its first record; raises RequestError if there is none that can be trained on."""
    name = recognise(values)
    if name == "preference":
        raise RequestError(
            f"{place} holds preference data (chosen and rejected answers), which `method: sft` cannot train on.",
            code="preference-data",
            where=place,
            remedy="To train on the chosen answers alone, map them: `data.columns: {messages: chosen}`, or "
            "`{prompt: prompt, completion: chosen}` where they are plain strings.",
        )
    if name is None:
        raise RequestError(
            f"{place} has the columns {_listed(values)}, which are no known format.",
            code="unknown-format",
            where=place,
            remedy="Known are messages; conversations; instruction and output; prompt and completion; text. Name yours "
            "with `data.columns`, e.g. {prompt: question, completion: answer}.",
        )
    return name


def convert(values: Mapping[str, Any], name: str, *, whole: bool = True) -> Conversation | Text:
    """Read a record as the format ``name``; raises SampleError saying what is wrong with it."""
    missing = [needed for needed in FIELDS[name] if values.get(needed) is None]
    if missing:
        other = recognise(values)
        if missing[0] in values:
            raise SampleError(f"has no value under {missing[0]!r}")
        found = (
            f"; it looks like {other}, while the source began as {name} (files of different formats go into `data.train` "
            "as a list, one source each)"
            if other not in (None, name)
            else ""
        )
        raise SampleError(f"has no {missing[0]!r} (it has {_listed(values)}){found}")
    if name == "text":
        return Text(_string(values["text"], "text"), whole)
    if name == "messages":
        return Conversation(read_messages(values["messages"]), read_tools(values.get("tools")))
    if name == "sharegpt":
        return _sharegpt(values)
    if name == "alpaca":
        return _alpaca(values)
    return _pair(values)


def _pair(values: Mapping[str, Any]) -> Conversation:
    prompt, completion = values["prompt"], values["completion"]
    tools = read_tools(values.get("tools"))
    if isinstance(prompt, list) or isinstance(completion, list):
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        after = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return Conversation(read_messages([*before, *after]), tools)
    system = _system(values)
    user = {"role": "user", "content": _string(prompt, "prompt")}
    answer = {"role": "assistant", "content": _string(completion, "completion")}
    return Conversation([*system, user, answer], tools, separator="")


def _alpaca(values: Mapping[str, Any]) -> Conversation:
    instruction = _string(values["instruction"], "instruction")
    extra = _string(values.get("input") or "", "input")
    messages = _system(values)
    for turn in values.get("history") or []:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise SampleError("has a 'history' that is no list of [question, answer] pairs")
        messages += [
            {"role": "user", "content": _string(turn[0], "history")},
            {"role": "assistant", "content": _string(turn[1], "history")},
        ]
    prompt = f"{instruction}\n{extra}" if extra else instruction
    messages += [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": _string(values["output"], "output")},
    ]
    return Conversation(messages, read_tools(values.get("tools")), separator="\n")


def _sharegpt(values: Mapping[str, Any]) -> Conversation:
    turns = _decoded(values["conversations"], "conversations")
    if not isinstance(turns, list):
        raise SampleError("has 'conversations' that are no list")
    messages = _system(values)
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise SampleError(f"turn {number} is no object with 'from' and 'value'")
        if "role" in turn:
            messages.append(turn)
            continue
        speaker = turn.get("from")
        if speaker not in SHAREGPT_ROLES or "value" not in turn:
            raise SampleError(
                f"turn {number} has {_listed(turn)} with from={speaker!r}; expected 'from' ({', '.join(SHAREGPT_ROLES)}) "
                "and 'value'"
            )
        messages.append(_sharegpt_turn(speaker, turn["value"]))
    return Conversation(read_messages(messages), read_tools(values.get("tools")))


def _sharegpt_turn(speaker: str, value: Any) -> Message:
    if speaker == "function_call":
        call = _decoded(value, "function_call")
        calls = call if isinstance(call, list) else [call]
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": each} for each in calls]}
    return {"role": SHAREGPT_ROLES[speaker], "content": value}


def _system(values: Mapping[str, Any]) -> list[Message]:
    return [{"role": "system", "content": _string(values["system"], "system")}] if values.get("system") else []


def read_messages(value: Any) -> list[Message]:
    """Check messages and bring them into the form templates expect; raises SampleError.

    Text parts are joined, arguments of tool calls given as JSON text are decoded, and keys without a value are left out.
    """
    messages = _decoded(value, "messages")
    if not isinstance(messages, list):
        raise SampleError(f"has 'messages' that are a {type(messages).__name__}, not a list")
    if not messages:
        raise SampleError("has no messages")
    return [_read_message(message, number) for number, message in enumerate(messages, start=1)]


def _read_message(message: Any, number: int) -> Message:
    if not isinstance(message, dict) or "role" not in message:
        raise SampleError(f"message {number} is no object with 'role' and 'content'")
    if message["role"] not in ROLES:
        raise SampleError(f"message {number} has the role {message['role']!r}; roles are {', '.join(ROLES)}")
    read = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in read:
        calls = _decoded(read["tool_calls"], "tool_calls")
        if not isinstance(calls, list):
            raise SampleError(f"message {number} has 'tool_calls' that are no list")
        read["tool_calls"] = [_read_call(call, number) for call in calls]
        if not read["tool_calls"]:
            del read["tool_calls"]
    if "content" not in read:
        if "tool_calls" not in read:
            raise SampleError(f"message {number} ({message['role']}) has no content")
        read["content"] = ""
    read["content"] = _read_content(read["content"], number)
    return read


def _read_content(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        other = [part.get("type") for part in content if not isinstance(part.get("text"), str)]
        if not other:
            return "".join(part["text"] for part in content)
        raise SampleError(f"message {number} has a part of type {other[0]!r}; only text can be trained on")
    raise SampleError(f"message {number} has a content that is a {type(content).__name__}, not a string")


def _read_call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SampleError(f"message {number} has a tool call without a function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError:
            raise SampleError(f"message {number} has a tool call whose arguments are not JSON") from None
    read = {**call} if "function" in call else {}
    return {"type": "function", **read, "function": {**function, "arguments": arguments}}


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a sample, decoded from JSON text where need be; None where there are none."""
    tools = _decoded(value, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise SampleError("has 'tools' that are no list of objects")
    return tools


def _decoded(value: Any, name: str) -> Any:
    """Decode JSON kept as text, as CSV and parquet files have it."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise SampleError(f"has '{name}' that are not JSON ({error})") from None


def _string(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise SampleError(f"has a {name!r} that is a {type(value).__name__}, not a string")


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in list(values)[:12]) or "none"
