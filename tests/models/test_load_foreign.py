"""What other tools left opens with the same logits and trains on, or is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import luthier
from luthier.models.room import check_room
from tests import tiny

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "m"
    return (tiny.make_llama if request.param == "llama" else tiny.make_qwen3_moe)(folder)


def adapter_on(base, folder, config=None, seed=1):
    torch.manual_seed(seed)
    config = config or LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_bin_weights_open_under_any_wrapper(base, tmp_path, prefix):
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    folder = tmp_path / "bin"
    shutil.copytree(base, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, folder / "pytorch_model.bin")
    model, tokenizer = luthier.load(folder, device="cpu", trainable=True)
    assert torch.equal(logits(model), expected) and tokenizer is not None
    assert all(parameter.requires_grad for parameter in model.parameters())


class Trap:
    def __reduce__(self):
        return print, ("ran",)


def test_pickle_with_code_is_refused_by_name(base, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(luthier.RequestError) as error:
        luthier.load(folder, device="cpu")
    assert error.value.code == "pickle-code" and "print" in str(error.value)


@pytest.mark.parametrize("form", ["plain", "bin", "doubled"])
def test_adapter_opens_in_any_form_and_trains(base, tmp_path, form):
    folder = tmp_path / "a"
    expected = adapter_on(base, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if form == "bin":
        file.unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    if form == "doubled":
        save_file({f"base_model.model.{n.replace('.weight', '.default.weight')}": t for n, t in tensors.items()}, file)
    model, _ = luthier.load(folder, device="cpu", trainable=True)
    assert torch.equal(logits(model), expected)
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in model.parameters()) == len(tensors)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4], init_lora_weights=False),
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, bias="lora_only", init_lora_weights=False),
    ],
    ids=["ia3", "prompt", "modules_to_save", "token_rows", "embeddings", "dora"],
)
def test_methods_open_and_train(base, tmp_path, config):
    expected = adapter_on(base, tmp_path / "a", config)
    model, _ = luthier.load(tmp_path / "a", device="cpu", trainable=True)
    assert torch.equal(logits(model), expected)
    assert luthier.describe(model).trainable > 0


def test_rank_in_the_config_that_is_not_the_files_allocates_nothing_and_is_refused(base, tmp_path):
    adapter_on(base, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 4000000000'))
    with pytest.raises(luthier.ArtifactError):
        luthier.load(tmp_path / "a", device="cpu")


def test_several_adapters_open_combine_and_save_alone(base, tmp_path):
    first = adapter_on(base, tmp_path / "all" / "default")
    second = adapter_on(base, tmp_path / "all" / "weight", seed=2)  # a name that peft would lose
    model, tokenizer = luthier.load(tmp_path / "all", device="cpu", trainable=True)
    assert torch.equal(logits(model), first)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    assert before and all(".default." in name for name in before)
    luthier.combine(model, {"default": 0.0, "weight_adapter": 1.0}, name="both", method="svd")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    luthier.save(model, tmp_path / "alone", tokenizer=tokenizer, adapter="weight_adapter")
    assert torch.equal(logits(luthier.load(tmp_path / "alone", device="cpu")[0]), second)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    for name in ("a.b", "weight", ""):
        with pytest.raises(luthier.RequestError, match="cannot name an adapter"):
            luthier.combine(model, {"default": 1.0}, name=name)


def test_too_little_room_is_told_with_what_would_fit():
    with pytest.raises(luthier.RequestError, match="bf16") as error:
        check_room(1000, "fp32", "cpu", 3000)
    assert error.value.code == "no-memory-for-model"
    check_room(1000, "fp32", "cpu", 4000)


def test_second_adapter_never_replaces_the_one_that_lies_at_the_path(base, tmp_path):
    first = adapter_on(base, tmp_path / "first")
    second = adapter_on(base, tmp_path / "second", seed=2)
    with pytest.raises(luthier.RequestError, match="called 'default' already"):
        luthier.load(tmp_path / "first", adapter=tmp_path / "second", device="cpu")
    model, _ = luthier.load(tmp_path / "first", adapter={"other": tmp_path / "second"}, device="cpu")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), second)


def test_adapter_of_ours_that_is_given_is_checked_to_the_byte(base, tmp_path):
    adapter_on(base, tmp_path / "plain")
    model, tokenizer = luthier.load(tmp_path / "plain", device="cpu")
    luthier.save(model, tmp_path / "ours", tokenizer=tokenizer)
    file = tmp_path / "ours" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(luthier.ArtifactError) as error:
        luthier.load(base, adapter={"ours": tmp_path / "ours"}, device="cpu")
    assert error.value.code == "bytes-changed"


def test_device_that_is_not_there_is_named(base):
    with pytest.raises(luthier.RequestError, match="no device 'cuda:97'"):
        luthier.load(base, device="cuda:97")
