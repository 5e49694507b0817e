"""The proof of models that fit into no memory here: every tensor on slices, merged ones against peft's own layer."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from adapters import make_adapter
from safetensors.torch import load_file, save_file

import luthier
from luthier.export.merged.merge import merge_folders
from luthier.export.proof import exports
from luthier.export.proof.slices import ROWS, prove_slices

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "plain": {"lora_alpha": 16},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 64}},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("base") / "base", dtype=torch.bfloat16, hidden=128, tie=False)


@pytest.fixture(autouse=True)
def no_memory(monkeypatch):
    monkeypatch.setattr(exports, "_fits", lambda folder: False)


def changed(folder: Path, name: str, change) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name].clone())
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(f"no {name}")


@pytest.mark.parametrize(
    "option", [pytest.param(option, marks=[] if option == "dora" else [pytest.mark.slow]) for option in OPTIONS]
)
def test_merge_of_a_model_too_large_for_memory_is_proven_on_slices(option, base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=EVERY, r=4, **OPTIONS[option])
    made = luthier.export(adapter, tmp_path / "out", to="merged", base=base)
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "passed" and "on slices" in made.proof, proof
    assert "14 adapted layers" in proof["compared"] and f"{ROWS} rows" in proof["compared"]


def test_copy_of_a_model_too_large_for_memory_is_proven_on_slices(base, tmp_path):
    luthier.export(base, tmp_path / "out", to="transformers", dtype="fp16", shard_size="100KB")
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "passed" and "every tensor holds the source's numbers" in proof["says"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.0.self_attn.o_proj.weight", None),
        pytest.param("model.layers.1.mlp.up_proj.weight", lambda weight: weight.roll(1, 1), marks=pytest.mark.slow),
        pytest.param("model.layers.0.input_layernorm.weight", lambda weight: weight + 0.25, marks=pytest.mark.slow),
        pytest.param("model.embed_tokens.weight", lambda weight: weight.flip(0), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_wrong_tensor_of_a_merge_fails_on_slices(name, change, base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=EVERY, r=4)
    merged = merge_folders(base, adapter, tmp_path / "merged")
    unmerged = load_file(base / "model.safetensors").get(name)
    changed(merged, name, change or (lambda weight: unmerged))  # None: a layer that was forgotten
    proof = prove_slices(merged, base, adapter)
    assert proof.verdict == "failed" and name.removesuffix(".weight") in proof.says, proof


@pytest.mark.slow
def test_export_whose_slices_are_wrong_publishes_nothing(base, tmp_path, monkeypatch):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=EVERY, r=4)
    monkeypatch.setattr("luthier.export.merged.adapter.Adapter.scaling", lambda self, key, rank, where: 0.25)
    with pytest.raises(luthier.ArtifactError, match="the proof failed"):
        luthier.export(adapter, tmp_path / "out", to="merged", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_adapter_that_changes_nothing_is_not_taken_for_a_proof(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=EVERY, r=4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 1e-9 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    proof = prove_slices(merge_folders(base, adapter, tmp_path / "merged"), base, adapter)
    assert proof.verdict == "inconclusive" and "would not tell the merged model from its base" in proof.says


@pytest.mark.slow
def test_what_has_no_counterpart_on_slices_is_named(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], r=4)
    proof = prove_slices(merge_folders(base, adapter, tmp_path / "merged"), base, adapter)
    assert proof.verdict == "inconclusive" and "model.embed_tokens" in proof.says
