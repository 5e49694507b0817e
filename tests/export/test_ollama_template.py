"""Chat templates in Ollama's language."""

import re

import pytest
import tiny

from luthier.export.gguf.ollama_template import ollama_template

DEFAULTED = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + tiny.CHATML
)
TRIMMED = tiny.CHATML.replace("message['content']", "message['content'] | trim")
IN_THE_USERS_TURN = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.s = m['content'] %}"
    "{% else %}{{ '<' + m['role'] + '>' + ns.s + m['content'] + '\n' }}{% set ns.s = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few forms that are written: a reading of its own."""
    found = re.fullmatch(
        r"({{ if not \.System }}(?P<default>.*?){{ end }})?{{ range \.Messages }}{{ (?P<branches>.*?){{ end }}{{ end }}(?P<asks>.*)",
        template,
        flags=re.S,
    )
    assert found is not None
    branches = dict(re.findall(r'if eq \.Role "(\w+)" }}(.*?)(?={{ else |\Z)', found["branches"], flags=re.S))
    body = "".join(branches[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages)
    system = any(message["role"] == "system" for message in messages)
    return ("" if system else found["default"] or "") + body + found["asks"]


@pytest.mark.parametrize("template", [tiny.CHATML, DEFAULTED, TRIMMED], ids=["chatml", "default system", "trimmed"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_it_renders_what_the_tokenizer_renders(template, system):
    tokenizer = tiny.make_tokenizer(template=template)
    messages = [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "你好"},
    ]
    written = ollama_template(tokenizer)
    assert written is not None
    assert go(written, messages) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [None, IN_THE_USERS_TURN, "{{ raise_exception('no') }}", tiny.CHATML.replace("<|im_end|>", "{{ '{{' }}")],
    ids=["none", "system in the user's turn", "refuses", "braces"],
)
def test_template_of_another_form_is_not_guessed(template):
    assert ollama_template(tiny.make_tokenizer(template=template)) is None
