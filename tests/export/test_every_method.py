"""Every method of the installed peft either merges to what peft merges in memory, or is refused by name."""

import json
from importlib.util import find_spec
from pathlib import Path

import peft_methods
import pytest
import tiny
import torch
from adapters import logits, opened, tensors
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import luthier
from luthier.export.merged.merge import merge_folders
from luthier.export.merged.methods import FORMULA, IN_MEMORY, NO_WEIGHTS, THROUGH_PEFT

NEEDS = {"ADAMSS": "sklearn"}  # what a method of peft imports beyond peft


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A Llama whose layers have biases, so that what methods do to them counts."""
    folder = tmp_path_factory.mktemp("bases")
    config = LlamaConfig.from_pretrained(tiny.make_llama(folder / "plain", tie=False))
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0.0, 0.2)
    model.save_pretrained(folder / "base")
    return folder / "base"


def test_every_method_of_peft_is_decided():
    decided = [*FORMULA, *THROUGH_PEFT, *NO_WEIGHTS, *IN_MEMORY]
    assert sorted(decided) == peft_methods.methods() == sorted(peft_methods.SETTINGS)


@pytest.mark.parametrize("method", [*FORMULA, *THROUGH_PEFT])
def test_merges_to_what_peft_merges(method, base, tmp_path):
    if method in NEEDS and find_spec(NEEDS[method]) is None:
        with pytest.raises(ImportError):  # peft itself has no such method here
            peft_methods.make_method(base, tmp_path / "adapter", method)
        return
    live = peft_methods.make_method(base, tmp_path / "adapter", method)
    wanted = logits(live)
    with live.disable_adapter():
        effect = (logits(live) - wanted).abs().max()
    assert effect > 1e-3 * wanted.abs().max()
    merge_folders(base, tmp_path / "adapter", tmp_path / "merged")
    assert (logits(opened(tmp_path / "merged")) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    merged = PeftModel.from_pretrained(opened(base), str(tmp_path / "adapter")).merge_and_unload().state_dict()
    found = tensors(tmp_path / "merged")
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        assert (tensor - found[name]).abs().max() <= 2**-21 * tensor.abs().max(), name


@pytest.mark.parametrize("method", [*NO_WEIGHTS, *IN_MEMORY, "NEWER"])
def test_what_cannot_be_merged_is_refused_by_name(method, base, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": method}))
    with pytest.raises(luthier.RequestError, match=method) as raised:
        merge_folders(base, tmp_path / "adapter", tmp_path / "merged")
    assert raised.value.code == "cannot-merge"
    assert not (tmp_path / "merged").exists()


def test_biases_trained_beside_a_method_are_merged_once(base, tmp_path):
    live = peft_methods.make_method(base, tmp_path / "adapter", "OFT", bias="all", modules_to_save=["lm_head"])
    merge_folders(base, tmp_path / "adapter", tmp_path / "merged")
    wanted = logits(live)
    assert (logits(opened(tmp_path / "merged")) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    before, after = tensors(base), tensors(tmp_path / "merged")
    assert not torch.equal(
        before["model.layers.0.self_attn.v_proj.bias"], after["model.layers.0.self_attn.v_proj.bias"]
    )
    assert not torch.equal(
        before["model.layers.0.self_attn.q_proj.bias"], after["model.layers.0.self_attn.q_proj.bias"]
    )
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_layer_without_its_tensors_is_an_error(base, tmp_path):
    from safetensors.torch import load_file, save_file

    peft_methods.make_method(base, tmp_path / "adapter", "LOHA")
    path = tmp_path / "adapter/adapter_model.safetensors"
    kept = load_file(path)
    whole = dict(kept)
    del kept[next(name for name in kept if "layers.1.mlp" in name)]
    save_file(kept, path)
    with pytest.raises(luthier.ArtifactError, match=r"layers\.1\.mlp"):
        merge_folders(base, tmp_path / "adapter", tmp_path / "merged")
    save_file({name: tensor for name, tensor in whole.items() if "layers.1" not in name}, path)
    with pytest.raises(luthier.ArtifactError, match=r"layers\.1"):
        merge_folders(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
