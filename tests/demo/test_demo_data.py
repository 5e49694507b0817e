"""The bundled data set: reproducible, decidable from its text, and its held-out part really held out."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT / "src" / "luthier" / "demo"
NUMBER = re.compile(r"\b[A-Z]\d{3}\b")


def load(name: str) -> list[tuple[str, str, dict]]:
    """System message, user message and the object of each sample."""
    samples = []
    for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        system, user, assistant = json.loads(line)["messages"]
        assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
        samples.append((system["content"], user["content"], json.loads(assistant["content"])))
    return samples


@pytest.fixture
def maker(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_demo_data", ROOT / "tools" / "make_demo_data.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_script_gives_the_files_byte_for_byte(maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "FOLDER", tmp_path)
    maker.main()
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_answers_are_compact_objects_that_can_be_read_off_the_message(name):
    for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        message, answer = (turn["content"] for turn in json.loads(line)["messages"][1:])
        found = json.loads(answer)
        assert answer == json.dumps(found, separators=(",", ":"))
        assert list(found) == ["intent", "order"]
        assert NUMBER.findall(message) == ([found["order"]] if found["order"] else [])


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_no_field_has_a_value_that_is_nearly_always_right(name):
    objects = [found for _, _, found in load(name)]
    intents = Counter(found["intent"] for found in objects)
    assert len(intents) == 6
    assert max(intents.values()) < 0.25 * len(objects)
    assert 0.25 < sum(found["order"] is None for found in objects) / len(objects) < 0.6


def test_held_out_messages_share_no_wording_with_training(maker):
    def wording(part) -> set[str]:
        texts = {text for requests in part.requests.values() for text in requests} | set(part.closings)
        return (texts | set(part.products) | {str(number) for number in part.numbers}) - {""}

    assert not wording(maker.TRAIN) & wording(maker.HELDOUT)
    assert not {message for _, message, _ in load("train")} & {message for _, message, _ in load("heldout")}


def test_sizes_fit_a_demo_of_three_minutes():
    train, held_out = load("train"), load("heldout")
    assert 240 <= len(train) <= 320
    assert 40 <= len(held_out) <= 80
    assert max(len(message) for _, message, _ in train + held_out) < 160


def test_every_sample_has_the_system_message_that_the_next_command_uses():
    from luthier.demo.run import SYSTEM

    assert {system for system, _, _ in load("train") + load("heldout")} == {SYSTEM}
