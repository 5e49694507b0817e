"""``--to quantized``: what plain transformers would have written, in a stream, and opened by it."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest
import tiny
import torch
from gguf_models import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import luthier
from luthier.cli import main
from luthier.export import quantised
from luthier.export.proof.exports import prove_quantised
from luthier.models.quantised.formats import quantise, scales_of

IDS = torch.tensor([[1, 5, 80, 81, 2, 7, 9]])
PLAIN = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("bases") / "llama", dtype=torch.bfloat16, hidden=64, tie=False)


def proof_of(folder):
    return json.loads((folder / "proof.json").read_text())


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("shard", [None, "100KB"])
def test_folder_holds_the_bytes_that_transformers_writes(base, tmp_path, form, shard, monkeypatch):
    monkeypatch.setattr(quantised, "AT_ONCE", 64 * 5)  # several pieces a matrix
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=PLAIN[form], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    luthier.export(base, tmp_path / "ours", to="quantized", packing=form, shard_size=shard, prove=False)
    theirs = load_file(tmp_path / "plain/model.safetensors")
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) > 1) == (shard is not None)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("form", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_export_is_proven_to_be_what_quantising_the_source_gives(base, tmp_path, form, capsys):
    assert main(["export", str(base), str(tmp_path / "out"), "--to", "quantized", "--format", form]) == 0
    proof = proof_of(tmp_path / "out")
    assert proof["verdict"] == "passed" and proof["max_difference"] == 0 and proof["unquantised"] > 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    model, _ = luthier.load(tmp_path / "out", device="cpu")
    assert torch.isfinite(model(IDS).logits).all()
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "base"


@pytest.mark.slow
def test_rows_that_blocks_would_cross_stay_in_16_bits_and_plain_transformers_agrees(tmp_path):
    base = tiny.make_llama(tmp_path / "odd", dtype=torch.bfloat16, hidden=32)
    made = luthier.export(base, tmp_path / "out", to="quantized", packing="nf4")
    assert proof_of(tmp_path / "out")["verdict"] == "passed"
    assert any("gate_proj" in note and "64" in note for note in made.notes)
    kept = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    names = load_file(tmp_path / "out/model.safetensors")
    packed = {name.partition(".weight.absmax")[0] for name in names if name.endswith(".absmax")}
    assert packed and not packed & set(kept) and "model.layers.0.mlp.gate_proj" in kept


def test_fp8_folder_has_the_form_of_compressed_tensors(base, tmp_path):
    luthier.export(base, tmp_path / "out", to="quantized", packing="fp8", prove=False)
    weights, before = load_file(tmp_path / "out/model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    codes, scale = weights[f"{name}.weight"], weights[f"{name}.weight_scale"]
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (codes.shape[0], 1)
    again, wanted = codes.float() * scale, before[f"{name}.weight"].float()
    assert ((again - wanted).abs() <= wanted.abs() * 2**-4 + scale * 2**-9).all()  # e4m3 keeps three bits of fraction
    told = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "compressed-tensors" and "lm_head" in told["ignore"]
    assert weights["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_fp8_folder_is_proven_to_hold_the_source_rounded_to_e4m3(base, tmp_path):
    luthier.export(base, tmp_path / "out", to="quantized", packing="fp8")
    proof = proof_of(tmp_path / "out")
    if find_spec("compressed_tensors") is None:
        assert proof["verdict"] == "inconclusive" and "compressed-tensors is not installed" in proof["says"]
        return
    assert proof["verdict"] == "passed" and proof["max_difference"] == proof["bound"] == 0
    assert "rounding activations while serving" in proof["says"] and proof["unquantised"] > 0
    weights = load_file(tmp_path / "out/model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight_scale"][3] *= 1.05
    save_file(weights, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(luthier.ArtifactError, match="more than the bound 0"):
        prove_quantised(base, "fp8", ["lm_head"], "bfloat16")(tmp_path / "out")


@pytest.mark.slow
def test_mixture_keeps_its_experts_and_routers_and_plain_transformers_agrees(tmp_path):
    base = tiny.make_qwen3_moe(tmp_path / "moe", dtype=torch.bfloat16, hidden=64)
    made = luthier.export(base, tmp_path / "out", to="quantized", packing="nf4")
    assert proof_of(tmp_path / "out")["verdict"] == "passed"
    assert any("down_proj" in note and "no plain linear layers" in note for note in made.notes)
    before, found = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    packed = {name.partition(".weight.absmax")[0] for name in found if name.endswith(".absmax")}
    assert packed == {
        f"model.layers.{n}.self_attn.{one}_proj" for n in (0, 1) for one in "qkv"
    }  # o_proj's rows are 32 long
    left = [name for name in before if name.removesuffix(".weight") not in packed]
    assert sum(".experts." in name for name in left) == 2 * 4 * 3
    assert all(torch.equal(found[name], before[name]) for name in left)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(model.model.layers[0].mlp.experts.down_proj) is torch.nn.Parameter
        assert torch.isfinite(model(IDS).logits).all()


def test_fp8_names_fused_experts_among_what_is_not_quantised(tmp_path):
    base = tiny.make_qwen3_moe(tmp_path / "moe", dtype=torch.bfloat16)
    luthier.export(base, tmp_path / "out", to="quantized", packing="fp8", prove=False)
    ignored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    patterns = [name.removeprefix("re:") for name in ignored if name.startswith("re:")]
    for name in (name.removesuffix(".weight") for name in load_file(base / "model.safetensors")):
        assert any(re.match(pattern, name) for pattern in patterns) == (".experts." in name)
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.experts"} <= set(ignored)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("qwen2", "int8"), ("gemma3", "nf4")])
def test_biases_and_tied_embeddings_stay_and_plain_transformers_agrees(tmp_path, name, form):
    base = make_model(name, tmp_path / name, dtype=torch.bfloat16, num_hidden_layers=2)
    before = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in before  # tied
    luthier.export(base, tmp_path / "out", to="quantized", packing=form)
    proof = proof_of(tmp_path / "out")
    assert proof["verdict"] == "passed" and proof["max_difference"] == 0 and proof["unquantised"] > 0
    found = load_file(tmp_path / "out/model.safetensors")
    same = [key for key in before if key.endswith(("bias", "norm.weight", "embed_tokens.weight"))]
    assert (name == "qwen2") == any(key.endswith("q_proj.bias") for key in same)
    assert all(torch.equal(found[key], before[key]) for key in same)
    assert "lm_head.weight" not in found
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("settings", "code"),
    [({"packing": "nf5"}, "form"), ({"packing": "nf4", "dtype": "fp64"}, "dtype")],
    ids=["format", "dtype"],
)
def test_wrong_requests_are_named(base, tmp_path, settings, code):
    with pytest.raises(luthier.RequestError) as refusal:
        luthier.export(base, tmp_path / "out", to="quantized", **settings)
    assert refusal.value.code == code and not (tmp_path / "out").exists()


def test_quantised_folders_and_adapters_are_refused(base, tmp_path):
    luthier.export(base, tmp_path / "out", to="quantized", packing="int8", prove=False)
    with pytest.raises(luthier.RequestError) as refusal:
        luthier.export(tmp_path / "out", tmp_path / "again", to="quantized", packing="nf4")
    assert refusal.value.code == "quantised-base"
    with pytest.raises(luthier.RequestError, match="format"):
        luthier.export(base, tmp_path / "again", to="transformers", packing="nf4")


@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_alone_are_those_that_packing_gives(form, dtype):
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    weight[5] *= 2.0**-12
    weight[7, 100] = 900
    assert torch.equal(scales_of(weight, form), quantise(weight, form).scales)
