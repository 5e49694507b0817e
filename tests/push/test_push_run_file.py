"""`push:` in the run file: after the proof, and never at the run's cost."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading

import pytest
from fake_hub import TOKEN
from pushable import finished_run
from tiny import make_llama
from transformers import AutoModelForCausalLM

import luthier
from luthier import cli
from luthier.artifacts.manifest import verify
from luthier.config import chain
from luthier.config.read import parse_run
from luthier.errors import RequestError
from luthier.report.metrics import read_metrics
from luthier.training import pushing
from luthier.training.plan import plan


def run_file(tmp_path, **keys):
    base = make_llama(tmp_path / "base")
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five six"}]
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    return {"model": str(base), "data": {"train": str(data)}, "train": {"steps": 2, "batch_samples": 2}, "output": str(tmp_path / "run"), **keys}  # fmt: skip


@pytest.mark.slow
def test_the_proven_result_is_pushed_and_opens_as_it_comes_back(hub, tmp_path):
    said: list[str] = []
    asked_when_proven = None

    def say(text):
        nonlocal asked_when_proven
        said.append(text)
        if text.startswith("proof: "):
            asked_when_proven = list(hub.asked)

    run = luthier.train(run_file(tmp_path, push={"id": "me/model", "revision": "trained"}), say=say)
    assert asked_when_proven == []  # training itself asks no hub for anything
    proven, pushed = (next(i for i, text in enumerate(said) if text.startswith(word)) for word in ("proof: ", "pushed: "))  # fmt: skip
    assert proven < pushed and "checksums" in said[pushed]
    assert str(tmp_path) not in (run.final / "README.md").read_text()
    folder = hub.download("me/model", tmp_path / "again", "trained")
    assert verify(folder)[1] == []
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert model.num_parameters() > 0
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    assert any("pushed: " in record.get("message", "") for record in run.metrics)
    assert "pushed: " in (run.path / "report.html").read_text()
    made = luthier.push(f"{run.path}@newest", "me/newest")
    assert made.proof is None and "model.safetensors" in hub.repos["me/newest"].files()


@pytest.mark.slow
def test_a_push_that_fails_costs_the_run_nothing_and_names_the_command_that_does_it(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said: list[str] = []
    keys = {"id": "me/model", "private": False, "base": "owner/base"}
    run = luthier.train(run_file(tmp_path, adapter={"type": "lora", "r": 2}, push=keys), say=said.append)
    assert run.proof["verdict"] == "passed" and not hub.asked
    assert said[0].startswith("push: you are not logged in")
    message = [record["message"] for record in read_metrics(run.path / "metrics.jsonl") if record["kind"] == "note"][-1]
    assert message.startswith("not pushed: ") and "hf auth login" in message
    assert message in said and "not pushed: " in (run.path / "report.html").read_text()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = shlex.split(message.partition("Push it with: ")[2])
    assert cli.main(words[1:]) == 0
    files = hub.repos["me/model"].files()
    assert not hub.repos["me/model"].private
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    again: list[str] = []
    luthier.train(run_file(tmp_path, adapter={"type": "lora", "r": 2}, push=keys), say=again.append)
    assert any("luthier push" in text for text in again)  # a finished run says how, and sends nothing by itself
    assert len(hub.repos["me/model"].messages) == 1


def test_a_base_without_a_name_on_the_hub_is_refused_before_the_training(tmp_path):
    given = run_file(tmp_path, adapter="lora", push="me/model")
    with pytest.raises(RequestError) as error:
        luthier.train(given)
    assert error.value.code == "base-is-a-path" and error.value.where == "push.base"
    assert not (tmp_path / "run").exists()
    with pytest.raises(RequestError):
        plan(parse_run(given))


@pytest.mark.parametrize("wrong", ["model", {"id": "me/my model"}, {"private": True}, {"id": "me/model", "token": "x"}, {"id": "me/model", "endpoint": "https://x"}])  # fmt: skip
def test_a_wrong_push_is_found_while_the_run_file_is_read(tmp_path, wrong):
    with pytest.raises(RequestError) as error:
        parse_run(run_file(tmp_path, push=wrong))
    assert "push" in str(error.value)


def test_plan_says_that_there_is_no_login(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    config = parse_run(run_file(tmp_path, push="me/model"))
    assert "hf auth login" in str(plan(config)) and not hub.asked
    assert config.push is not None and config.push.private
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pushing.check(config) == []


def test_an_adapter_that_will_rest_on_the_run_s_own_base_is_a_note(hub, tmp_path):
    base = {"path": str(make_llama(tmp_path / f"models--owner--base/snapshots/{'a' * 40}")), "new_tokens": ["<x>"]}
    given = {**run_file(tmp_path, adapter="lora", push="me/model"), "model": base}
    assert "base/" in pushing.check(parse_run(given))[0]
    given["push"] = {"id": "me/model", "base": "me/base"}
    assert pushing.check(parse_run(given)) == []


def test_an_interrupt_ends_the_upload_and_not_the_run(hub, tmp_path):
    run = finished_run(tmp_path / "run")
    hub.hold((run / "final/adapter_model.safetensors").read_bytes())
    config = parse_run({**run_file(tmp_path / "other"), "push": "me/model"})

    def interrupt():
        hub.arrived.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    said: list[str] = []
    pushing.push_final(config, run, 4, said.append)
    assert "interrupted" in said[-1] and f"luthier push {run / 'final'} me/model" in said[-1]
    assert read_metrics(run / "metrics.jsonl")[-1]["message"] == said[-1]


def test_of_several_stages_the_last_one_is_pushed(tmp_path):
    given = run_file(tmp_path, push="me/model", adapter={"type": "lora", "r": 2})
    stages = [{"name": "a"}, {"name": "b", "adapter": {"then": "continue"}}]
    first, last = chain.parse({**given, "stages": stages}, ["push.private=false"]).stages
    assert first.config.push is None and last.config.push.id == "me/model" and not last.config.push.private
    own, _ = chain.parse({**given, "stages": [{"name": "a", "push": "me/first"}, stages[1]]}).stages
    assert own.config.push.id == "me/first"
