"""A model as GGUF: what is written opens again as what it was."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import luthier
from luthier.cli import main

IDS = torch.tensor([[5, 6, 7, 100, 3, 255, 12]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("gguf") / "llama")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_f32_file_opens_as_the_same_model(llama, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(llama), str(out), "--to", "gguf", "--quant", "f32", "--no-proof"]) == 0
    assert "llama-server -m" in capsys.readouterr().out
    model, tokenizer = luthier.load(out / "model-F32.gguf")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(llama)))
    assert tokenizer.chat_template == tiny.CHATML
    assert main(["verify", str(out)]) == 0
    told = json.loads((out / "luthier.json").read_text())
    assert told["kind"] == "gguf" and told["parents"][0]["name"] == str(llama)
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "gguf"
