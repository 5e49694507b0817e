"""Several stages in one run file: their order, where they write, what is not run again, and what is wrong with any of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from stages_harness import Home, logits, unproven

import luthier
from luthier import cli
from luthier.artifacts import manifest as manifests
from luthier.artifacts.identify import identify
from luthier.artifacts.run_folder import folder_of, published
from luthier.config import chain as chains


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


def file(home: Home, *stages: dict, **more) -> Path:
    values = {**home.file("out", train={"steps": 3}, **more), "stages": list(stages)}
    path = home.folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


THREE = (
    {"name": "first"},
    {"adapter": {"then": "continue"}, "optim": {"lr": 0.005}},
    {"name": "last", "adapter": {"then": "stack", "r": 2}, "train": {"steps": 2}},
)


def train(home: Home, path: Path, *overrides: str) -> luthier.Run:
    home.said.clear()
    with unproven():
        found = chains.read(path, list(overrides))
        from luthier.training.run import train_chain

        return train_chain(found, say=home.said.append)


def order(home: Home) -> list[str]:
    return [line for line in home.said if line.startswith("stage ") or line.startswith("resuming")]


def test_stages_follow_each_other_and_finished_ones_are_not_run_again(home):
    path = file(home, *THREE)
    with unproven():
        run = luthier.train(path, say=home.said.append)
    out = home.folder / "out"
    assert run.path == out / "3-last" and sorted(p.name for p in out.iterdir()) == ["1-first", "2-continue", "3-last", "run.yaml"]  # fmt: skip
    assert order(home) == ["stage 1-first (1 of 3)", "stage 2-continue (2 of 3)", "stage 3-last (3 of 3)"]
    names = [manifests.read(out / each / "final").facts["parents"][-1]["name"] for each in ("2-continue", "3-last")]
    assert names == [str(out / "1-first" / "final"), str(out / "2-continue" / "final")]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    train(home, path)
    assert order(home) == [
        f"stage {name} is finished: {out / name / 'final'}" for name in ("1-first", "2-continue", "3-last")
    ]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before
    assert identify(out).kind == "run" and identify(out).facts["finished"]
    model, _ = luthier.load(out)
    assert (luthier.load(out / "3-last")[0].peft_config["default"].r, model.peft_config["default"].r) == (6, 6)


def test_resume_on_the_parent_goes_on_in_the_right_stage_even_when_it_was_moved(home):
    path = file(home, *THREE)
    train(home, path)
    out, moved = home.folder / "out", home.folder / "moved"
    expected = logits(out / "3-last" / "final")
    out.rename(moved)
    shutil.rmtree(moved / "3-last")
    shutil.rmtree(moved / "2-continue" / "final")
    for step in (2, 3):
        shutil.rmtree(folder_of(moved / "2-continue", step))
    path.unlink()
    home.resume(moved)
    assert order(home) == [
        f"stage 1-first is finished: {moved / '1-first' / 'final'}",
        "stage 2-continue (2 of 3)",
        f"resuming from step 1: {folder_of(moved / '2-continue', 1)}",
        "stage 3-last (3 of 3)",
    ]
    assert (logits(moved / "3-last" / "final") == expected).all()


def test_overrides_reach_one_stage_or_all(home):
    path = file(home, *THREE)
    found = chains.read(path, ["stages.2.optim.lr=0.5", "train.steps=7", "stages.last.train.epochs=2"])
    assert isinstance(found, chains.Chain)
    assert [stage.config.optim.lr for stage in found.stages] == [0.01, 0.5, 0.01]
    assert [(stage.config.train.steps, stage.config.train.epochs) for stage in found.stages] == [(7, None), (7, None), (None, 2.0)]  # fmt: skip
    with pytest.raises(luthier.RequestError) as caught:
        chains.read(path, ["stages.4.optim.lr=1"])
    assert caught.value.code == "no-stage" and "3-last" in str(caught.value)


def test_stage_that_is_trained_further_makes_the_later_ones_say_so(home):
    path = file(home, {"name": "a"}, {"name": "b", "adapter": {"then": "continue"}})
    train(home, path)
    with pytest.raises(luthier.RequestError) as caught:
        train(home, path, "stages.a.train.steps=4")
    assert caught.value.code == "stage-changed" and "2-b" in str(caught.value)
    shutil.rmtree(home.folder / "out" / "2-b")
    train(home, path, "stages.a.train.steps=4")
    assert published(home.folder / "out" / "1-a")[-1].step == 4


@pytest.mark.slow
def test_whole_model_then_an_adapter_on_it(home):
    path = file(
        home, {"name": "full", "adapter": "none", "optim": {"lr": 0.001}}, {"name": "lora", "adapter": {"r": 2}}
    )
    run = train(home, path)
    named = json.loads((run.final / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(home.folder / "out" / "1-full" / "final")
    train(home, path)
    assert all("is finished" in line for line in order(home))


def wrong(home: Home, *stages: dict) -> luthier.RequestError:
    path = file(home, *stages)
    with pytest.raises(luthier.RequestError) as caught:
        train(home, path)
    assert not (home.folder / "out").exists()
    return caught.value


def test_what_is_wrong_with_a_later_stage_is_found_before_the_first_trains(home):
    error = wrong(home, {}, {"adapter": {"then": "continue"}, "optim": {"lrr": 1}})
    assert error.code == "unknown-key" and "stage 2-continue" in str(error) and "line" in str(error)
    error = wrong(home, {}, {"adapter": {"then": "continue"}, "data": {"train": "gone.jsonl"}})
    assert error.code == "missing-path" and "stage 2-continue" in str(error)
    error = wrong(home, {}, {"adapter": {"then": "merge", "rr": 3}})
    assert error.code == "unknown-key" and "stage 2-merge" in str(error)
    error = wrong(home, {}, {"adapter": {"then": "stack", "dora": True}})
    assert error.code == "cannot-stack"
    error = wrong(home, {}, {"adapter": {"then": "continue", "r": 8}})
    assert error.code == "adapter-differs" and "r is 4 there and 8 here" in str(error)
    error = wrong(home, {}, {"name": "x"})
    assert error.code == "no-then" and "then: stack" in str(error)
    error = wrong(home, {"adapter": "none"}, {"adapter": {"then": "continue"}})
    assert error.code == "no-adapter"
    error = wrong(home, {"name": "x"}, {"name": "x", "adapter": {"then": "continue"}})
    assert error.code == "stage-name"
    error = wrong(home, {"name": "../x"})
    assert error.code == "stage-name"


@pytest.mark.slow
def test_exit_code_is_2_and_plan_and_data_show_each_stage(home, capsys):
    path = file(home, {}, {"adapter": {"then": "continue"}, "optim": {"lrr": 1}})
    assert cli.main(["train", str(path)]) == 2
    path = file(home, *THREE)
    assert cli.main(["data", str(path), "--samples", "1"]) == 0
    told = capsys.readouterr()
    assert "stage 1-first" in told.out and "2-continue starts from a stage that has not been trained yet" in told.err
    train(home, path)
    capsys.readouterr()
    assert cli.main(["data", str(path), "--samples", "1", "--stage", "last"]) == 0
    assert "stage 3-last" in capsys.readouterr().out
    assert cli.main(["plan", str(path), "--stage", "3"]) == 0
    assert "bits equal" in capsys.readouterr().out
