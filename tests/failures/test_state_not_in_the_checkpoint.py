"""Section 3 of the table of failures: state that is not in the checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rows import IDS, adapted, logits, opens_and_trains, plain, plain_adapter, said, trained
from trainers import by_trainer, by_trl

import luthier
from luthier.training.locate import locate

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from stages_harness import Home


@pytest.fixture(scope="module")
def trl(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl") / "out"
    trainer = by_trl(base, folder)
    return folder, logits(trainer.model), trained(trainer.model)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("home"))
    home.train("run", train={"steps": 2})
    return home


def test_trls_checkpoint_without_its_optimiser_opens_and_trains_and_says_what_is_fresh(base, trl, home, tmp_path):
    """Run: optimiser file missing, or a weights-only save: Adam restarts from zero and the rate with it, silently."""
    folder, wanted, names = trl
    for lost in ((), ("optimizer.pt", "scheduler.pt")):
        checkpoint = shutil.copytree(folder / "checkpoint-2", tmp_path / f"without-{len(lost)}")
        for name in lost:
            (checkpoint / name).unlink()
        assert said(checkpoint) == ("trainer_checkpoint", set())
        opens_and_trains(checkpoint, wanted, names)
        run = home.stage(f"on-{len(lost)}", str(checkpoint), "continue", train={"steps": 1})
        assert (run / "final").is_dir() and "a fresh optimiser and schedule; this is not resume" in home.said_text()
        assert ("optimizer.pt" in home.said_text()) == (not lost)
    with pytest.raises(luthier.RequestError) as refusal:
        home.stage("carried", str(folder / "checkpoint-2"), "continue", optim={"from": "carried"})
    assert refusal.value.code == "no-moments" and not (home.folder / "carried" / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_trainers_output_folder_opens_as_its_newest_checkpoint_and_trains(base, tmp_path, kind):
    """Run, issue 3: `checkpoint-N` and output folders of transformers' Trainer, full and adapter, with optimiser."""
    model = adapted(base) if kind == "adapter" else None
    trainer = by_trainer(base, tmp_path, model)
    assert said(tmp_path) == ("trainer_checkpoint", set())
    names, wanted = trained(trainer.model), logits(trainer.model)
    opens_and_trains(tmp_path, wanted, names)
    assert torch.equal(logits(luthier.load(tmp_path / "checkpoint-2", device="cpu")[0]), wanted)
    assert not torch.equal(logits(luthier.load(tmp_path / "checkpoint-1", device="cpu")[0]), wanted)


def test_our_checkpoint_without_its_optimiser_is_not_resumed_from(home, tmp_path):
    """Run: the same of a checkpoint of ours: it is not whole, and resuming takes the one before."""
    run = shutil.copytree(home.folder / "run", tmp_path / "run")
    shutil.rmtree(run / "final")
    (next(run.glob("checkpoints/step-00000002/trainer/*.safetensors"))).unlink()
    kind, codes = said(run)
    assert kind == "run" and "checkpoint-damaged" in codes
    with pytest.raises(luthier.ArtifactError) as refusal:
        luthier.load(run / "checkpoints/step-00000002", device="cpu")
    assert refusal.value.code == "file-missing"
    assert locate(f"{run}@newest").path.name == "step-00000001"
    home.resume(run)
    assert "resuming from step 1" in home.said_text() and (run / "final").is_dir()


def test_reloaded_adapter_trains_exactly_what_was_trained(base, tmp_path):
    """P#184, P#1340: an adapter loaded with `is_trainable` false: 0 trainable parameters, and the loss stays flat."""
    model = adapted(base)
    model.save_pretrained(tmp_path / "a")
    assert trained(plain_adapter(base, tmp_path / "a")) == set()  # what others get who leave the flag out
    reloaded = opens_and_trains(tmp_path / "a", logits(model), trained(model))
    assert luthier.describe(reloaded).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_trainers_optimiser_fits_the_parameters_that_train_after_a_reload(base, tmp_path):
    """U#233, U#3108: the trainable set differs after reload: "parameter group doesn't match the size"."""
    trainer = by_trainer(base, tmp_path, adapted(base))
    model, _ = luthier.load(tmp_path / "checkpoint-2", device="cpu", trainable=True)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    live = [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert [(name, tuple(p.shape)) for name, p in named] == [(name, tuple(p.shape)) for name, p in live]
    stored = torch.load(tmp_path / "checkpoint-2/optimizer.pt", weights_only=True)
    groups = [
        {"params": [p for _, p in named]},
        {"params": []},
    ]  # with weight decay, and without, as Trainer sorts them
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    optimizer.load_state_dict(stored)
    for _, parameter in named:
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def test_trainer_resumes_its_checkpoint_with_a_model_that_was_loaded_here(base, tmp_path):
    """U#3108: Trainer goes on, optimiser and all, to the bits of the run that was not interrupted."""
    trainer = by_trainer(base, tmp_path, adapted(base))
    model, _ = luthier.load(tmp_path / "checkpoint-1", device="cpu", trainable=True)
    resumed = by_trainer(base, tmp_path / "again", model, resume=tmp_path / "checkpoint-1")
    assert json.loads((tmp_path / "again/checkpoint-2/trainer_state.json").read_text())["global_step"] == 2
    assert torch.equal(logits(resumed.model), logits(trainer.model))


def test_more_steps_of_another_batch_are_an_error_and_not_a_jump(home):
    """Run: another gradient-accumulation setting is accepted silently; here the batch is of the run's own config."""
    with pytest.raises(luthier.RequestError, match=r"train\.batch_samples") as refusal:
        home.resume(home.folder / "run", "train.batch_samples=2")
    assert refusal.value.code == "config-changed"


def test_model_without_anything_to_train_is_an_error(base, tmp_path):
    """P#184: a count of 0 is an error: an adapter whose file holds nothing that trains."""
    model = adapted(base)
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    config["target_modules"] = ["nowhere"]
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(luthier.ArtifactError) as refusal:
        luthier.load(tmp_path / "a", device="cpu", trainable=True)
    assert refusal.value.code in {"adapter-does-not-fit", "coverage"}
    assert trained(plain(base))
