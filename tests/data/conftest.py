"""Real small files, real tokenizers, and a cache of each test's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_tokenizer

from luthier.config.schema import RunConfig
from luthier.data import prepare


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_lines(path: Path, samples: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8")
    return path


def run_config(train, *, method: str = "sft", rows: dict | None = None, **data) -> RunConfig:
    values = {
        "model": "unused",
        "output": "unused",
        "method": method,
        "data": {"train": train if isinstance(train, list | dict) else str(train), **data},
        "train": {"max_length": 128, **(rows or {})},
    }
    return RunConfig.model_validate(values)


@pytest.fixture
def prepared(tokenizer):
    """Prepare data the way `train` does; returns what it returns and keeps what it says in `.said`."""

    def call(train, *, with_tokenizer=None, **options):
        call.said = []
        return prepare(run_config(train, **options), with_tokenizer or tokenizer, say=call.said.append)

    return call
