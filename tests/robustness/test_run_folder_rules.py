"""What a run's folder is good for later: going on, refusing what would mix two runs, being moved, its best checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import (
    STEPS,
    Running,
    Setup,
    assert_same_run,
    call,
    cut_back,
    make_setup,
    measured,
    newest,
    resume,
    train,
    write_data,
)
from tiny import make_llama

from luthier.api import load
from luthier.artifacts.run_folder import folder_of, published
from luthier.artifacts.verify import verify_all
from luthier.training.finish import stored_proof

SLOWLY = "import time\n\ndef step(event):\n    time.sleep(20 if event.kind == 'step' and event.step == 3 else 0)\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Setup:
    """A finished run whose held-out loss was lowest early on."""
    home = tmp_path_factory.mktemp("rules")
    changes = {"optim.lr": 0.03, "optim.schedule": "constant", "data.eval": str(home / "held.jsonl")}
    changes |= {"evaluate.every": 2, "checkpoint.keep": 2, "checkpoint.best": "eval_loss", "adapter.r": 16}
    setup = make_setup(home, changes=changes)
    write_data(home / "data.jsonl", seed=0, samples=4)  # few enough to be learnt by heart, which others pay for
    write_data(home / "held.jsonl", seed=5, samples=6)
    done = train(setup, proof=True)
    assert done.code == 0, done.text
    return setup


@pytest.fixture
def unfinished(finished, tmp_path) -> Path:
    """The same run as if lost at its last but one step."""
    return cut_back(finished.run, STEPS - 1, tmp_path / "run")


def best_step(run: Path) -> int:
    losses = {
        record["step"]: record["eval_loss"] for record in measured(run) if record["kind"] == "eval" and record["step"]
    }
    return min(losses, key=losses.__getitem__)


def test_second_process_on_the_same_output_is_refused_and_told_who_holds_it(tmp_path):
    setup = make_setup(tmp_path, changes={"callbacks": ["slowly:step"]})
    (setup.home / "slowly.py").write_text(SLOWLY)
    running = Running(setup, ["train", str(setup.run_file)])
    running.wait_until(lambda: newest(setup.run) >= 1)
    for done in (train(setup), resume(setup)):
        assert done.code == 2, done.text
        assert f"in use by process {running.pid}" in done.text
        assert "Traceback" not in done.text
    running.process.kill()
    running.end()
    assert verify_all(setup.run).whole


def test_training_into_a_finished_run_says_so_and_exits_0(finished):
    before = (finished.run / "final/luthier.json").read_bytes()
    done = train(finished, proof=True)
    assert done.code == 0, done.text
    assert f"this run is finished ({STEPS} steps)" in done.text
    assert "train.epochs or train.steps" in done.text
    assert (finished.run / "final/luthier.json").read_bytes() == before


def test_more_steps_go_on_and_make_a_new_proven_final_folder(finished, tmp_path):
    copy = Path(shutil.copytree(finished.run, tmp_path / "run"))
    done = train(finished, f"output={copy}", f"train.steps={STEPS + 3}", proof=True)
    assert done.code == 0, done.text
    assert f"resuming from step {STEPS}" in done.text
    assert f"train.steps: {STEPS} → {STEPS + 3} (the schedule goes on over the new length)" in done.text
    steps = [record["step"] for record in measured(copy) if record["kind"] == "train"]
    assert steps == list(range(1, STEPS + 4))
    assert json.loads((copy / "final/luthier.json").read_text())["step"] == STEPS + 3
    assert stored_proof(copy / "final")["verdict"] == "passed"
    assert verify_all(copy).whole


def test_changed_key_is_an_error_that_names_it_and_how_to_allow_it(finished, unfinished):
    done = resume(finished, unfinished, "optim.lr=0.5")
    assert done.code == 2
    assert "optim.lr: 0.03 → 0.5" in done.text
    assert "--allow optim.lr" in done.text
    assert newest(unfinished) == STEPS - 1
    done = resume(finished, unfinished, "optim.lr=0.5", "--allow", "optim.lr")
    assert done.code == 0, done.text
    assert "permitted with --allow" in done.text


def test_changed_data_is_an_error_that_says_how_to_go_on(finished, unfinished):
    data = finished.home / "data.jsonl"
    original = data.read_bytes()
    write_data(data, seed=1, samples=4)
    try:
        done = resume(finished, unfinished)
        assert done.code == 2
        assert "the training data has changed since this run began" in done.text
        assert "--allow data.train" in done.text
        for key in ("data", "data.train"):
            copy = cut_back(unfinished, STEPS - 1, unfinished.parent / f"allowed-{key}")
            assert resume(finished, copy, "--allow", key).code == 0
    finally:
        data.write_bytes(original)
    assert resume(finished, unfinished).code == 0
    assert_same_run(unfinished, finished.run)


def test_changed_base_is_an_error_that_names_it(finished, unfinished):
    base = finished.home / "base"
    aside = base.rename(finished.home / "aside")
    try:
        make_llama(base, seed=1)
        done = resume(finished, unfinished)
        assert done.code == 2
        assert f"the base at {base} is not the one this run was trained on" in done.text
        assert "--allow model" in done.text
        assert newest(unfinished) == STEPS - 1
    finally:
        shutil.rmtree(base)
        aside.rename(base)


def test_moved_base_is_found_by_its_weights(finished, unfinished):
    moved = Path(shutil.copytree(finished.home / "base", unfinished.parent / "elsewhere"))
    done = resume(finished, unfinished, f"model.path={moved}")
    assert done.code == 0, done.text
    assert "its weights are the same" in done.text


def test_moved_run_resumes_and_can_be_inspected_and_loaded(finished, unfinished):
    moved = unfinished.rename(unfinished.parent / "moved")
    done = resume(finished, moved)
    assert done.code == 0, done.text
    assert_same_run(moved, finished.run)
    shutil.copytree(finished.run / "final", moved / "final")
    done = call(finished, "inspect", str(moved), "--json")
    assert done.code == 0, done.text
    said = json.loads(done.text)
    assert (said["kind"], said["whole"], said["finished"]) == ("run", True, True)
    assert str(moved) in said["final"]
    assert "step" in call(finished, "inspect", str(moved)).text
    load(moved)


def test_best_checkpoint_is_kept_and_opens_as_best(finished):
    best = best_step(finished.run)
    assert best < STEPS - 2, "else keeping it would show nothing"
    assert [found.step for found in published(finished.run)] == [best, STEPS - 1, STEPS]
    ours, _ = load(f"{finished.run}@best")
    theirs, _ = load(folder_of(finished.run, best))
    newest_one, _ = load(f"{finished.run}@newest")
    state, same, other = (model.state_dict() for model in (ours, theirs, newest_one))
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert not all(torch.equal(state[name], other[name]) for name in state)


def test_resumed_run_keeps_the_best_checkpoint_too(finished, tmp_path):
    best = best_step(finished.run)
    copy = Path(shutil.copytree(finished.run, tmp_path / "run"))
    shutil.rmtree(copy / "final")
    shutil.rmtree(folder_of(copy, STEPS))
    done = resume(finished, copy, f"train.steps={STEPS + 2}")
    assert done.code == 0, done.text
    assert [found.step for found in published(copy)] == [best_step(copy), STEPS + 1, STEPS + 2]
    assert best_step(copy) == best


def test_resume_of_what_is_no_run_says_so(finished, tmp_path):
    for path in (tmp_path / "nowhere", finished.home / "base"):
        done = call(finished, "resume", str(path))
        assert done.code == 2
        assert "no run.yaml here" in done.text


def test_training_into_a_folder_of_something_else_is_refused(finished, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = train(finished, f"output={tmp_path}")
    assert done.code == 2
    assert "thesis.txt" in done.text
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
