"""The proof fails for what it must fail for: a proof that cannot fail is no proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from harness import STEPS, Setup, make_setup, train
from safetensors.torch import load_file, save_file
from tiny import make_llama

from luthier.api import load
from luthier.artifacts.run_folder import FAILED_PROOF, folder_of, published
from luthier.errors import ArtifactError
from luthier.export.final import make_final
from luthier.export.proof.prove import Answers, Probe, live_answers, make_probe
from luthier.training.finish import stored_proof


class Case(NamedTuple):
    """A trained run with the live model's answers."""

    setup: Setup
    expected: Answers
    probe: Probe


def _trained(home: Path, *, lora: bool) -> Case:
    setup = make_setup(home, lora=lora, changes={"checkpoint.every": STEPS})
    done = train(setup)
    assert done.code == 0, done.text
    model, tokenizer = load(folder_of(setup.run, STEPS))
    ids = [tokenizer(text)["input_ids"] for text in ("My order is late, please help", "one two three blue sea")]
    probe = make_probe(model, ids, deterministic=True, trust_remote_code=False)
    return Case(setup, live_answers(model, tokenizer, probe), probe)


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Case:
    return _trained(tmp_path_factory.mktemp("lora"), lora=True)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Case:
    return _trained(tmp_path_factory.mktemp("whole"), lora=False)


def _prove(case: Case, run: Path, damage: Callable[[Path], None]) -> dict:
    """Make ``final`` from a damaged copy of the checkpoint; returns the proof, failed or passed."""
    shutil.copytree(case.setup.run, run)
    checkpoint = folder_of(run, STEPS)
    damage(next(path for path in (checkpoint / "adapter", checkpoint / "model") if path.is_dir()))
    base = None if (checkpoint / "adapter").is_dir() else case.setup.home / "base"
    try:
        final, _ = make_final(
            run, checkpoint, case.expected, case.probe, facts={}, card=lambda folder, kind: "card", base=base
        )
    except ArtifactError as error:
        assert error.code == "proof-failed"
        assert error.exit_code == 3
        assert not (run / "final").exists()
        assert not list(run.glob(".partial*"))
        assert [found.step for found in published(run)] == [STEPS]
        return json.loads((run / FAILED_PROOF).read_text())
    assert not (run / FAILED_PROOF).exists()
    return stored_proof(final)


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def nothing(folder: Path) -> None:
    """The true one."""


def zeroed_b(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if "layers.1.self_attn.v_proj.lora_B" in name)
        assert tensors[name].abs().max() > 0
        tensors[name].zero_()

    _rewrite(folder / "adapter_model.safetensors", change)


def swapped_layers(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for one in [name for name in tensors if ".layers.0.mlp.up_proj" in name]:
            other = one.replace(".layers.0.", ".layers.1.")
            tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    _rewrite(next(folder.glob("*model.safetensors")), change)


def another_base(folder: Path) -> None:
    other = make_llama(folder.parent.parent.parent.parent / "other", seed=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))


def another_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_end|>", 1))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(zeroed_b, "logits differ", marks=pytest.mark.slow),
        (swapped_layers, "logits differ"),
        pytest.param(another_base, "logits differ", marks=pytest.mark.slow),
        (another_template, "chat template renders the probe conversation differently"),
    ],
)
def test_proof_of_an_adapter_fails(lora, tmp_path, damage, says):
    proof = _prove(lora, tmp_path / "run", damage)
    assert proof["verdict"] == "failed"
    assert proof["passed"] is False
    assert says in proof["says"]


def test_proof_of_the_true_adapter_passes(lora, tmp_path):
    proof = _prove(lora, tmp_path / "run", nothing)
    assert (proof["verdict"], proof["max_difference"], proof["bound"]) == ("passed", 0, 0)
    assert proof["effect"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "says"), [(swapped_layers, "logits differ"), (another_template, "chat template")])
def test_proof_of_a_full_model_fails(full, tmp_path, damage, says):
    proof = _prove(full, tmp_path / "run", damage)
    assert proof["verdict"] == "failed"
    assert says in proof["says"]


def _layer_by_layer(case: Case, home: Path) -> None:
    case = case._replace(probe=replace(case.probe, layered=True))
    proof = _prove(case, home / "true", nothing)
    assert (proof["verdict"], proof["max_difference"]) == ("passed", 0)
    assert "layer by layer" in proof["compared"]
    assert _prove(case, home / "damaged", swapped_layers)["verdict"] == "failed"


def test_proof_layer_by_layer_gives_the_same_bits_and_can_fail(lora, tmp_path):
    _layer_by_layer(lora, tmp_path)


@pytest.mark.slow
def test_proof_of_a_full_model_layer_by_layer_gives_the_same_bits_and_can_fail(full, tmp_path):
    _layer_by_layer(full, tmp_path)


def test_proof_of_the_true_full_model_passes(full, tmp_path):
    proof = _prove(full, tmp_path / "run", nothing)
    assert (proof["verdict"], proof["max_difference"]) == ("passed", 0)
    assert proof["effect"] > 0


@pytest.mark.slow
def test_proof_of_a_model_that_training_did_not_change_is_inconclusive(full, tmp_path):
    case = full._replace(setup=Setup(folder_of(full.setup.run, STEPS), full.setup.run, full.setup.run_file))
    (case.setup.home / "base").symlink_to(case.setup.home / "model")
    try:
        assert _prove(case, tmp_path / "run", nothing)["verdict"] == "inconclusive"
    finally:
        (case.setup.home / "base").unlink()
