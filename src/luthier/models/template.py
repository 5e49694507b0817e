"""The chat template and the padding token: what a tokenizer needs to serve for training."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from luthier.errors import RequestError

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML without a system message of its own. It has no generation markers: only transformers knows those."""

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_PAD_NAMES = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "<PAD>",
    "[PAD]",
    "<|padding|>",
    "<|endoftext|>",
    "<unk>",
)
_RESERVED = ("<|reserved", "<reserved", "<|extra", "<unused", "[unused", "<|dummy")


def set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Sets the chat template: `chatml`, or the text of a Jinja file.

    Raises:
        RequestError: the file is missing or no valid Jinja, or ChatML's tokens are not single tokens here.
    """
    if template == "chatml":
        known = tokenizer.get_vocab()
        absent = [token for token in CHATML_TOKENS if token not in known]
        if absent:
            raise RequestError(
                f"chatml marks turns with {' and '.join(absent)}, which the tokenizer does not have.",
                code="template-tokens",
                where="model.template",
                remedy=f"Add them: model.new_tokens: [{', '.join(chr(34) + token + chr(34) for token in absent)}].",
            )
        tokenizer.chat_template = CHATML
        return
    path = Path(template).expanduser()
    if not path.is_file():
        raise RequestError(
            f"there is no file {path}.",
            code="no-such-file",
            where="model.template",
            remedy="Give `chatml`, or the path of a Jinja file.",
        )
    text = path.read_text(encoding="utf-8")
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_markers(text))
    except TemplateSyntaxError as error:
        raise RequestError(
            f"{path}, line {error.lineno}: {error.message}.",
            code="broken-template",
            where="model.template",
            remedy="Mend the template.",
        ) from error
    tokenizer.chat_template = text


def set_padding(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Pads on the right, with a token that exists already; returns a sentence if one had to be chosen.

    Targets are masked by position, so even the end token may pad; the vocabulary is never resized for it.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is not None:
        return None
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    reserved = sorted((token for token in special if token.startswith(_RESERVED)), key=vocabulary.__getitem__)
    candidates = [name for name in _PAD_NAMES if name in special and name != tokenizer.eos_token]
    token = next(iter([*candidates, *reserved]), None) or tokenizer.eos_token
    if token is None:
        raise RequestError(
            "the tokenizer has neither a padding token nor an end token.",
            code="no-end-token",
            where="model.path",
            remedy="Set eos_token in its tokenizer_config.json; without one, generation would not stop either.",
        )
    tokenizer.pad_token = token
    return f"The tokenizer names no padding token; {token} (id {tokenizer.pad_token_id}) pads."


def _without_markers(text: str) -> str:
    """Transformers' own generation markers, which plain Jinja does not know, taken out for the syntax check."""
    for marker in ("generation", "endgeneration"):
        for left in ("{%", "{%-", "{%+"):
            for right in ("%}", "-%}"):
                text = text.replace(f"{left} {marker} {right}", "").replace(f"{left}{marker}{right}", "")
    return text
