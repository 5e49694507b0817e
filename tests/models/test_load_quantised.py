"""Folders that bitsandbytes quantised open as they are, and adapters on them train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import luthier
from luthier.artifacts.identify import identify

IDS = torch.tensor([[5, 6, 7, 8]])
FORMS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=FORMS)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    home = tmp_path_factory.mktemp(request.param)
    base = make_llama(home / "base", hidden=64, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(**FORMS[request.param]),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    model.save_pretrained(home / "quantised")
    make_tokenizer(home / "quantised")
    return request.param, home / "quantised"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def test_quantised_folder_opens_with_the_logits_of_plain_transformers(quantised):
    name, folder = quantised
    model, tokenizer = luthier.load(folder, device="cpu")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})))
    assert tokenizer is not None
    assert identify(folder).precision == name
    with pytest.raises(luthier.RequestError, match="no gradient changes"):
        luthier.load(folder, device="cpu", trainable=True)
    with pytest.raises(luthier.RequestError, match="precision is the folder's own"):
        luthier.load(folder, device="cpu", precision="bf16")


def test_adapter_on_a_quantised_base_opens_and_trains_alone(quantised, tmp_path):
    _, folder = quantised
    base = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    model, _ = luthier.load(tmp_path / "adapter", device="cpu", trainable=True)
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), logits(adapted))
    model.train()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(trained, lr=1e-2).step()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}
