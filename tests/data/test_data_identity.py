"""Data is known by what it is: by the meaning of the tokenizer and the content of the files, not by where either lies."""

from __future__ import annotations

import json

import pytest
from conftest import chat, run_config, write_lines
from tiny import make_gguf, make_tokenizer
from transformers import AutoTokenizer

from luthier.config.schema import ModelConfig
from luthier.data import prepare
from luthier.data.cache import tokenizer_digest
from luthier.models.open import open_tokenizer


def as_on_the_hub(folder):
    """Rewrite tokenizer.json as files on the hub have it: merges as one string each, compact, truncation set."""
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["merges"] = [" ".join(merge) for merge in values["model"]["merges"]]
    values["truncation"] = {"direction": "Right", "max_length": 100, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(values, separators=(",", ":")))
    return folder


@pytest.fixture
def samples(tmp_path):
    return write_lines(tmp_path / "data" / "a.jsonl", [chat("What is the capital?", "Paris."), chat("Help", "Sure")])


@pytest.mark.parametrize("kind", ["hub-style", "grown", "gguf"])
def test_saving_a_tokenizer_again_changes_neither_fingerprint_nor_cache(tmp_path, samples, kind):
    folder = tmp_path / "original"
    make_tokenizer(folder)
    if kind == "gguf":
        model = ModelConfig(path=str(make_gguf(tmp_path / "tiny.gguf")))
    else:
        model = ModelConfig(path=str(as_on_the_hub(folder)), new_tokens=["<|new|>", "word"] * (kind == "grown"))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    original = open_tokenizer(model)
    original.save_pretrained(tmp_path / "again")
    saved = AutoTokenizer.from_pretrained(tmp_path / "again")
    first, second = (prepare(run_config(samples), each, say=lambda line: None) for each in (original, saved))
    assert second.train.fingerprint == first.train.fingerprint
    assert not first.facts["warm"] and second.facts["warm"]


def test_padding_and_truncation_that_a_call_has_left_behind_do_not_count(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer(["one", "two three four"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before


@pytest.mark.parametrize("part", ["vocabulary", "merges", "normalizer", "added token", "template", "special token"])
def test_another_meaning_is_another_digest(tmp_path, part):
    folder = tmp_path / "one"
    make_tokenizer(folder)
    before = tokenizer_digest(AutoTokenizer.from_pretrained(folder))
    values = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    model = values["model"]
    if part == "vocabulary":
        first, second = list(model["vocab"])[-2:]
        model["vocab"][first], model["vocab"][second] = model["vocab"][second], model["vocab"][first]
    elif part == "merges":
        model["merges"] = model["merges"][:-1]
    elif part == "normalizer":
        values["normalizer"] = {"type": "NFC"}
    elif part == "added token":
        values["added_tokens"][1]["lstrip"] = True
    elif part == "special token":
        settings["eos_token"] = "<|pad|>"
    else:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer_digest(AutoTokenizer.from_pretrained(folder)) != before


def test_moved_data_is_the_same_data_and_names_its_new_place(tmp_path, tokenizer, samples):
    before = prepare(run_config(samples), tokenizer, say=lambda line: None).train
    (tmp_path / "elsewhere").mkdir()
    moved = samples.rename(tmp_path / "elsewhere" / "b.jsonl")
    after = prepare(run_config(moved), tokenizer, say=lambda line: None).train
    assert after.fingerprint == before.fingerprint
    assert after.place(1) == f"{moved}:2"
