"""A LoRA adapter in llama.cpp's form opens on its base with the logits of the PEFT folder that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import make_llama
from transformers import AutoModelForCausalLM

import luthier

IDS = torch.tensor([[5, 6, 7, 8]])
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in llama.cpp's order, as its converter puts them: halves of a head become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a PEFT folder on it, and the same adapter written as llama.cpp's convert_lora_to_gguf.py does."""
    home = tmp_path_factory.mktemp("gguf-adapter")
    base = make_llama(home / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(home / "adapter")
    writer = gguf.GGUFWriter(home / "adapter.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 12.0)
    for name, tensor in load_file(home / "adapter" / "adapter_model.safetensors").items():
        _, _, rest = name.partition("layers.")
        number, _, rest = rest.partition(".")
        layer, _, part = rest.partition(".lora_")
        short = NAMES[layer]
        if part.startswith("B") and short in ("attn_q", "attn_k"):
            tensor = neighbours(tensor, {"attn_q": 4, "attn_k": 2}[short])
        writer.add_tensor(f"blk.{number}.{short}.weight.lora_{part[0].lower()}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return base, home / "adapter", home / "adapter.gguf"


def test_gguf_adapter_computes_what_its_peft_folder_computes_and_trains(pair):
    base, folder, file = pair
    model, _ = luthier.load(base, adapter=file, device="cpu", trainable=True)
    assert torch.equal(logits(model), logits(luthier.load(folder, device="cpu")[0]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


def test_gguf_adapter_alone_says_that_it_needs_its_base(pair):
    with pytest.raises(luthier.RequestError, match="give its base as path and this file as adapter"):
        luthier.load(pair[2])


def test_gguf_adapter_on_another_shape_of_base_is_refused(pair, tmp_path):
    other = make_llama(tmp_path / "other", layers=1)
    with pytest.raises(luthier.ArtifactError, match="has no place"):
        luthier.load(other, adapter=pair[2], device="cpu")
