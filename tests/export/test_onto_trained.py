"""An adapter whose base was quantised as it was read is merged into the values that it saw, or into the original ones."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from adapters import make_adapter, opened, tensors
from safetensors.torch import load_file, save_file

import luthier
from luthier.artifacts import manifest as manifests
from luthier.export.merged.as_trained import as_trained, quantised_in_training
from luthier.export.merged.merge import merge_folders
from luthier.export.proof.exports import Values, prove_quantised_merge
from luthier.export.source import open_source
from luthier.models.quantised.layer import QuantisedLinear, quantised_layers

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
KEPT = "model.layers.0.mlp.down_proj"


class Trained:
    """An adapter of Luthier on a base held in `form`, with what its layers dequantise and answer."""

    def __init__(self, form: str, home: Path) -> None:
        self.form = form
        self.base = tiny.make_llama(home / "base", hidden=64, dtype=torch.bfloat16, shard="60KB")
        plain = make_adapter(self.base, home / "plain", r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
        model, tokenizer = luthier.load(self.base, precision=form, adapter=str(plain), device="cpu")
        self.adapter = home / "adapter"
        luthier.save(model, self.adapter, tokenizer=tokenizer)
        layers = model.base_model.model.named_modules()
        self.values = {
            name.replace(".base_layer", ""): layer.dequantize() for name, layer in layers if isinstance(layer, QuantisedLinear)
        }  # fmt: skip
        for layer in quantised_layers(model):
            layer.multiplies = "16 bits"  # fp8 rounds activations too, which no merged model does
        with torch.no_grad():
            self.logits = model.eval()(IDS).logits


@pytest.fixture(scope="module")
def makes(tmp_path_factory):
    return functools.cache(lambda form: Trained(form, tmp_path_factory.mktemp(form)))


@pytest.fixture(params=["nf4", "int8", "fp8"])
def trained(request, makes) -> Trained:
    return makes(request.param)


@pytest.fixture
def in_nf4(makes) -> Trained:
    return makes("nf4")


def copied(adapter: Path, folder: Path, change) -> Path:
    """The adapter as plain peft leaves one, its tensors changed."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    file = "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(adapter / file).items()}, folder / file)
    return folder


def test_an_adapter_of_zeros_leaves_the_bits_that_the_layers_dequantised(trained, tmp_path):
    zero = copied(trained.adapter, tmp_path / "zero", lambda name, tensor: torch.zeros_like(tensor))
    how = quantised_in_training(trained.adapter)
    merge_folders(trained.base, zero, tmp_path / "out", quantised=how, dtype="fp32")
    found, files = tensors(tmp_path / "out"), tensors(trained.base)
    assert len(trained.values) == 14
    assert found.keys() == files.keys()
    for name, tensor in found.items():
        packed = name.removesuffix(".weight") in trained.values
        wanted = trained.values[name.removesuffix(".weight")] if packed else files[name]
        assert torch.equal(tensor, wanted.float()), name
        assert packed != torch.equal(tensor, files[name].float())


def test_any_stretch_has_the_bits_of_the_whole_layer(trained):
    with open_source(trained.base) as files:
        source = as_trained(files, quantised_in_training(trained.adapter))
        for name, value in list(trained.values.items())[:3]:
            flat = torch.empty(501)
            source.read(f"{name}.weight", 777, flat)
            assert torch.equal(flat, value.float().reshape(-1)[777 : 777 + 501])


@pytest.mark.slow
def test_merge_is_onto_the_values_seen_and_proven(trained, tmp_path):
    made = luthier.export(trained.adapter, tmp_path / "out", to="merged", dtype="fp32")
    assert any(f"in {trained.form}" in note and "had there" in note for note in made.notes)
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "passed"
    assert "the values that the adapter saw are nearer" in proof["says"]
    assert proof["max_difference"] <= proof["bound"]
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(opened(tmp_path / "out")(IDS).logits, trained.logits, rtol=0, atol=1e-4)
    told = manifests.read(tmp_path / "out").facts["parents"][0]
    assert told["quantisation"]["precision"] == trained.form


def test_without_a_dtype_each_tensor_has_that_of_the_files(in_nf4, tmp_path):
    luthier.export(in_nf4.adapter, tmp_path / "out", to="merged", prove=False)
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.slow
def test_merge_onto_the_original_is_proven_against_it_and_measured_beside_the_live_model(in_nf4, tmp_path):
    trained = in_nf4
    luthier.export(trained.adapter, tmp_path / "out", to="merged", dtype="fp32", onto="original")
    found, files = tensors(tmp_path / "out"), tensors(trained.base)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[name], files[name].float())
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "passed"
    assert "merged onto the original weights" in proof["says"]
    assert proof["unquantised"] > 100 * proof["bound"]


@pytest.mark.slow
def test_proof_fails_where_one_layer_lacks_its_change(in_nf4, tmp_path):
    trained = in_nf4
    how = quantised_in_training(trained.adapter)
    gone = copied(
        trained.adapter,
        tmp_path / "gone",
        lambda name, tensor: tensor * (0 if "layers.1.mlp.up_proj.lora_B" in name else 1),
    )
    prove = prove_quantised_merge(trained.adapter, "trained", Values(trained.base, how), None)
    with pytest.raises(luthier.ArtifactError, match="more than the bound"):
        merge_folders(trained.base, gone, tmp_path / "out", quantised=how, dtype="fp32", prove=prove)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_proof_fails_where_the_values_are_not_the_quantised_ones(in_nf4, tmp_path):
    trained = in_nf4
    how = quantised_in_training(trained.adapter)
    prove = prove_quantised_merge(trained.adapter, "trained", Values(trained.base, how), None)
    with pytest.raises(luthier.ArtifactError, match="more than the bound"):
        merge_folders(trained.base, trained.adapter, tmp_path / "out", dtype="fp32", prove=prove)


def test_layers_chosen_otherwise_than_in_training_are_an_error(in_nf4):
    trained = in_nf4
    how = quantised_in_training(trained.adapter)
    assert how is not None
    other = replace(how, kept=(*how.kept, KEPT))
    with open_source(trained.base) as files, pytest.raises(luthier.RequestError, match=f"in training {KEPT} was kept"):
        as_trained(files, other)
    with open_source(trained.base) as files:
        source = as_trained(files, replace(how, keep=(KEPT,), kept=(*how.kept, KEPT)))
        assert torch.equal(source.tensor(f"{KEPT}.weight"), tensors(trained.base)[f"{KEPT}.weight"])
