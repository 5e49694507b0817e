"""Section 1 of the table of failures: keys that match nothing, and nobody says so."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig
from rows import (
    ADAPTER,
    IDS,
    adapted,
    edit,
    logits,
    lora,
    mended,
    opens_and_trains,
    plain,
    plain_adapter,
    said,
    trained,
    without,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Trainer, TrainingArguments
from wrappers import WRAPPERS, one_process, seen

import luthier
from luthier.config.schema import AdapterConfig
from luthier.models import adapters

WRAPPED = pytest.mark.parametrize("wrapper", list(WRAPPERS))


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    with one_process(tmp_path_factory.mktemp("group")):
        yield


@WRAPPED
def test_adapter_saved_from_within_a_wrapper_opens_trains_and_is_mended(base, tmp_path, wrapper):
    """P#2957, P#2681: prefixes end up in an adapter's file, nothing matches on reload, lora_B stays 0 and the exit code too."""
    model = adapted(base)
    names, wanted = trained(model), logits(model)
    model.save_pretrained(tmp_path / "a")
    state = {name: tensor for name, tensor in seen(WRAPPERS[wrapper](model)).items() if "lora_" in name}
    save_file(state, tmp_path / "a" / ADAPTER)
    assert not torch.equal(logits(plain_adapter(base, tmp_path / "a")), wanted)  # the failure, as others have it

    prefixed = any(part in name for name in state for part in ("_orig_mod.", "module.", "_wrapped_module."))
    kind, codes = said(tmp_path / "a")
    assert kind == "adapter" and prefixed and codes == {"wrapped-names", "adapter-names"}
    opens_and_trains(tmp_path / "a", wanted, names)
    mended(tmp_path / "a", tmp_path / "out")
    assert torch.equal(logits(plain_adapter(base, tmp_path / "out")), wanted)


def test_adapter_that_peft_saves_with_compiled_layers_opens_and_is_mended(base, tmp_path):
    """P#2957: `save_pretrained` itself writes `_orig_mod.` where layers are compiled one by one."""
    model = adapted(base)
    names, wanted = trained(model), logits(model)
    WRAPPERS["compiled_layers"](model).save_pretrained(tmp_path / "a")
    assert any("._orig_mod." in name for name in load_file(tmp_path / "a" / ADAPTER))
    assert said(tmp_path / "a") == ("adapter", {"wrapped-names"})
    opens_and_trains(tmp_path / "a", wanted, names)
    mended(tmp_path / "a", tmp_path / "out")
    assert torch.equal(logits(plain_adapter(base, tmp_path / "out")), wanted)


@WRAPPED
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_model_saved_from_within_a_wrapper_opens_trains_and_is_mended(base, tmp_path, wrapper, form):
    """P#2681: the same of a whole model: plain transformers draws every weight at random, and only warns."""
    model = plain(base)
    names, wanted = trained(model), logits(model)
    folder = without(base, tmp_path / "m", "model.safetensors")
    state = seen(WRAPPERS[wrapper](model))
    if form.endswith(".bin"):
        torch.save(state, folder / form)
    else:
        save_file(state, folder / form, {"format": "pt"})
    expected = {"pickle-only"} if form.endswith(".bin") else {"wrapped-names"}
    assert said(folder) == ("base", expected)
    opens_and_trains(folder, wanted, names)
    mended(folder, tmp_path / "out")
    assert torch.equal(logits(plain(tmp_path / "out")), wanted)


@pytest.mark.parametrize(
    ("lost", "codes", "refused"),
    [
        ("layers.1.self_attn", set(), "coverage"),
        ("layers.1.self_attn.q_proj.lora_B", {"adapter-pairs"}, "adapter-pairs"),
    ],
    ids=["a layer", "half a pair"],
)
def test_adapter_without_some_of_its_tensors_is_refused_and_names_them(base, tmp_path, lost, codes, refused):
    """P#1932, P#2115, P#2699: missing adapter keys are a warning or nothing."""
    model = adapted(base)
    model.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "a")
    kept = {name: tensor for name, tensor in load_file(tmp_path / "a" / ADAPTER).items() if lost not in name}
    save_file(kept, tmp_path / "a" / ADAPTER)
    plain_adapter(base, tmp_path / "a")  # opens, with a layer at its start
    assert said(tmp_path / "a")[1] == codes
    with pytest.raises(luthier.ArtifactError, match=r"layers.*self_attn\.q_proj") as refusal:
        luthier.load(tmp_path / "a", device="cpu")
    assert refusal.value.code == refused
    assert "save the adapter again" in str(refusal.value) or "use another checkpoint" in str(refusal.value)
    opens_and_trains(tmp_path / "whole", logits(model), trained(model))


def test_adapter_without_its_modules_saved_whole_is_refused(untied, tmp_path):
    """P#2115: what `modules_to_save` names is not in the file, and peft opens the adapter with the base's."""
    adapted(untied, lora(modules_to_save=["lm_head"])).save_pretrained(tmp_path / "a")
    kept = {name: tensor for name, tensor in load_file(tmp_path / "a" / ADAPTER).items() if "lm_head" not in name}
    save_file(kept, tmp_path / "a" / ADAPTER)
    with pytest.raises(luthier.ArtifactError, match="lm_head") as refusal:
        luthier.load(tmp_path / "a", device="cpu")
    assert refusal.value.code == "coverage"


def test_misspelt_target_is_refused_though_another_matches(base, tmp_path):
    """P#1959: a misspelt target is ignored as long as another matches."""
    targets = ["q_proj", "v_prjo"]
    model = adapted(base, lora(target_modules=targets))  # peft says nothing
    assert not any("v_proj" in name for name in trained(model))
    with pytest.raises(luthier.RequestError, match="v_prjo") as refusal:
        adapters.config_for(plain(base), AdapterConfig(type="lora", r=4, target=targets))
    assert refusal.value.code == "no-target" and "v_proj" in refusal.value.remedy
    model.save_pretrained(tmp_path / "a")  # what it trained is whole all the same
    opens_and_trains(tmp_path / "a", logits(model), trained(model))


def test_adapter_on_experts_opens_trains_and_merges_whole(experts, tmp_path):
    """Z#779, Z#885, Z#942, U#2966: merged models lack expert deltas or up_proj."""
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model = adapted(experts, config)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "a")
    opens_and_trains(tmp_path / "a", wanted, trained(model))
    luthier.export(tmp_path / "a", tmp_path / "merged", to="merged", prove=False)
    merged, before = load_file(tmp_path / "merged/model.safetensors"), load_file(experts / "model.safetensors")
    assert merged.keys() == before.keys()
    unchanged = {name for name in merged if ".experts." in name and torch.equal(merged[name], before[name])}
    assert unchanged == set()
    assert torch.allclose(logits(plain(tmp_path / "merged")), wanted, atol=1e-4)


def test_trainers_checkpoint_of_a_mixture_of_experts_gives_back_every_expert(experts, tmp_path):
    """T#48805: full fine-tuning of a mixture, resumed: expert weights are not restored, and a log line is all there is."""
    model = plain(experts)
    rows = [{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 2
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, learning_rate=1e-2, report_to="none", disable_tqdm=True, save_steps=1
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert said(tmp_path / "checkpoint-1") == ("trainer_checkpoint", {"no-tokenizer"})
    opens_and_trains(tmp_path / "checkpoint-1", logits(model), trained(model))


def test_base_with_its_experts_saved_fused_opens_and_trains(experts, tmp_path):
    """T#42491, N#1814: transformers 5 fuses experts in memory; files keep one tensor per expert."""
    model = plain(experts)
    shutil.copytree(experts, tmp_path / "m")
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "m/model.safetensors", {"format": "pt"})  # fmt: skip
    assert said(tmp_path / "m")[0] == "base"
    opens_and_trains(tmp_path / "m", logits(model), trained(model))


def test_adapter_on_experts_one_by_one_opens_on_a_model_that_fuses_them(experts, tmp_path):
    """U#5403: adapters built for experts one by one silently miss the fused layout."""
    model = adapted(experts, lora(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / ADAPTER)
    for layer in (0, 1):
        for expert in range(4):
            name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.down_proj"
            tensors |= {f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(32, 4)}
    save_file(tensors, tmp_path / "a" / ADAPTER)
    edit(tmp_path / "a/adapter_config.json", target_modules=["q_proj", "down_proj"])
    plain_adapter(experts, tmp_path / "a")  # sixteen tensors are left out, and nobody says so
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            scaling = model.peft_config["default"].lora_alpha / 4
            layer.mlp.experts.down_proj += scaling * torch.ones(32, 4) @ torch.ones(4, 32)
    opened, _ = luthier.load(tmp_path / "a", device="cpu")
    torch.testing.assert_close(logits(opened), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"], ["lm_head"]], ids=["none", "both", "head"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_grown_vocabulary_with_modules_saved_whole_comes_back_and_trains(base, untied, tmp_path, saved, tie):
    """U#9326, Z#369, U#3926: trained embeddings or head are not trained, not saved or not merged."""
    base = base if tie else untied
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|tool|>", "<|answer|>"])
    model = plain(base)
    model.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)  # to more rows than there are tokens
    model = adapted(model, lora(modules_to_save=saved))
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    assert said(tmp_path / "a") == ("adapter", set())
    opens_and_trains(tmp_path / "a", logits(model), trained(model))
    luthier.export(tmp_path / "a", tmp_path / "merged", to="merged", prove=False)
    assert torch.allclose(logits(plain(tmp_path / "merged")), logits(model), atol=1e-4)


def test_trained_rows_of_the_vocabulary_come_back_and_train(base, tmp_path):
    """U#3926: added tokens trained as rows of a tied embedding."""
    model = adapted(base, lora(trainable_token_indices=[5, 7]))
    model.save_pretrained(tmp_path / "a")
    opens_and_trains(tmp_path / "a", logits(model), trained(model))
    luthier.export(tmp_path / "a", tmp_path / "merged", to="merged", prove=False)
    assert torch.allclose(logits(plain(tmp_path / "merged")), logits(model), atol=1e-4)
