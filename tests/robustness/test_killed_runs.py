"""Kill a run anywhere: the newest published checkpoint is whole, and resuming ends in the uninterrupted run's bits."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from harness import STEPS, Death, Running, Setup, assert_same_run, make_setup, measured, newest, resume, train

from luthier.artifacts import manifest as manifests
from luthier.artifacts.run_folder import folder_of, published
from luthier.artifacts.verify import verify_all
from luthier.training.finish import stored_proof

INSTANTS = {
    "while tensors are written": Death("luthier.checkpoint.write.write_at", "", 130),
    "while small files are written": Death("luthier.checkpoint.write.flush_file", "", 30),
    "before the manifest": Death("luthier.artifacts.manifest.write", "step-00000005$"),
    "before the rename": Death("os.rename", r"\.partial-step-00000005$"),
    "after the rename": Death("luthier.artifacts.publish.flush_folder", "checkpoints$", 5),
    "before the first checkpoint": Death("os.rename", r"\.partial-step-00000001$"),
    "while it is read back": Death("luthier.artifacts.manifest.forget", "step-00000006$"),
    "before retention hides one": Death("os.rename", r"checkpoints/step-00000003$"),
    "while retention deletes one": Death("os.unlink", r"^optimizer\.safetensors$"),
    "while run.yaml is written": Death("os.replace", r"\.run\.yaml"),
    "while metrics are written": Death("luthier.report.metrics.json.dumps", "'kind': 'train', 'step': 7"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Setup:
    """The uninterrupted run, full fine-tuning, the two newest checkpoints kept."""
    setup = make_setup(tmp_path_factory.mktemp("killed"), lora=False, changes={"checkpoint.keep": 2})
    done = train(setup)
    assert done.code == 0, done.text
    return setup


def same_setup(reference: Setup, run: Path) -> tuple[Setup, str]:
    """The same run file with another output, given as an override."""
    return Setup(reference.home, run, reference.run_file), f"output={run}"


def assert_newest_is_whole(run: Path, at_least: int) -> int:
    """Everything under a checkpoint's name verifies; returns the newest's step, which never falls."""
    for found in published(run):
        assert manifests.verify(found.path)[1] == [], found
    assert newest(run) >= at_least
    return newest(run)


def kill_at_random(reference: Setup, folder: Path, kills: int, seed: int) -> None:
    chosen = random.Random(seed)
    done, attempt = 0, 0
    while done < kills:
        setup, output = same_setup(reference, folder / f"run-{attempt}")
        attempt += 1
        reached = 0
        while newest(setup.run) < STEPS and done < kills:
            begun = (setup.run / "run.yaml").exists()
            running = Running(setup, ["resume", str(setup.run)] if begun else ["train", str(setup.run_file), output])
            began = "final: "  # the last thing said before the first step
            running.wait_until(lambda: began in running.text)  # noqa: B023 (called at once)
            time.sleep(chosen.uniform(0, 0.6))
            with contextlib.suppress(ProcessLookupError):  # it may have ended well just before
                running.signal(signal.SIGKILL)
            ended = running.end()
            assert ended.code in (-signal.SIGKILL, 0), ended.text
            done += ended.code != 0
            reached = assert_newest_is_whole(setup.run, reached)
        ended = resume(setup)
        assert ended.code == 0, ended.text
        assert_same_run(setup.run, reference.run)
        assert not list(setup.run.glob("checkpoints/.partial*"))
        shutil.rmtree(setup.run)


def test_run_killed_at_random_instants_ends_in_the_same_bits(reference, tmp_path):
    kill_at_random(reference, tmp_path, kills=4, seed=1)


@pytest.mark.slow
def test_run_killed_at_fifty_random_instants_ends_in_the_same_bits(reference, tmp_path):
    kill_at_random(reference, tmp_path, kills=50, seed=2)


@pytest.mark.parametrize("instant", INSTANTS)
def test_run_killed_at_a_delicate_instant_ends_in_the_same_bits(reference, tmp_path, instant):
    setup, output = same_setup(reference, tmp_path / "run")
    killed = Running(setup, ["train", str(setup.run_file), output], death=INSTANTS[instant]).end()
    assert killed.code == -signal.SIGKILL, killed.text
    reached = assert_newest_is_whole(setup.run, 0)
    assert 0 <= reached < STEPS
    done = resume(setup) if (setup.run / "run.yaml").exists() else train(setup, output)
    assert done.code == 0, done.text
    if reached:
        assert f"resuming from step {reached}" in done.text
    assert_same_run(setup.run, reference.run)
    assert [found.step for found in published(setup.run)] == [STEPS - 1, STEPS]
    assert not list(setup.run.rglob(".partial*"))


def test_metrics_have_each_step_once_after_kills(reference, tmp_path):
    setup, output = same_setup(reference, tmp_path / "run")
    first, second = INSTANTS["before the rename"], INSTANTS["while it is read back"]
    assert Running(setup, ["train", str(setup.run_file), output], death=first).end().code == -signal.SIGKILL
    assert Running(setup, ["resume", str(setup.run)], death=second).end().code == -signal.SIGKILL
    assert resume(setup).code == 0
    steps = [record["step"] for record in measured(setup.run) if record["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "death",
    [
        pytest.param(Death("luthier.training.finish.make_final", ""), id="before the proof"),
        pytest.param(
            Death("os.rename", r"\.partial-final$"), id="before the final folder gets its name", marks=pytest.mark.slow
        ),
    ],
)
def test_run_killed_after_its_last_step_is_finished_and_proven_by_resume(reference, tmp_path, death):
    setup, output = same_setup(reference, tmp_path / "run")
    killed = Running(setup, ["train", str(setup.run_file), output], proof=True, death=death).end()
    assert killed.code == -signal.SIGKILL, killed.text
    assert not (setup.run / "final").exists()
    assert newest(setup.run) == STEPS
    done = resume(setup, proof=True)
    assert done.code == 0, done.text
    assert stored_proof(setup.run / "final")["verdict"] == "passed"
    assert stored_proof(setup.run / "final")["effect"] > 0
    assert_same_run(setup.run, reference.run)
    assert verify_all(setup.run).whole
    assert folder_of(setup.run, STEPS).is_dir()
