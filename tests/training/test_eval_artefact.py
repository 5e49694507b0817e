"""Held-out samples measured as they are: with the tools they offer, and no more of them than asked for."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from tiny import CHATML, make_llama, make_tokenizer
from transformers import AutoModelForCausalLM

from luthier.config.schema import RunConfig
from luthier.data import prepare
from luthier.training.eval_artefact import evaluate_artefacts
from luthier.training.measure import Measurer

WITH_TOOLS = "{% for tool in tools or [] %}{{ tool.function.name + '\n' }}{% endfor %}" + CHATML


def tool(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object"}}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def data(tmp_path):
    """Five conversations: each with a tool of its own but the last."""
    path = tmp_path / "held-out.jsonl"
    with open(path, "w") as file:
        for number in range(5):
            said = [{"role": "user", "content": f"Question {number}"}, {"role": "assistant", "content": "Yes"}]
            file.write(
                json.dumps({"messages": said} | ({"tools": [tool(f"tool{number}")]} if number < 4 else {})) + "\n"
            )
    return path


class Opened:
    """A model with its tokenizer, and the first rows of text it was given to go on with."""

    def __init__(self, folder) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = make_tokenizer(template=WITH_TOOLS)
        self.prompts: list[str] = []
        self.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, arguments, values) -> None:
        if values.get("use_cache") and values["input_ids"].shape[1] > 1:
            self.prompts += self.tokenizer.batch_decode(values["input_ids"])

    def load(self, path, *, base=None):
        return self.model, self.tokenizer


def assert_each_with_its_tools(prompts: list[str]) -> None:
    assert len(prompts) == 5
    for number in range(5):
        (prompt,) = (prompt for prompt in prompts if f"Question {number}" in prompt)
        assert [f"tool{other}" in prompt for other in range(5)] == [other == number < 4 for other in range(5)]


def test_artefact_answers_each_sample_with_the_tools_it_offers(folder, data):
    opened = Opened(folder)
    evaluate_artefacts([str(folder)], str(data), metrics=["exact"], max_new_tokens=2, load=opened.load)
    assert_each_with_its_tools(opened.prompts)


def test_evaluation_during_training_answers_with_the_tools_too(folder, data):
    opened = Opened(folder)
    config = RunConfig.model_validate(
        {"model": "unused", "output": "unused", "data": {"train": str(data), "eval": str(data)}}
        | {"evaluate": {"generate": 5, "max_new_tokens": 2}}
    )
    prepared = prepare(config, opened.tokenizer, say=lambda line: None)
    measurer = Measurer(config, opened.tokenizer, prepared.eval, torch.device("cpu"))
    measurer.measure(opened.model, 0, lambda line: None)
    assert_each_with_its_tools(opened.prompts)


@pytest.mark.parametrize(("own", "limit", "expected"), [(None, 2, 2), (3, 2, 2), (2, 3, 2), (3, None, 3)])
def test_limit_holds_for_a_run_file_as_for_a_data_file(tmp_path, folder, data, own, limit, expected):
    run_file = tmp_path / "run.yaml"
    held_out = {"path": str(data)} | ({"limit": own} if own else {})
    run_file.write_text(
        yaml.safe_dump({"model": str(folder), "output": "unused", "data": {"train": str(data), "eval": held_out}})
    )
    load = Opened(folder).load
    assert evaluate_artefacts([str(folder)], str(run_file), limit=limit, load=load).samples == expected


def test_rows_are_no_longer_than_the_model_has_positions_for(tmp_path, folder):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one two three " * 200}]
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"messages": said}) + "\n")
    opened = Opened(folder)
    opened.tokenizer.model_max_length = 10**9
    lengths = []
    opened.model.register_forward_pre_hook(lambda _, __, v: lengths.append(v["input_ids"].shape[1]), with_kwargs=True)
    evaluate_artefacts([str(folder)], str(data), load=opened.load)
    assert lengths == [opened.model.config.max_position_embeddings]
