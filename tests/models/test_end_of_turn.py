"""A saved model stops where its template ends an assistant's turn, without anything of this library at hand."""

from __future__ import annotations

import json

import pytest
from tiny import CHATML, END, make_llama, make_tokenizer
from transformers import AddedToken, GenerationConfig

from luthier.checkpoint.small_files import small_files
from luthier.config.schema import ModelConfig
from luthier.models.open import open_base

LLAMA_3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"

SHAPES = {
    "llama-3": (LLAMA_3, "<|begin|>", "<|end|>", ["<|end|>", "<|eot_id|>"]),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<eos>", "<end_of_turn>"]),
    "chatml": (CHATML, None, "<|endoftext|>", ["<|endoftext|>", END]),
    "llama-2": (LLAMA_2, "<s>", "</s>", ["</s>"]),
    "plain": (PLAIN, None, "</s>", ["</s>"]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_generation_config_names_the_token_that_ends_a_turn(tmp_path, shape):
    template, begin, end, expected = SHAPES[shape]
    folder = make_llama(tmp_path / "base", vocab=340, tokenizer=False)
    GenerationConfig().save_pretrained(folder)
    tokenizer = make_tokenizer(template=template)
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in [*names, end, *([begin] if begin else [])]])
    tokenizer.eos_token = end
    if begin:
        tokenizer.bos_token = begin
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    base = open_base(ModelConfig(path=str(folder), precision="fp32"))
    saved = json.loads(small_files(base.model, base.tokenizer)["generation_config.json"])["eos_token_id"]
    named = saved if isinstance(saved, list) else [saved]
    assert sorted(tokenizer.convert_ids_to_tokens(named)) == sorted(expected)
