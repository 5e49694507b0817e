"""What the proof of a GGUF finds, and what it says where llama.cpp is not there."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from gguf_models import make_model, make_sentencepiece
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

import luthier
from luthier.artifacts.gguf_header import read_gguf_header
from luthier.config.schema import ModelConfig
from luthier.export.gguf import names, source
from luthier.export.gguf import proof as gguf_proof
from luthier.export.gguf.file import GgufBytes
from luthier.export.gguf.write import export_gguf
from luthier.models import gguf_tokenizer
from luthier.models.gguf_tokenizer import TRICKY
from luthier.models.open import open_tokenizer


def proof_of(out: Path) -> dict:
    return json.loads((out / "proof.json").read_text())


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("proof") / "llama")


@pytest.mark.slow
def test_rows_in_the_wrong_order_fail_the_proof_and_publish_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(names, "heads_of", lambda *_: 0)  # written and read back alike: only llama.cpp can tell
    with pytest.raises(luthier.ArtifactError, match="log-probabilities differ"):
        export_gguf(llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_weights_that_are_not_the_models_fail_the_proof(llama, tmp_path, monkeypatch):
    packed = GgufBytes._rows
    monkeypatch.setattr(GgufBytes, "_rows", lambda self, tensor, low, high: packed(self, tensor, low, high) * 1.01)
    with pytest.raises(luthier.ArtifactError, match="weight of kind F16 differs"):
        export_gguf(llama, tmp_path / "out")


@pytest.mark.slow
def test_another_rule_for_cutting_text_fails_the_proof(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.export.gguf.tokenizer.rule_of", lambda tokenizer: "smollm")
    with pytest.raises(luthier.ArtifactError, match="into other tokens"):
        export_gguf(llama, tmp_path / "out")


@pytest.mark.slow
def test_without_llama_cpp_transformers_opens_the_file_and_the_proof_says_what_it_left_out(
    llama, tmp_path, monkeypatch
):
    monkeypatch.setattr(gguf_proof, "has_llama_cpp", lambda: False)
    export_gguf(llama, tmp_path / "out", quant="Q8_0")
    proof = proof_of(tmp_path / "out")
    assert proof["verdict"] == "passed", proof
    assert "plain transformers" in proof["says"]
    assert "not the tokens" in proof["compared"] and "xllamacpp" in proof["compared"]


@pytest.mark.slow
@pytest.mark.parametrize("spaced", ["prepended", "none"])
def test_sentencepiece_tokens_are_llama_cpps(spaced, tmp_path):
    folder = make_model("llama", tmp_path / "model", vocab_size=600)
    make_sentencepiece(folder, prepend=spaced == "prepended")
    export_gguf(folder, tmp_path / "out")
    proof = proof_of(tmp_path / "out")
    assert proof["verdict"] == "passed", proof


@pytest.mark.parametrize("spaced", ["prepended", "none"])
def test_sentencepiece_tokenizer_read_back_from_a_gguf_gives_the_same_ids(spaced, tmp_path):
    folder = make_model("llama", tmp_path / "model", vocab_size=600)
    make_sentencepiece(folder, prepend=spaced == "prepended")
    made = tmp_path / "out" / export_gguf(folder, tmp_path / "out", prove=False).file
    before, after = AutoTokenizer.from_pretrained(folder), open_tokenizer(ModelConfig(path=str(made)))
    assert (after.bos_token_id, after.eos_token_id, after.unk_token_id) == (before.bos_token_id, before.eos_token_id, 0)
    for text in TRICKY:
        ids = before(text, add_special_tokens=False)["input_ids"]
        assert after(text, add_special_tokens=False)["input_ids"] == ids, text
        assert after.decode(ids) == text
        assert after(text)["input_ids"] == before(text)["input_ids"]


@pytest.mark.slow
def test_space_before_the_first_piece_only_is_told_as_inconclusive(tmp_path):
    folder = make_model("llama", tmp_path / "model", vocab_size=600)
    make_sentencepiece(folder, metaspace=True)
    export_gguf(folder, tmp_path / "out")
    proof = proof_of(tmp_path / "out")
    assert proof["verdict"] == "inconclusive" and "puts a space before" in proof["says"]


@pytest.mark.slow
def test_vision_part_is_left_out_and_told(tmp_path):
    folder = make_model("gemma3", tmp_path / "model")
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["vision_tower.embeddings.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    made = export_gguf(folder, tmp_path / "out", prove=False)
    assert any("vision" in note for note in made.notes)
    assert "vision" in (tmp_path / "out/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama, llama3 rope, untied",
        "llama, biases, wide heads",
        "llama, linear rope",
        "qwen2, yarn",
        "qwen3",
        "gemma2",
        "gemma3, every third",
        "phi3",
    ],
)
def test_dequantised_file_is_the_model_it_was_made_from(name, tmp_path):
    folder = make_model(name, tmp_path / "model")
    export_gguf(folder, tmp_path / "gguf", quant="F32", prove=False)
    source.export_from_gguf(tmp_path / "gguf/model-F32.gguf", tmp_path / "back", shard_bytes=1 << 30)
    proof = proof_of(tmp_path / "back")
    assert proof["verdict"] == "passed", proof
    back, original = load_file(tmp_path / "back/model.safetensors"), load_file(folder / "model.safetensors")
    assert back.keys() == original.keys()
    for key, tensor in original.items():
        assert torch.allclose(back[key], tensor, rtol=0, atol=2e-7), key
    one, other = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("model", "back"))
    for key in ("rope_parameters", "layer_types", "head_dim", "tie_word_embeddings", "sliding_window"):
        assert key not in one or one[key] == other.get(key), key


def test_tensor_without_a_place_in_the_model_is_named(tmp_path):
    folder = tiny.make_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.extra.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(luthier.ArtifactError, match=r"self_attn\.extra\.weight has no place"):
        export_gguf(folder, tmp_path / "out", prove=False)
    del tensors["model.layers.0.self_attn.extra.weight"], tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(luthier.ArtifactError, match=r"model\.norm\.weight of the model is in no file"):
        export_gguf(folder, tmp_path / "out", prove=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "sliding window"),
    ],
)
def test_setting_that_llama_cpp_would_pass_over_is_refused(name, changes, what, tmp_path):
    folder = make_model(name, tmp_path / "model", **changes)
    with pytest.raises(luthier.RequestError, match=what):
        export_gguf(folder, tmp_path / "out", prove=False)


def test_architecture_without_a_place_is_refused_by_name(tmp_path):
    folder = tiny.make_qwen3_moe(tmp_path / "moe")
    with pytest.raises(luthier.RequestError, match="qwen3_moe"):
        export_gguf(folder, tmp_path / "out", prove=False)


def test_window_that_llama_cpp_ignores_is_told(tmp_path):
    folder = make_model("mistral", tmp_path / "model", sliding_window=64)
    made = export_gguf(folder, tmp_path / "out", prove=False)
    assert any("window of 64" in note for note in made.notes)


def test_rows_that_fill_no_block_fall_back_and_are_told(tmp_path):
    folder = make_model("llama", tmp_path / "model")
    made = export_gguf(folder, tmp_path / "out", quant="q4_k_m", prove=False)
    assert any("do not fill whole blocks" in note and "Q8_0" in note for note in made.notes)


@pytest.mark.parametrize(("value", "quant", "what"), [(1e5, "F16", "65504"), (float("nan"), "Q8_0", "no numbers")])
def test_value_that_the_kind_cannot_hold_is_an_error_and_nothing_is_left(value, quant, what, tmp_path):
    folder = tiny.make_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(luthier.ArtifactError, match=what):
        export_gguf(folder, tmp_path / "out", quant=quant, prove=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"])
def test_rule_for_cutting_text_is_told_by_its_behaviour_and_is_llama_cpps(rule, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = gguf_tokenizer._cut(rule)
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = rule in ("llama-bpe", "tekken")
    (folder / "tokenizer.json").write_text(json.dumps(content))
    export_gguf(folder, tmp_path / "out")
    assert read_gguf_header(tmp_path / "out/model-F16.gguf").metadata["tokenizer.ggml.pre"] == rule
    proof = proof_of(tmp_path / "out")
    assert proof["verdict"] == "passed", proof


def test_unknown_rule_for_cutting_text_is_refused(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(luthier.RequestError, match="by a rule that is not known"):
        export_gguf(folder, tmp_path / "out", prove=False)
