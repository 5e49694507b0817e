"""What is odd about the data is said when training starts, not only by those who ask."""

from __future__ import annotations

import json

import torch
from tiny import make_llama

from luthier.config.read import parse_run
from luthier.training.session import Session


def _write(path, questions) -> str:
    with open(path, "w") as file:
        for question in questions:
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": question and "Yes"}]
            file.write(json.dumps({"messages": said}) + "\n")
    return str(path)


def _notes(folder, training, held_out) -> list[str]:
    config = {
        "model": {"path": str(make_llama(folder / "base")), "precision": "fp32"},
        "data": {"train": _write(folder / "a.jsonl", training), "eval": _write(folder / "b.jsonl", held_out)},
        "output": str(folder / "run"),
    }
    (folder / "run").mkdir()
    session = Session(parse_run(config), folder / "run", torch.device("cpu"), None, (), lambda line: None)
    session.data()
    return session.notes


def test_duplicates_empty_samples_and_held_out_ones_trained_on_are_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notes = "\n".join(_notes(tmp_path, ["Who", "What", "", "Who", "Who"], ["What", "Where"]))
    assert "2 samples are duplicates of others" in notes
    assert "1 empty samples left out" in notes
    assert "1 evaluation samples are also trained on" in notes


def test_nothing_is_said_where_nothing_is_odd(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notes = "\n".join(_notes(tmp_path, ["Who", "What"], ["Where"]))
    assert "duplicates" not in notes and "empty" not in notes and "also trained on" not in notes
