"""A resumed run ends in the bits of the run that was never interrupted, wherever it was lost."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from harness import STEPS, Setup, assert_same_run, by_command, cut_back, make_setup, measured, resume, train

COMBINATIONS = list(itertools.product(("llama", "moe"), ("lora", "full"), ("packed", "rows")))


def _uninterrupted(home: Path, model: str, kind: str, rows: str) -> Setup:
    changes = {"train.packing": rows == "packed", "train.micro_batch": 1 if rows == "packed" else 2, "data.eval": 0.1, "evaluate.every": 5}  # fmt: skip
    setup = make_setup(home, model=model, lora=kind == "lora", changes=changes)
    done = train(setup)
    assert done.code == 0, done.text
    assert len([record for record in measured(setup.run) if record["kind"] == "train"]) == STEPS
    return setup


def _resume_and_compare(setup: Setup, step: int) -> None:
    copy = cut_back(setup.run, step, setup.home / f"from-{step}")
    done = resume(setup, copy, f"checkpoint.every={STEPS}")
    assert done.code == 0, done.text
    assert f"resuming from step {step}" in done.text
    assert_same_run(copy, setup.run)


@pytest.mark.parametrize(("model", "kind", "rows"), [("llama", "lora", "packed"), ("moe", "full", "rows")])
def test_resumed_run_ends_in_the_same_bits(tmp_path, model, kind, rows):
    setup = _uninterrupted(tmp_path, model, kind, rows)
    for step in (1, 10, 19):
        _resume_and_compare(setup, step)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kind", "rows"), COMBINATIONS)
def test_resumed_run_ends_in_the_same_bits_from_every_step(tmp_path, model, kind, rows):
    setup = _uninterrupted(tmp_path, model, kind, rows)
    for step in range(1, STEPS):
        _resume_and_compare(setup, step)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_command_line_resumes_to_the_same_bits_and_a_proof(tmp_path, kind):
    setup = _uninterrupted(tmp_path, "llama", kind, "packed")
    copy = cut_back(setup.run, 7, tmp_path / "from-7")
    done = by_command(setup, "resume", str(copy))
    assert done.code == 0, done.text
    assert_same_run(copy, setup.run)
    assert "proof: passed" in done.text


def test_dropout_is_at_work_in_these_runs(tmp_path):
    """Else equal bits would say nothing about the random state."""
    with_dropout = make_setup(tmp_path / "with")
    without = make_setup(tmp_path / "without", changes={"model.dropout": 0.0, "adapter.dropout": 0.0})
    only_attention = make_setup(tmp_path / "attention", changes={"adapter.dropout": 0.0})
    losses = []
    for setup in (with_dropout, without, only_attention):
        assert train(setup, "train.steps=2").code == 0
        losses.append(measured(setup.run)[0]["loss"])
    assert len(set(losses)) == 3
