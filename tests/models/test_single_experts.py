"""Adapters trained on experts one by one, as before transformers 5, on models that hold them fused."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import luthier

IDS = torch.tensor([[1, 5, 80, 81, 2, 7, 9, 33, 44, 120]])
LEAVES = {"qwen": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
INNER = {"qwen": "mlp", "mixtral": "block_sparse_moe"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, num_local_experts=4, head_dim=8)  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder / "mixtral")
    tiny.make_tokenizer(folder / "mixtral")
    return {"qwen": tiny.make_qwen3_moe(folder / "qwen"), "mixtral": folder / "mixtral"}


def write_adapter(folder, base, kind, parts, *, rank=4, alpha=8, rslora=False, dropout=0.0, missing=(), **more):
    """An adapter as peft wrote it when every expert was three linear layers; returns what it adds to the fused weights."""
    torch.manual_seed(1)
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    tensors, added = {}, {}
    for layer in range(2):
        fused = {"gate_up_proj": torch.zeros(4, 64, 32), "down_proj": torch.zeros(4, 32, 32)}
        for expert in range(4):
            for part in parts:
                if (expert, part) in missing:
                    continue
                name = f"base_model.model.model.layers.{layer}.{INNER[kind]}.experts.{expert}.{LEAVES[kind][part]}"
                a, b = torch.randn(rank, 32) * 0.2, torch.randn(32, rank) * 0.2
                tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
                if part == 2:
                    fused["down_proj"][expert] += scale * b @ a
                else:
                    fused["gate_up_proj"][expert, part * 32 : part * 32 + 32] += scale * b @ a
        added[layer] = fused
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        a, b = torch.randn(rank, 32) * 0.2, torch.randn(32, rank) * 0.2
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        added[layer]["q_proj"] = scale * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "lora_dropout": dropout,
            "base_model_name_or_path": str(base), "target_modules": ["q_proj", *(LEAVES[kind][part] for part in parts)], **more}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return added


def wanted(base, added):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        for layer, tensors in added.items():
            home = model.model.layers[layer]
            home.self_attn.q_proj.weight += tensors["q_proj"]
            home.mlp.experts.gate_up_proj += tensors["gate_up_proj"]
            home.mlp.experts.down_proj += tensors["down_proj"]
        return model(IDS).logits


@pytest.mark.parametrize("kind", ["qwen", "mixtral"])
@pytest.mark.parametrize(
    "settings",
    [
        {"parts": (0, 1, 2)},
        {"parts": (0, 1, 2), "rslora": True, "dropout": 0.05},
        {"parts": (2,)},
        {"parts": (1,)},
        {"parts": (0, 1, 2), "missing": {(3, 0), (3, 1), (3, 2), (0, 1)}},
    ],
    ids=["all", "rslora-dropout", "down", "up", "some-experts"],
)
def test_adapter_on_single_experts_gives_its_logits_and_trains(bases, tmp_path, kind, settings):
    added = write_adapter(tmp_path / "a", bases[kind], kind, **settings)
    expected = wanted(bases[kind], added)
    model, _ = luthier.load(tmp_path / "a", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(expected, AutoModelForCausalLM.from_pretrained(bases[kind])(IDS).logits, atol=1e-2)

    model, _ = luthier.load(tmp_path / "a", device="cpu", trainable=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "experts" in n)


def test_saved_again_it_is_of_the_fused_form_that_plain_peft_opens(bases, tmp_path):
    added = write_adapter(tmp_path / "a", bases["mixtral"], "mixtral", (0, 1, 2))
    model, tokenizer = luthier.load(tmp_path / "a", device="cpu")
    luthier.save(model, tmp_path / "saved", tokenizer=tokenizer)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, wanted(bases["mixtral"], added), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_merging_it_needs_no_conversion(bases, tmp_path, kind):
    added = write_adapter(tmp_path / "a", bases[kind], kind, (0, 1, 2))
    luthier.export(tmp_path / "a", tmp_path / "out", to="merged")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    torch.testing.assert_close(found, wanted(bases[kind], added), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"rank_pattern": {"w1": 2, "gate_proj": 2}}], ids=["dora", "rank_pattern"])  # fmt: skip
def test_what_has_no_fused_form_is_refused(bases, tmp_path, more):
    write_adapter(tmp_path / "a", bases["qwen"], "qwen", (0, 1, 2), **more)
    with pytest.raises(luthier.RequestError, match="one by one") as refusal:
        luthier.load(tmp_path / "a", device="cpu")
    assert refusal.value.code == "single-experts"
