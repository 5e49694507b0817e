"""Quantised folders as the values their codes stand for: equal bits with bitsandbytes, in any stretch."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import tiny
import torch
from adapters import opened, tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import luthier
from luthier.export.merged.dequantise import dequantised
from luthier.export.proof.exports import prove_dequantised
from luthier.export.source import open_source

FORMS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("original") / "base", hidden=64, dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=FORMS)
def quantised(request, original, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "quantised"
    model = AutoModelForCausalLM.from_pretrained(
        original, quantization_config=BitsAndBytesConfig(**FORMS[request.param]), dtype=torch.bfloat16, device_map={"": "cpu"}
    )  # fmt: skip
    model.save_pretrained(folder)
    tiny.make_tokenizer(folder)
    return request.param, folder


def by_bitsandbytes(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "Params4bit":
            found[f"{name}.weight"] = bnb.dequantize_4bit(weight.data, weight.quant_state)
        elif type(weight).__name__ == "Int8Params":
            found[f"{name}.weight"] = bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
    return found


def test_values_are_those_of_bitsandbytes_bit_for_bit(quantised):
    _, folder = quantised
    wanted = by_bitsandbytes(folder)
    assert len(wanted) == 14
    with open_source(folder) as inner:
        source = dequantised(inner, json.loads((folder / "config.json").read_text()))
        for name, tensor in wanted.items():
            found = source.tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
            flat = torch.empty(501, dtype=tensor.dtype)
            source.read(name, 777, flat)
            assert torch.equal(flat, tensor.reshape(-1)[777 : 777 + 501]), name
        assert set(source.specs) == set(tensors_of(folder))


def tensors_of(folder: Path) -> set[str]:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    return {name for name, _ in model.named_parameters()}


def test_transformers_form_of_a_quantised_folder_is_not_quantised(quantised, tmp_path):
    _, folder = quantised
    luthier.export(folder, tmp_path / "out", to="transformers", dtype="bf16", prove=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], tensor.to(torch.bfloat16)) for name, tensor in by_bitsandbytes(folder).items())
    opened(tmp_path / "out")


def make_adapter_on(base: Path, folder: Path) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, device_map={"": "cpu"})
    get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    ).save_pretrained(folder)
    return folder


def test_merge_onto_what_the_adapter_saw_and_onto_the_original(quantised, original, tmp_path):
    _, folder = quantised
    adapter = make_adapter_on(folder, tmp_path / "adapter")
    for onto, base in (("trained", None), ("original", original)):
        luthier.export(adapter, tmp_path / onto, to="merged", base=base, onto=onto, dtype="fp32", prove=False)
        assert "quantization_config" not in json.loads((tmp_path / onto / "config.json").read_text())
    plain = {"trained": by_bitsandbytes(folder), "original": tensors(original)}
    delta = PeftModel.from_pretrained(opened(original), str(adapter))
    for onto, values in plain.items():
        found = tensors(tmp_path / onto)
        name = "model.layers.1.mlp.up_proj"
        wanted = values[f"{name}.weight"].float() + delta.base_model.model.get_submodule(name).get_delta_weight(
            "default"
        )
        torch.testing.assert_close(found[f"{name}.weight"], wanted, rtol=0, atol=1e-6)
        untouched = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(found[untouched], values[untouched].float())
    with pytest.raises(luthier.RequestError, match="original"):
        luthier.export(adapter, tmp_path / "no", to="merged", onto="original")
    with pytest.raises(luthier.RequestError, match="onto"):
        luthier.export(adapter, tmp_path / "no", to="merged", onto="nothing")


@pytest.mark.slow
def test_proof_measures_both_against_the_live_model(quantised, original, tmp_path):
    name, folder = quantised
    adapter = make_adapter_on(folder, tmp_path / "adapter")
    luthier.export(adapter, tmp_path / "out", to="merged", base=original, onto="trained", dtype="fp32")
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "passed", proof
    assert proof["max_difference"] <= proof["bound"] < proof["effect"] / 10
    assert "dequantised by transformers" in proof["compared"]
    assert "nearer" in proof["says"] and "original" in proof["says"]
    luthier.export(adapter, tmp_path / "other", to="merged", base=original, onto="original", dtype="fp32")
    other = json.loads((tmp_path / "other/proof.json").read_text())
    assert other["verdict"] == "passed"
    assert "nearer" in other["says"]
    if name != "int8":  # whose kernels round activations by more than quantising moved the weights
        assert "the original weights are nearer" not in proof["says"] + other["says"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "other", "out"]


@pytest.mark.slow
def test_proof_of_a_dequantised_copy_wants_equal_bits(quantised, tmp_path):
    _, folder = quantised
    luthier.export(folder, tmp_path / "out", to="transformers", dtype="bf16")
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "passed" and proof["max_difference"] == proof["bound"] == 0
    assert "dequantised by transformers" in proof["compared"] and "kernels" in proof["says"]
    wrong = tensors(tmp_path / "out")
    wrong["model.layers.1.mlp.up_proj.weight"][3] *= 1.05
    save_file(wrong, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(luthier.ArtifactError, match="more than the bound 0"):
        prove_dequantised(folder, "BF16")(tmp_path / "out")


def test_quantised_weight_without_its_parts_is_an_error(quantised, tmp_path):
    _, folder = quantised
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_bytes((folder / "config.json").read_bytes())
    kept = tensors(folder)
    lost = next(name for name in kept if name.endswith((".absmax", ".SCB")) and "nested" not in name)
    save_file({name: tensor for name, tensor in kept.items() if name != lost}, tmp_path / "broken/model.safetensors")
    with pytest.raises(luthier.ArtifactError, match=lost.rpartition(".")[0]):
        luthier.export(tmp_path / "broken", tmp_path / "out", to="transformers", prove=False)
