"""Field report S1's second half: a base in 4 or 8 bits trains, is evaluated, saved at every step, resumed, reloaded, trained further."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Setup, assert_same_run, cut_back, make_setup, measured, resume, train
from safetensors.torch import load_file
from tiny import make_gguf, make_llama

import luthier
from luthier.artifacts import fingerprint
from luthier.artifacts import manifest as manifests
from luthier.artifacts.run_folder import folder_of
from luthier.artifacts.tensorfile import read_header
from luthier.models.quantised.layer import QuantisedLinear, quantised_layers

FORMS = ("nf4", "int8", "fp8")
STEPS = 6
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
ASK = """
import sys, torch, luthier
from safetensors.torch import save_file
model, tokenizer = luthier.load(sys.argv[1], device="cpu")
with torch.no_grad():
    save_file({"logits": model(torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits}, sys.argv[2])
"""


def setup_of(home: Path, form: str, **changes: Any) -> Setup:
    told = {
        "model.precision": form, "model.dropout": 0.0, "data.eval": 0.2, "evaluate.every": 1,
        "train.steps": STEPS, "checkpoint.every": 1, "checkpoint.keep": STEPS, **changes,
    }  # fmt: skip
    setup = make_setup(home, changes=told)
    make_llama(home / "base", hidden=64)
    return setup


def in_a_new_process(path: Path, scratch: Path) -> torch.Tensor:
    out = scratch / f"logits-{len(list(scratch.glob('logits-*')))}.safetensors"
    subprocess.run(
        [sys.executable, "-c", ASK, str(path), str(out)], check=True, capture_output=True, env={**os.environ}
    )
    return load_file(out)["logits"]


@pytest.fixture(scope="module", params=FORMS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Setup]:
    setup = setup_of(tmp_path_factory.mktemp(request.param), request.param)
    done = train(setup, proof=True)
    assert done.code == 0, done.text
    assert "proof: passed" in done.text
    assert "equal bits" in done.text
    return request.param, setup


@pytest.mark.slow
def test_every_step_is_evaluated_and_saved_and_checkpoints_do_not_hold_the_base(trained):
    form, setup = trained
    kinds = [record["kind"] for record in measured(setup.run)]
    assert kinds.count("eval") == STEPS + 1
    for step in range(1, STEPS + 1):
        checkpoint = folder_of(setup.run, step)
        names = read_header(checkpoint / "adapter" / "adapter_model.safetensors")[0]
        assert names
        assert all(".lora_" in name for name in names)
        base = manifests.read(checkpoint).facts["base"]
        assert base["fingerprint"] == fingerprint.of_folder(setup.home / "base")
        assert base["quantisation"]["precision"] == form


@pytest.mark.slow
def test_reloaded_in_a_new_process_it_gives_the_same_logits_and_trains_further(trained, tmp_path):
    form, setup = trained
    model, _ = luthier.load(setup.run, device="cpu", trainable=True)
    assert {layer.form for layer in quantised_layers(model)} == {form}
    with torch.no_grad():
        here = model.eval()(IDS).logits
    for path in (setup.run / "final", folder_of(setup.run, STEPS)):
        assert torch.equal(in_a_new_process(path, tmp_path), here)
    frozen = {name: weight.clone() for name, weight in model.state_dict().items() if "lora_" not in name}
    trains = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in frozen.items())


@pytest.mark.slow
def test_resumed_run_ends_in_the_same_bits(trained):
    _, setup = trained
    for step in (1, 4):
        copy = cut_back(setup.run, step, setup.home / f"from-{step}")
        done = resume(setup, copy)
        assert done.code == 0, done.text
        assert f"resuming from step {step}" in done.text
        assert_same_run(copy, setup.run, step=STEPS)


@pytest.mark.slow
def test_another_precision_is_allowed_and_said(trained, tmp_path):
    form, setup = trained
    told: list[str] = []
    other, _ = luthier.load(setup.run / "final", device="cpu", precision="fp32", say=told.append)
    assert not quantised_layers(other)
    assert any(f"trained on its base in {form}" in line for line in told)
    same, _ = luthier.load(setup.run / "final", device="cpu", say=told.clear)
    with torch.no_grad():
        assert not torch.equal(other(IDS).logits, same(IDS).logits)


@pytest.mark.slow
def test_final_folder_says_how_plain_libraries_open_it(trained):
    form, setup = trained
    card = (setup.run / "final" / "README.md").read_text()
    facts = manifests.read(setup.run / "final").facts
    assert facts["base"]["quantisation"]["precision"] == form
    proof = json.loads((setup.run / "final" / "proof.json").read_text())
    assert proof["passed"]
    assert proof["unquantised"] > 0
    assert ("BitsAndBytesConfig" in card) == (form != "fp8")
    assert ("plain_form" in facts) == (form != "nf4")


@pytest.mark.slow
def test_run_merges_into_the_values_that_it_trained_on(trained, tmp_path):
    form, setup = trained
    made = luthier.export(setup.run, tmp_path / "merged", to="merged", prove=False)
    assert any(f"trained on its base in {form}" in note for note in made.notes)
    assert manifests.read(setup.run / "final").facts["base"]["dtype"] == "float32"
    live, _ = luthier.load(setup.run, device="cpu")
    merged, _ = luthier.load(tmp_path / "merged", device="cpu")
    luthier.export(setup.run, tmp_path / "original", to="merged", onto="original", prove=False)
    original, _ = luthier.load(tmp_path / "original", device="cpu")
    for layer in quantised_layers(live):
        layer.multiplies = "16 bits"  # fp8 rounds activations too
    with torch.no_grad():
        wanted = live.eval()(IDS).logits
        torch.testing.assert_close(merged.eval()(IDS).logits, wanted, rtol=0, atol=1e-4)
        assert (original.eval()(IDS).logits - wanted).abs().max() > 1e-2


@pytest.mark.slow
def test_a_saved_adapter_of_a_live_quantised_model_is_proven(trained, tmp_path):
    _, setup = trained
    model, tokenizer = luthier.load(setup.run, device="cpu")
    written = luthier.save(model, tmp_path / "out", tokenizer=tokenizer)
    assert written.kind == "adapter"
    assert written.proof.passed
    again, _ = luthier.load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    base, _ = luthier.load(setup.home / "base", device="cpu", precision="int8")
    with pytest.raises(luthier.RequestError, match="nothing new in it"):
        luthier.save(base, tmp_path / "model", tokenizer=tokenizer)


def test_checkpoints_at_every_epoch_are_those_of_every_step(tmp_path):
    setup = setup_of(
        tmp_path, "int8", **{"checkpoint.every": "1 epoch", "evaluate.every": "1 epoch", "train.batch_samples": 13}
    )
    done = train(setup)
    assert done.code == 0, done.text
    assert len(list((setup.run / "checkpoints").glob("step-*"))) == 2


def test_run_resumed_with_other_layers_in_16_bits_is_refused(tmp_path):
    setup = setup_of(tmp_path, "nf4")
    assert train(setup, "train.steps=2").code == 0
    done = resume(setup, None, "model.keep_16bit=[q_proj]", "train.steps=3")
    assert done.code == 2
    assert "model.keep_16bit" in done.text
    done = resume(setup, None, "model.keep_16bit=[q_proj]", "train.steps=3", "--allow", "model.keep_16bit")
    assert done.code == 2
    assert "not quantised as it was" in done.text


@pytest.mark.slow
def test_gguf_is_written_in_16_bits_once_and_quantised_from_there(tmp_path):
    setup = setup_of(tmp_path, "int8")
    gguf = make_gguf(tmp_path / "tiny.gguf")
    done = train(setup, f"model.path={gguf}", "train.steps=2", proof=True)
    assert done.code == 0, done.text
    assert "proof: passed" in done.text
    assert set(read_header(setup.run / "base" / "model.safetensors")[0])
    model, _ = luthier.load(setup.run, device="cpu")
    assert any(isinstance(module, QuantisedLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": "none"}, "an adapter has to train on them"),
        ({"adapter.type": "loha"}, "adapter.type loha has no form"),
        (
            {"model.precision": "bf16", "model.keep_16bit": ["q_proj"]},
            "model.keep_16bit names layers of a quantised base",
        ),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_read(tmp_path, changes, said):
    setup = make_setup(tmp_path, changes={"model.precision": "nf4", **changes})
    done = train(setup)
    assert done.code == 2
    assert said in done.text


def test_eight_bit_states_on_a_quantised_base_resume_bit_for_bit(tmp_path):
    setup = setup_of(tmp_path, "nf4", **{"optim.states": "8bit", "adapter.r": 64})
    done = train(setup)
    assert done.code == 0, done.text
    assert "AdamW 8-bit" in done.text
    state = load_file(next((folder_of(setup.run, 3) / "trainer").glob("optimizer*.safetensors")))
    assert any(tensor.dtype == torch.uint8 for tensor in state.values())
    copy = cut_back(setup.run, 3, tmp_path / "from-3")
    done = resume(setup, copy)
    assert done.code == 0, done.text
    assert_same_run(copy, setup.run, step=STEPS)
