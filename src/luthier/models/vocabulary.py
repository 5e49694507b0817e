"""Tokens added to a vocabulary, and the embedding rows that they get."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.errors import RequestError

_CONTROL = re.compile(r"<\|.+\|>")


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> tuple[int, ...]:
    """Adds tokens to the tokenizer and returns the ids of those that are new, in order.

    A token written as `<|name|>` is a control token: decoding can leave it out. Any other is plain text.
    """
    if any(not token for token in tokens):
        raise RequestError("a new token is empty.", code="bad-token", where="model.new_tokens", remedy="Remove it.")
    if not tokens:
        return ()  # listing a large vocabulary takes a tenth of a second
    known = tokenizer.get_vocab()
    fresh = [token for token in dict.fromkeys(tokens) if token not in known]
    for token in fresh:
        special = _CONTROL.fullmatch(token) is not None
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
    return tuple(tokenizer.convert_tokens_to_ids(fresh))


def make_rows(model: PreTrainedModel, ids: Sequence[int]) -> bool:
    """Gives each new token the mean row of the vocabulary, in embeddings and head; says whether the vocabulary grew.

    Many models have more rows than tokens; then nothing grows. The mean is deterministic, and a token that starts
    there gets about the average logit (transformers would draw it at random around the mean).
    """
    if not ids:
        return False
    rows = model.get_input_embeddings().weight.shape[0]
    old = [row for row in range(rows) if row not in set(ids)]
    grown = max(ids) >= rows
    if grown:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        weights = {id(layer.weight): layer.weight for layer in _vocabulary_layers(model)}
        for weight in weights.values():
            weight[list(ids)] = weight[old].float().mean(dim=0).to(weight.dtype)
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias[list(ids)] = bias[old].float().mean().to(bias.dtype)
    return grown


def _vocabulary_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer for layer in layers if layer is not None]
