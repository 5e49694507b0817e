"""Adapters: what they go on, what they are called, and that plain peft opens what was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_llama, make_qwen3_moe, make_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from luthier.config.schema import AdapterConfig, ModelConfig
from luthier.errors import RequestError
from luthier.models.adapters import attach, check, matched, summary
from luthier.models.compile import by_layer
from luthier.models.memory import keep, recompute
from luthier.models.open import Base, BaseSource, open_base

IDS = torch.tensor([[1, 5, 80, 81, 2, 7, 9]])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "llama")


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return make_qwen3_moe(tmp_path / "moe")


def attached(folder: Path, adapter: AdapterConfig, *, seed: int = 0, **settings) -> PeftModel:
    base = open_base(ModelConfig(path=str(folder), **settings))
    return attach(base, adapter, new_token_ids=base.new_token_ids, base_name=str(folder), seed=seed)


def train_a_step(model, ids=IDS) -> None:
    model.train()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def reloaded(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(r=4),
        AdapterConfig(r=4, dropout=0.1),
        AdapterConfig(r=4, dora=True),
        AdapterConfig(r=4, rslora=True, target=["q_proj", "v_proj"]),
        AdapterConfig(r=4, target=r".*\.1\.mlp\.(up|down)_proj"),
        AdapterConfig(r=4, target="q_proj", modules_to_save=["embed_tokens"]),
        AdapterConfig(r=4, target="q_proj", modules_to_save=["norm"]),
        AdapterConfig(type="loha", r=4),
        AdapterConfig(type="lokr", r=4),
        AdapterConfig(type="ia3"),
        AdapterConfig(type="vera", r=4),
        AdapterConfig(type="oft"),
        AdapterConfig(type="oft", r=8, oft_block_size=0, target=["q_proj"]),
        AdapterConfig(type="ln_tuning"),
    ],
    ids=lambda adapter: "-".join([adapter.type, *sorted(adapter.model_fields_set - {"type"})]),
)
@pytest.mark.parametrize("tie", [True, False])
def test_trained_adapter_opens_with_plain_peft_to_equal_logits(adapter, tie, tmp_path):
    folder = make_llama(tmp_path / "llama", tie=tie)
    model = attached(folder, adapter)
    before = logits(model)
    train_a_step(model)
    assert not torch.equal(before, logits(model))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded(folder, tmp_path / "out")), logits(model))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_moe_adapter_reloads_and_says_what_becomes_of_the_experts(moe, tmp_path, dropout):
    model = attached(moe, AdapterConfig(r=4, dropout=dropout))
    found = matched(model)
    assert "gate" not in found.by_name and "lm_head" not in found.by_name
    assert found.by_name["q_proj"] == 2
    assert ("gate_up_proj" in found.by_name) == (dropout == 0)
    assert bool(found.notes) == (dropout > 0) and all("dropout 0" in note for note in found.notes)
    train_a_step(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded(moe, tmp_path / "out")), logits(model))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("spare", [True, False])
def test_rows_of_new_tokens_are_trained_and_saved_with_the_adapter(tie, spare, tmp_path):
    folder = make_llama(tmp_path / "m", tie=tie, vocab=330 if spare else 320)
    if spare:
        make_tokenizer(folder, vocab=320)
    base = open_base(ModelConfig(path=str(folder), new_tokens=["<|tool|>", "<|end|>"]))
    assert base.differs is not spare
    plain = folder
    if base.differs:
        plain = tmp_path / "base"
        base.model.save_pretrained(plain)
    model = attach(base, AdapterConfig(r=2), new_token_ids=base.new_token_ids, base_name=str(plain), seed=0)
    assert any("2 rows of" in note for note in matched(model).notes)
    rows = base.model.get_input_embeddings().weight
    before = rows.detach().clone()
    train_a_step(model, torch.tensor([[1, 5, 320, 81, 321, 7]]))
    model.save_pretrained(tmp_path / "out")
    ids = torch.tensor([[3, 320, 9, 321]])
    again = reloaded(plain, tmp_path / "out")
    assert torch.equal(logits(again, ids), logits(model, ids))
    merged = again.merge_and_unload()
    changed = (merged.get_input_embeddings().weight[: len(before)] != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [320, 321]
    if tie:
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    else:
        assert (merged.get_output_embeddings().weight[320] != rows[320]).any()


def test_initialisation_depends_on_the_seed_alone(llama):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = attached(llama, AdapterConfig(r=2), seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, third = attached(llama, AdapterConfig(r=2), seed=7), attached(llama, AdapterConfig(r=2), seed=8)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), third.get_parameter(name))


def test_adapter_config_names_base_and_short_targets(llama, tmp_path):
    model = attached(llama, AdapterConfig(r=2))
    config = model.peft_config["default"]
    assert config.base_model_name_or_path == str(llama)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (config.r, config.lora_alpha, config.task_type) == (2, 4, "CAUSAL_LM")


def test_conv1d_layers_of_gpt2_count_as_linear(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    base = Base(GPT2LMHeadModel(config), None, BaseSource("folder", tmp_path, str(tmp_path)))
    model = attach(base, AdapterConfig(r=2, fan_in_fan_out=True), base_name="x", seed=0)
    assert matched(model).by_name == {"c_attn": 2, "c_fc": 2, "c_proj": 4}


def test_excluded_layers_are_left_out(llama):
    model = attached(llama, AdapterConfig(r=2, exclude=["down_proj", "layers.1.self_attn.q_proj"]))
    found = matched(model)
    assert found.layers == 11 and "down_proj" not in found.by_name and found.by_name["q_proj"] == 1


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (["q_proj", "w_proj"], r"'w_proj' matches no layer of this model.*Closest: .*_proj"),
        ("w_proj", r"'w_proj' matches no layer"),
        (r".*\.7\..*", "matches no layer"),
        ("mlp", r"a LlamaMLP, which carries no adapter.*down_proj, gate_proj, up_proj"),
        (r".*layers.*", "also matches"),
        ("(", "no valid regular expression"),
    ],
)
def test_target_that_matches_nothing_fit_is_an_error(llama, target, text):
    with pytest.raises(RequestError, match=text) as caught:
        attached(llama, AdapterConfig(target=target))
    assert caught.value.where == "adapter.target"


def test_modules_to_save_must_exist(llama):
    with pytest.raises(RequestError, match=r"no module is called 'embed_token'.*embed_tokens"):
        attached(llama, AdapterConfig(modules_to_save=["embed_token"]))


@pytest.mark.parametrize(
    ("settings", "where", "text"),
    [
        ({"type": "lorra"}, "adapter.type", "Did you mean lora"),
        ({"type": "prompt_tuning"}, "adapter.type", "virtual tokens"),
        ({"type": "adalora"}, "adapter.type", "reallocates ranks"),
        ({"lora_alpha": 8}, "adapter.lora_alpha", "Use adapter.alpha: 8"),
        ({"rank_patern": {}}, "adapter.rank_patern", "Did you mean rank_pattern"),
        ({"type": "ia3", "r": 8}, "adapter.r", "nothing that corresponds"),
        ({"type": "loha", "dora": True}, "adapter.dora", "nothing that corresponds"),
        ({"inference_mode": True}, "adapter.inference_mode", "set by Luthier"),
        ({"init_lora_weights": "pissa"}, "adapter.init_lora_weights", "changes the base's weights"),
        ({"layers_pattern": "h", "target": "x"}, "adapter", "peft refuses"),
    ],
)
def test_wrong_adapter_keys_are_named_before_any_model_is_loaded(settings, where, text):
    with pytest.raises(RequestError, match=text) as caught:
        check(AdapterConfig(**settings))
    assert caught.value.where == where


def test_pefts_own_keys_are_passed_on(llama):
    model = attached(llama, AdapterConfig(r=4, rank_pattern={"q_proj": 2}, layers_to_transform=[0]))
    assert model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight").shape[0] == 2
    assert matched(model).layers == 7


def test_summary_counts_the_base_without_the_adapter(llama):
    model = attached(llama, AdapterConfig(r=4))
    base = open_base(ModelConfig(path=str(llama))).model
    count = sum(weight.numel() for weight in base.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert summary(model, AdapterConfig(r=4)) == (
        f"LoRA r4 on 14 layers, {trained / 1e3:.1f} k of {count / 1e3:.1f} k parameters"
    )
    assert summary(base, None) == f"full fine-tuning, all {count / 1e3:.1f} k (no `adapter` in the run file)"
    whole = attached(llama, AdapterConfig(r=4, target="q_proj", modules_to_save=["embed_tokens"]))
    assert f"of {count / 1e3:.1f} k" in summary(whole, AdapterConfig(r=4))
    assert summary(attached(llama, AdapterConfig(type="ia3")), AdapterConfig(type="ia3")).startswith("IA3 on 14 layers")


def test_recomputing_gives_the_same_gradients_with_a_frozen_base(llama):
    def gradients(prepare):
        model = attached(llama, AdapterConfig(r=2))
        prepare(model)
        model.train()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    def undone(model):
        recompute(model)
        keep(model)

    kept, recomputed, again = gradients(lambda model: None), gradients(recompute), gradients(undone)
    assert any(gradient.abs().sum() > 0 for gradient in recomputed.values())
    assert all(torch.equal(kept[name], recomputed[name]) and torch.equal(kept[name], again[name]) for name in kept)


def test_compiled_layers_keep_their_names(llama, tmp_path):
    model = attached(llama, AdapterConfig(r=2))
    names = [name for name, _ in model.named_parameters()]
    assert by_layer(model) == 2
    assert [name for name, _ in model.named_parameters()] == names
    model.save_pretrained(tmp_path)
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(RequestError, match="no repeating layers"):
        by_layer(torch.nn.Linear(2, 2))
