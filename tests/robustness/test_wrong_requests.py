"""Wrong requests around a run: each ends with 2 and names the key, in ``plan`` as in ``train``, and what is printed is true."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from harness import Setup, call, make_setup, resume, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Setup:
    """A run of two steps, full fine-tuning, whose result was not proven."""
    changes = {"train.steps": 2, "checkpoint.keep": 2}
    setup = make_setup(tmp_path_factory.mktemp("wrong"), lora=False, changes=changes)
    assert train(setup).code == 0
    return setup


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("evaluate.metrics=[bogus]", "no metric 'bogus'"),
        ("callbacks=[nowhere:function]", "callbacks"),
        ("optim.lr=.inf", "optim.lr"),
        ("output=run.yaml/below", "output"),
    ],
)
def test_plan_and_train_refuse_the_same(trained, override, named):
    for verb in ("plan", "train"):
        done = call(trained, verb, str(trained.run_file), f"output={trained.home / 'other'}", override)
        assert done.code == 2, done.text
        assert named in done.text


def test_resume_stays_in_its_folder(trained):
    done = resume(trained, None, f"output={trained.home / 'elsewhere'}")
    assert done.code == 2, done.text
    assert "goes on in its own folder" in done.text
    assert not (trained.home / "elsewhere").exists()


def test_allow_of_an_unknown_key_is_refused(trained):
    done = resume(trained, None, "--allow", "optim.lrr")
    assert done.code == 2, done.text
    assert "Did you mean `optim.lr`?" in done.text


def test_resume_of_a_checkpoint_names_the_run(trained):
    done = resume(trained, next((trained.run / "checkpoints").iterdir()))
    assert done.code == 2 and f"The run is {trained.run}" in done.text


def test_full_fine_tuning_goes_on_without_the_model_it_began_from(trained, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    stored = yaml.safe_load((run / "run.yaml").read_text())
    stored["model"]["path"] = str(tmp_path / "gone")
    (run / "run.yaml").write_text(yaml.safe_dump(stored))
    done = resume(trained, run, "train.steps=3")
    assert done.code == 0, done.text
    assert (run / "checkpoints" / "step-00000003").is_dir()
    assert yaml.safe_load((run / "run.yaml").read_text())["model"]["path"] == str(tmp_path / "gone")


def test_run_without_a_whole_checkpoint_is_broken_and_not_empty(trained, tmp_path):
    run = shutil.copytree(trained.run, tmp_path / "run")
    for manifest in run.glob("checkpoints/*/luthier.json"):
        manifest.unlink()
    done = call(trained, "chat", str(run), "--prompt", "hi")
    assert done.code == 3 and "none of this run's checkpoints is whole" in done.text


@pytest.mark.parametrize("kind", ["ia3", "oft", "ln_tuning"])
def test_methods_without_a_rank_train_and_resume(trained, tmp_path: Path, kind):
    run = tmp_path / "run"
    done = call(trained, "train", str(trained.run_file), f"output={run}", f"adapter={{type: {kind}}}")
    assert done.code == 0, done.text
    assert "r16" not in done.text
    done = resume(trained, run, "train.steps=3")
    assert done.code == 0, done.text


@pytest.mark.parametrize(
    "given", [("eval", "base", "data.jsonl", "--limit", "0"), ("chat", "base", "--max-new-tokens", "0")]
)
def test_flags_out_of_range_end_with_two(trained, given):
    assert call(trained, *given).code == 2


def test_several_problems_stand_one_a_line(trained):
    done = call(trained, "plan", str(trained.run_file), "lora_r=8", "learning_rate=1")
    assert done.code == 2
    assert len([line for line in done.text.splitlines() if line.startswith("- ")]) == 2
