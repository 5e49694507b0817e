"""Field report S1 on folders that transformers and bitsandbytes quantised: nf4, double-quantised nf4, fp4 and LLM.int8()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness import Setup, assert_same_run, cut_back, make_setup, measured, resume, train
from peft import PeftModel
from test_quantised_runs import IDS, STEPS, in_a_new_process, setup_of
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import luthier
from luthier.artifacts import fingerprint
from luthier.artifacts import manifest as manifests
from luthier.artifacts.run_folder import folder_of
from luthier.artifacts.tensorfile import read_header
from luthier.config.schema import ModelConfig
from luthier.models.open import open_base
from luthier.models.quantised.layer import quantised_layers

FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
FORMS: dict[str, dict[str, Any]] = {
    "nf4": {**FOUR, "bnb_4bit_quant_type": "nf4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**FOUR, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 2.0},
}


def quantised_setup(home: Path, form: str, **changes: Any) -> Setup:
    """A run file whose base is a folder that plain transformers wrote in a form of bitsandbytes."""
    setup = setup_of(home, "nf4", **{"model.precision": None, "model.path": str(home / "packed"), **changes})
    how = BitsAndBytesConfig(**FORMS[form])
    model = AutoModelForCausalLM.from_pretrained(
        home / "base", quantization_config=how, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(home / "packed")
    make_tokenizer(home / "packed")
    return setup


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"}).eval()


@pytest.fixture(scope="module", params=FORMS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Setup]:
    setup = quantised_setup(tmp_path_factory.mktemp(request.param.replace(" ", "-")), request.param)
    done = train(setup, proof=True)
    assert done.code == 0, done.text
    assert "proof: passed" in done.text
    assert "equal bits" in done.text
    return request.param, setup


@pytest.mark.slow
def test_every_step_is_evaluated_and_saved_and_final_opens_in_plain_peft_on_the_folder(trained):
    _, setup = trained
    assert [record["kind"] for record in measured(setup.run)].count("eval") == STEPS + 1
    for step in range(1, STEPS + 1):
        checkpoint = folder_of(setup.run, step)
        assert all(".lora_" in name for name in read_header(checkpoint / "adapter" / "adapter_model.safetensors")[0])
        base = manifests.read(checkpoint).facts["base"]
        assert base["fingerprint"] == fingerprint.of_folder(setup.home / "packed")
    card = (setup.run / "final" / "README.md").read_text()
    assert "BitsAndBytesConfig" not in card  # the folder says itself how it is quantised
    model = PeftModel.from_pretrained(plain(setup.home / "packed"), setup.run / "final")
    ours, _ = luthier.load(setup.run, device="cpu")
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, ours(IDS).logits)


@pytest.mark.slow
def test_reloaded_in_a_new_process_it_gives_the_same_logits_and_trains_further(trained, tmp_path):
    form, setup = trained
    model, _ = luthier.load(setup.run, device="cpu", trainable=True)
    assert {layer.form for layer in quantised_layers(model)} == {form.split()[0]}
    with torch.no_grad():
        here = model.eval()(IDS).logits
    for path in (setup.run / "final", folder_of(setup.run, STEPS)):
        assert torch.equal(in_a_new_process(path, tmp_path), here)
    frozen = {name: weight.clone() for name, weight in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
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
    copy = cut_back(setup.run, 3, setup.home / "from-3")
    done = resume(setup, copy)
    assert done.code == 0, done.text
    assert "resuming from step 3" in done.text
    assert_same_run(copy, setup.run, step=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_our_layers_compute_with_the_folders_bytes_and_its_dtypes(form, tmp_path):
    setup = quantised_setup(tmp_path, form)
    base = open_base(ModelConfig(path=str(setup.home / "packed")), own_layers=True)
    theirs = plain(setup.home / "packed")
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, theirs(IDS).logits)
    layers = dict(base.model.named_modules())
    for name, module in theirs.named_modules():
        if hasattr(module, "SCB") or type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            own = module.weight.data.contiguous().view(torch.uint8).reshape(-1)
            assert torch.equal(layers[name].codes.reshape(-1), own)
    kept = {name: weight.dtype for name, weight in theirs.named_parameters() if "proj" not in name}
    assert {name: weight.dtype for name, weight in base.model.named_parameters() if name in kept} == kept
    assert not any("quantization_config" in vars(module.config) for module in (base.model,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.precision": "nf4"}, "its precision is the folder's own"),
        ({"adapter": "none"}, "its weights are codes, which no gradient changes"),
        ({"adapter.type": "loha"}, "adapter.type loha has no form for"),
        ({"model.new_tokens": ["<|new|>"]}, "Leave model.new_tokens out"),
    ],
)
def test_wrong_requests_are_refused_before_weights_are_read(tmp_path, changes, said):
    setup = quantised_setup(tmp_path, "nf4")
    told = yaml.safe_load(setup.run_file.read_text())
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            told[section][name] = value
        else:
            told[section] = value
    told["adapter"] = told["adapter"] if told["adapter"] == "none" else {"type": "lora", "r": 4, **told["adapter"]}
    setup.run_file.write_text(yaml.safe_dump(told))
    done = train(setup)
    assert done.code == 2, done.text
    assert said in done.text


@pytest.mark.slow
def test_blocks_that_cross_rows_are_refused(tmp_path):
    setup = make_setup(tmp_path, changes={"model.precision": None, "model.path": str(tmp_path / "packed")})
    how = BitsAndBytesConfig(**FORMS["nf4"])  # the tiny model is 32 wide, half a block
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=how, device_map={"": "cpu"}
    ).save_pretrained(tmp_path / "packed")
    make_tokenizer(tmp_path / "packed")
    done = train(setup)
    assert done.code == 2, done.text
    assert "blocks cross rows" in done.text
