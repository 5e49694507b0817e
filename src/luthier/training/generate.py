"""Answers of a model: greedy and in batches for measuring, piece by piece for talking.

Both stop where the model was taught to stop: at the ends its generation config and tokenizer name, and at the token
that closes an assistant's turn in the chat template, which is often neither. The model's own generation config is not
used otherwise, so that a sampling temperature in it does not change what is measured; nothing of the model is changed.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from luthier.data.offenders import SampleError
from luthier.data.template import ChatTemplate, encode_texts, end_token
from luthier.errors import RequestError
from luthier.training.evaluate import evaluation_mode

Messages = list[dict[str, Any]]


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    *,
    max_new_tokens: int,
    tools: Sequence[list[dict[str, Any]] | None] | None = None,
    batch: int = 16,
) -> list[str]:
    """The model's most likely answer to each conversation, without special tokens, in the order given.

    Conversations of similar length run together, padded on the left. No random number is drawn; modes of modules,
    generation config and padding side are as before afterwards.

    Args:
        model: a transformers model or a peft model around one.
        conversations: messages up to the last user's; `tools` are those offered in each.
        max_new_tokens: longest answer, its end token included.

    Raises:
        RequestError: a conversation is empty, or cannot be written in the tokenizer's chat template.
    """
    prompts = prompt_ids(tokenizer, conversations, tools)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    stops = stop_ids(model, tokenizer)
    pad = _pad_id(tokenizer, stops)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=pad, use_cache=True
    )
    found = [""] * len(prompts)
    with evaluation_mode(model), _generation_config(model, config):
        for start in range(0, len(order), batch):
            indices = order[start : start + batch]
            rows = [prompts[index] for index in indices]
            longest = max(len(row) for row in rows)
            input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            device = next(model.parameters()).device
            output = model.generate(
                input_ids=input_ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
            for index, row in zip(indices, output[:, longest:].tolist(), strict=True):
                found[index] = tokenizer.decode(_until(row, stops), skip_special_tokens=True)
    return found


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Generator[str, None, None]:
    """The answer to a conversation, in pieces as they are made; closing the iterator stops the model.

    Args:
        temperature: 0 takes the most likely token; otherwise tokens are drawn from the distribution sharpened by it.

    Raises:
        RequestError: as `answers` does, or the conversation leaves no room in the model's context.
    """
    (row,) = prompt_ids(tokenizer, [messages], None)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(row) >= limit:
        raise RequestError(
            f"the conversation has {len(row)} tokens, and the model's context ends at {limit}.",
            code="context-full",
            remedy="Start afresh (/reset), or ask more briefly.",
        )
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(row))
    stops = stop_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        top_k=0 if temperature > 0 else None,
        max_new_tokens=room,
        eos_token_id=stops or None,
        pad_token_id=_pad_id(tokenizer, stops),
        use_cache=True,
    )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        device = next(model.parameters()).device
        ids = torch.tensor([row], device=device)
        try:
            with evaluation_mode(model), _generation_config(model, config):
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Asked(stop)]),
                )
        except BaseException as error:  # handed to the thread that reads, which raises it
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, name="luthier-answer", daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Messages],
    tools: Sequence[list[dict[str, Any]] | None] | None,
) -> list[list[int]]:
    """Token ids of each conversation in the chat template, up to where the assistant's answer begins."""
    template = ChatTemplate(tokenizer)
    texts = []
    for index, messages in enumerate(conversations):
        if not messages:
            raise RequestError(
                "there is nothing to answer: the sample is plain text, or begins with the assistant's turn.",
                code="nothing-to-answer",
                where="evaluate.generate",
                remedy="Set evaluate.generate: 0, or hold out conversations that begin with a question.",
            )
        try:
            texts.append(template.render(messages, tools[index] if tools else None, prompt=True))
        except SampleError as error:
            raise RequestError(
                f"a conversation {error}.",
                code="template-refused",
                where="model.template",
                remedy="Mend the conversation, or choose another template with model.template.",
            ) from error
    return [ids.tolist() for ids, _, _ in encode_texts(tokenizer, texts)]


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, sorted."""
    named = getattr(model.generation_config, "eos_token_id", None)
    found = set(named if isinstance(named, list) else [named])
    found.add(tokenizer.eos_token_id)
    found.add(end_token(tokenizer))
    return sorted(found - {None})


def _pad_id(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    """What fills rows; masked, so that any token would do."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return stops[0] if stops else 0


def _until(row: list[int], stops: list[int]) -> list[int]:
    ends = [index for index, token in enumerate(row) if token in stops]
    return row[: ends[0]] if ends else row


@contextmanager
def _generation_config(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Put a generation config in the place of the model's own for a while.

    Given as an argument only, transformers would fill it up with the model's sampling values and penalties.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own


class _Asked(StoppingCriteria):
    """Ends generation once somebody has asked for it."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
