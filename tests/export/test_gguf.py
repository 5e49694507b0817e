"""A model as GGUF: what is written opens again as what it was."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from gguf_models import MODELS, make_model
from transformers import AutoModelForCausalLM

import luthier
from luthier.cli import main
from luthier.export.to_gguf import export_gguf

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


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_what_the_model_answers(name, tmp_path):
    folder = make_model(name, tmp_path / "model")
    export_gguf(folder, tmp_path / "out", quant="F32")
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "passed", proof
    assert "tokens of" in proof["compared"] and "greedy answer of 16 tokens" in proof["compared"]
    assert proof["max_difference"] < 0.01 and proof["effect"] == 0
