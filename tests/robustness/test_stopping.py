"""Asked to stop, a run publishes and says so with 75; interrupted again, it leaves with what was published."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import STEPS, Running, Setup, assert_same_run, make_setup, newest, resume, train

from luthier.artifacts import manifest as manifests
from luthier.artifacts.run_folder import published

SLOWLY = """
import time

def step(event):
    if event.kind == "step":
        time.sleep(0.2)

def checkpoint(event):
    if event.kind == "step" and event.step == 6:
        (event.run / "in-step-6").touch()
        time.sleep(20)
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Setup:
    setup = make_setup(tmp_path_factory.mktemp("stopping"), changes={"checkpoint.every": 5})
    (setup.home / "slowly.py").write_text(SLOWLY)
    done = train(setup)
    assert done.code == 0, done.text
    return setup


def assert_all_whole(run: Path) -> None:
    for found in published(run):
        assert manifests.verify(found.path)[1] == [], found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_asked_to_stop_it_publishes_this_step_and_exits_75(reference, tmp_path, number):
    setup = Setup(reference.home, tmp_path / "run", reference.run_file)
    running = Running(setup, ["train", str(setup.run_file), f"output={setup.run}", "callbacks=[slowly:step]"])
    running.wait_until(lambda: newest(setup.run) >= 5)
    running.signal(number)
    done = running.end()
    assert done.code == 75, done.text
    stopped = newest(setup.run)
    assert stopped >= 6
    assert f"stopped on {number.name} after step {stopped} of {STEPS}" in done.text
    assert f"luthier resume {setup.run}" in done.text
    assert "finishing this step" in done.text
    assert "Traceback" not in done.text
    assert_all_whole(setup.run)
    done = resume(setup, None, "callbacks=[]")
    assert f"resuming from step {stopped}" in done.text
    assert done.code == 0, done.text
    assert_same_run(setup.run, reference.run)


def test_second_interrupt_leaves_at_once_and_loses_nothing_published(reference, tmp_path):
    setup = Setup(reference.home, tmp_path / "run", reference.run_file)
    running = Running(setup, ["train", str(setup.run_file), f"output={setup.run}", "callbacks=[slowly:checkpoint]"])
    running.wait_until((setup.run / "in-step-6").exists)
    running.signal(signal.SIGINT)
    running.wait_until(lambda: "finishing this step" in running.text)
    running.signal(signal.SIGINT)
    done = running.end(seconds=15)  # the step would sleep for longer
    assert done.code == 1, done.text
    assert "published checkpoints are whole" in done.text
    assert "Traceback" not in done.text
    assert [found.step for found in published(setup.run)] == [5]
    assert_all_whole(setup.run)
    done = resume(setup, None, "callbacks=[]")
    assert done.code == 0, done.text
    assert_same_run(setup.run, reference.run)


def test_asked_to_stop_during_the_proof_it_exits_75_and_resume_proves(reference, tmp_path):
    setup = Setup(reference.home, tmp_path / "run", reference.run_file)
    running = Running(setup, ["train", str(setup.run_file), f"output={setup.run}"], proof=True)
    running.wait_until(lambda: (setup.run / ".partial-final").exists())
    running.signal(signal.SIGTERM)
    done = running.end(seconds=15)
    assert done.code == 75, done.text
    assert "before the result was proven" in done.text
    assert "Traceback" not in done.text
    assert not (setup.run / "final").exists()
    assert newest(setup.run) == STEPS
    done = resume(setup, None, proof=True)
    assert done.code == 0, done.text
    assert_same_run(setup.run, reference.run)
    assert (setup.run / "final" / "proof.json").is_file()
