"""A tokenizer as a GGUF's metadata: vocabulary, merges or scores, kinds of tokens, template, and where text ends.

llama.cpp knows two families. Byte-level BPE (``gpt2``) needs merges and the *name* of a rule for cutting text before merging:
the rule is told by how the tokenizer cuts a list of tricky strings. SentencePiece (``llama``) needs a score for every
token, and merges whatever pair makes the token of the highest one; a tokenizer.json holds merges in that order instead,
so a token's score is the place of its first merge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.errors import ArtifactError, RequestError
from luthier.models.gguf_tokenizer import CONTROL, NORMAL, USER_DEFINED, rule_of

_UNKNOWN, _UNUSED, _BYTE = 2, 5, 6  # tokenizer.ggml.token_type
_SPACE = "▁"


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer.

    Raises:
        ArtifactError: it does not open, or has no form that could be written.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ArtifactError(f"its tokenizer does not open: {str(error).splitlines()[0]}", code="no-tokenizer", where=str(folder), remedy="Put the tokenizer's files beside the weights; a GGUF holds both.") from error  # fmt: skip
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not getattr(tokenizer, "backend_tokenizer", None):
        raise _not_written("it has no tokenizer.json form", folder)
    return tokenizer


def tokenizer_metadata(
    tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int, stops: Sequence[int]
) -> tuple[dict[str, Any], list[str]]:
    """The metadata, and what the user should know.

    Args:
        rows: of the embedding; the file names as many tokens.
        stops: the ids that end an answer, the most usual one first.

    Raises:
        RequestError: llama.cpp has no tokenizer of this kind.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise _not_written(f"its model is {model.get('type')}, and BPE is written", folder)
    notes: list[str] = []
    pieces, spaced = _pieces(content)
    if pieces:
        told, tokens, kinds = _sentencepiece(content, rows, spaced)
    else:
        told, tokens, kinds = _byte_level(tokenizer, content, rows, folder)
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= rows]
    if beyond:
        notes.append(f"{len(beyond)} tokens beyond the {rows} rows of the embedding are left out, such as {beyond[0]}.")
    if content.get("normalizer") and _normalises(content["normalizer"]):
        notes.append("The tokenizer brings text to Unicode's composed form first (NFC) and llama.cpp does not: text in another form is cut into other tokens.")  # fmt: skip
    told = {
        **told,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        **_special(tokenizer, stops, rows),
    }
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        others = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
        told |= others | (
            {"tokenizer.chat_templates": [name for name in template if name != "default"]} if others else {}
        )
        template = template.get("default")
    if template:
        told["tokenizer.chat_template"] = str(template)
    return told, notes


def _pieces(content: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether it is SentencePiece's form, and whether a space is put before a text."""
    if not content["model"].get("byte_fallback"):
        return False, False
    steps = [*_steps(content.get("normalizer")), *_steps(content.get("pre_tokenizer"))]
    spaced = any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    return True, spaced


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [step for each in inner for step in _steps(each)] if inner else [part]


def _normalises(part: Mapping[str, Any]) -> bool:
    return any(step["type"] in ("NFC", "NFKC", "NFD", "NFKD") for step in _steps(part))


def _listed(content: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Every row's token and kind; rows without a token get a name of their own."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = [_UNUSED] * rows
    for token, index in content["model"]["vocab"].items():
        if index < rows:
            tokens[index], kinds[index] = token, NORMAL
    for added in content["added_tokens"]:
        if added["id"] < rows:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _byte_level(
    tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any], rows: int, folder: Path
) -> tuple[dict[str, Any], list[str], list[int]]:
    rule = rule_of(tokenizer.backend_tokenizer)
    if rule is None:
        raise _not_written("it cuts text before merging by a rule that is not known here", folder)
    tokens, kinds = _listed(content, rows)
    merges = [" ".join(merge) for merge in _merges(content["model"])]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rule, "tokenizer.ggml.merges": merges}, tokens, kinds


def _sentencepiece(content: Mapping[str, Any], rows: int, spaced: bool) -> tuple[dict[str, Any], list[str], list[int]]:
    model = content["model"]
    tokens, kinds = _listed(content, rows)
    unknown = model["vocab"].get(model.get("unk_token"))
    for index, token in enumerate(tokens):
        if index == unknown:
            kinds[index] = _UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[index] = _BYTE
        elif kinds[index] == USER_DEFINED:
            tokens[index] = token.replace(_SPACE, " ")
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(_merges(model)):
        places.setdefault(left + right, place)
    last = -float(len(places) + len(model["merges"]))
    scores = [-float(places[token]) if token in places else last for token in tokens]
    told = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": spaced,
    }
    return told, tokens, kinds


def _special(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], rows: int) -> dict[str, Any]:
    named = {
        "bos": tokenizer.bos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        **dict(zip(("eos", "eot", "eom"), stops)),
    }
    told: dict[str, Any] = {f"tokenizer.ggml.{key}_token_id": value for key, value in named.items() if value is not None and value < rows}  # fmt: skip
    around = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    begins = around[0][: len(around[0]) - len(around[1])] if around[0][-len(around[1]) :] == around[1] else around[0]
    told["tokenizer.ggml.add_bos_token"] = bool(begins) and begins[0] == tokenizer.bos_token_id
    told["tokenizer.ggml.add_eos_token"] = around[0][-1:] == [tokenizer.eos_token_id] and around[0] != around[1]
    return told


def stop_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    """The ids that end an answer: the tokenizer's own first, then those of generation_config.json and config.json."""
    found: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        told = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        found += [told] if isinstance(told, int) else told or []
    return list(dict.fromkeys(found))


def _not_written(why: str, folder: Path) -> RequestError:
    return RequestError(
        f"this tokenizer cannot be written into a GGUF: {why}.",
        code="gguf-setting",
        where=str(folder),
        remedy="Serve the transformers folder instead, with vLLM for example.",
    )
