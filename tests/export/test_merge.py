"""Merged in a stream is what peft merges in memory, and computes what base and adapter compute."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from adapters import logits, make_adapter, make_gpt2, make_gpt_oss, opened, tensors
from peft import PeftModel

from luthier.export.merged.merge import merge_folders

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "plain": ("llama", {"target_modules": EVERY, "r": 4, "lora_alpha": 16}),
    "rslora": ("llama", {"target_modules": EVERY, "r": 4, "use_rslora": True}),
    "dora": ("llama", {"target_modules": EVERY, "r": 4, "use_dora": True}),
    "patterns": (
        "llama",
        {"target_modules": EVERY, "r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"v_proj": 3}},
    ),
    "head": ("untied", {"target_modules": ["q_proj", "lm_head"], "r": 4}),
    "head-tied": ("llama", {"target_modules": ["q_proj", "lm_head"], "r": 4}),
    "embeddings": ("untied", {"target_modules": ["q_proj", "embed_tokens"], "r": 4}),
    "embeddings-tied": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "r": 4}),
    "embeddings-tied-together": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "r": 4, "ensure_weight_tying": True}),
    "embeddings-dora": ("untied", {"target_modules": ["embed_tokens"], "r": 4, "use_dora": True}),
    "saved": ("untied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "saved-tied": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved-tied-together": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tokens": ("untied", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 319]}),
    "tokens-tied": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5, 319]}}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "fan_in_fan_out": True}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "r": 4, "use_dora": True, "fan_in_fan_out": True}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "r": 4, "bias": "all", "fan_in_fan_out": True}),
    "own-biases": ("gpt2", {"target_modules": ["c_attn"], "r": 4, "lora_bias": True, "fan_in_fan_out": True}),
    "experts": ("moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 4}),
    "experts-rslora": (
        "moe",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 4, "use_rslora": True, "rank_pattern": {"experts.down_proj": 2}},
    ),
    "experts-one": ("moe", {"target_modules": [], "target_parameters": EXPERTS[1:], "r": 4}),
    "experts-transposed": ("gpt-oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": 4}),
    "own-biases-linear": ("gpt-oss", {"target_modules": ["q_proj", "o_proj"], "r": 4, "lora_bias": True, "use_rslora": True}),
    "grown": ("untied", {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["embed_tokens", "lm_head"], "grow": 5}),
}  # fmt: skip


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": tiny.make_llama(folder / "llama", shard="40KB"),
        "untied": tiny.make_llama(folder / "untied", tie=False),
        "moe": tiny.make_qwen3_moe(folder / "moe"),
        "gpt2": make_gpt2(folder / "gpt2"),
        "gpt-oss": make_gpt_oss(folder / "gpt-oss"),
    }


def grown(base: Path, settings: dict):
    model = opened(base)
    if settings.get("grow"):
        model.resize_token_embeddings(model.config.vocab_size + settings["grow"], mean_resizing=False)
    return model


QUICK = (
    "plain",
    "head-tied",
    "embeddings-tied",
    "saved-tied-together",
    "tokens-tied",
    "experts",
    "grown",
)  # tensors of all others: below


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]
)
def test_merged_folder_computes_what_base_and_adapter_compute(case, bases, tmp_path):
    kind, settings = CASES[case]
    base = bases[kind]
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    merge_folders(base, adapter, tmp_path / "merged")
    live = PeftModel.from_pretrained(grown(base, settings), str(adapter))
    wanted, found = logits(live), logits(opened(tmp_path / "merged"))
    with live.disable_adapter():
        effect = (logits(live) - wanted).abs().max()
    assert effect > 1e-3 * wanted.abs().max()
    assert (wanted - found).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("case", [name for name in CASES if "tied" not in name])
def test_merged_tensors_are_those_of_peft(case, bases, tmp_path):
    kind, settings = CASES[case]
    base = bases[kind]
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    merge_folders(base, adapter, tmp_path / "merged")
    PeftModel.from_pretrained(grown(base, settings), str(adapter)).merge_and_unload().save_pretrained(tmp_path / "peft")
    wanted, found = tensors(tmp_path / "peft"), tensors(tmp_path / "merged")
    assert wanted.keys() == found.keys()
    changed = 0
    before = tensors(base)
    for name in wanted:
        # two ulps of the largest element: norms and sums of a rank's products are rounded in another order
        assert (wanted[name] - found[name]).abs().max() <= 2**-22 * wanted[name].abs().max(), name
        changed += before[name].shape != found[name].shape or not torch.equal(before[name], found[name])
    assert changed


def test_untied_weights_are_told_in_the_config(bases, tmp_path):
    adapter = make_adapter(bases["llama"], tmp_path / "adapter", target_modules=["lm_head"])
    merge_folders(bases["llama"], adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= tensors(tmp_path / "merged").keys()
