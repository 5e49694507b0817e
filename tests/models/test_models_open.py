"""Opening a base: what opens, what is refused, and with which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHATML, make_llama, make_qwen3_moe, make_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from luthier.artifacts.identify import identify
from luthier.config.schema import ModelConfig
from luthier.errors import ArtifactError, RequestError
from luthier.models.open import open_base, open_tokenizer
from luthier.models.precision import resolve_precision

IDS = torch.tensor([[1, 5, 80, 81, 2]])


def opened(folder: Path, **settings):
    return open_base(ModelConfig(path=str(folder), **settings))


def edit(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "llama")


@pytest.mark.parametrize("make", [make_llama, make_qwen3_moe])
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_folder_opens_to_the_logits_of_plain_transformers(make, shard, tmp_path):
    folder = make(tmp_path / "m", shard=shard)
    base = opened(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(base.model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert not base.model.training and not base.differs
    assert (base.source.kind, base.source.name) == ("folder", str(folder))


def test_precision_is_the_one_asked_for_and_fp32_on_a_cpu(llama):
    assert opened(llama, precision="bf16").model.dtype == torch.bfloat16
    base = opened(llama)
    assert base.model.dtype == torch.float32 and base.model.config.dtype == torch.float32
    assert resolve_precision(ModelConfig(path="x"), "cpu") == "fp32"
    assert resolve_precision(ModelConfig(path="x", precision="fp16"), "cpu") == "fp16"


def test_missing_folder_is_not_sent_to_the_hub(llama):
    with pytest.raises(RequestError, match="there is no file or folder") as caught:
        opened(llama.parent / "lama")
    assert "llama" in caught.value.remedy and caught.value.where == "model.path"
    with pytest.raises(RequestError, match="there is no file or folder"):
        open_base(ModelConfig(path="./some/where"))


def test_hub_id_offline_names_the_ways_out():
    with pytest.raises(RequestError) as caught:
        open_base(ModelConfig(path="nobody/nothing-at-all", revision="v1"))
    text = str(caught.value)
    assert caught.value.code == "hub-offline"
    for word in ("nobody/nothing-at-all", "v1", "HF_HUB_OFFLINE", "HF_ENDPOINT", "ModelScope", "no request"):
        assert word in text


def test_cached_hub_model_opens_offline_and_records_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    make_llama(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = open_base(ModelConfig(path="someone/tiny"))
    assert (base.source.name, base.source.revision) == ("someone/tiny", commit)
    assert base.source.path == repository / "snapshots" / commit


def test_missing_shard_is_named(tmp_path):
    folder = make_qwen3_moe(tmp_path / "m", shard="40KB")
    shard = sorted(folder.glob("model-*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(ArtifactError, match="named in the index and is not there") as caught:
        opened(folder)
    assert caught.value.where == str(shard)


def test_cut_off_shard_is_named(llama):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="broken") as caught:
        opened(llama)
    assert caught.value.where == str(file)


def test_index_that_leaves_the_folder_is_refused(tmp_path):
    folder = make_qwen3_moe(tmp_path / "m", shard="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="outside its folder"):
        opened(folder)


def test_git_lfs_pointer_is_recognised(llama):
    (llama / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ArtifactError, match="git lfs pull"):
        opened(llama)


def test_damaged_pickle_file_is_named_and_nobody_is_told_to_run_it(llama):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        opened(llama)
    assert caught.value.where == str(llama / "pytorch_model.bin")
    assert "weights_only" not in str(caught.value)


def test_unreadable_config_names_the_file(llama):
    (llama / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="no valid JSON") as caught:
        opened(llama)
    assert caught.value.where == str(llama / "config.json")


def test_missing_tensors_are_never_random_weights(llama):
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="2 tensors of the model are not in its files") as caught:
        opened(llama)
    assert "model.layers.*.mlp.up_proj.weight (2)" in str(caught.value)


def test_unexpected_tensors_are_named_with_their_likely_cause(llama):
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="hold an adapter's tensors"):
        opened(llama)


def test_other_shapes_than_the_config_says_are_an_error(llama):
    edit(llama / "config.json", vocab_size=400)
    with pytest.raises(ArtifactError, match=r"embed_tokens.weight is 320 × 32, not 400 × 32.*vocab_size"):
        opened(llama)


def test_fewer_layers_in_the_config_than_in_the_files_is_an_error(llama):
    edit(llama / "config.json", num_hidden_layers=1)
    with pytest.raises(ArtifactError, match="no place in the model"):
        opened(llama)


def test_model_with_code_of_its_own_is_refused_before_any_of_it_runs(llama):
    marker = llama / "ran"
    (llama / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit(llama / "config.json", model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with pytest.raises(RequestError, match="needs Python code of its own") as caught:
        opened(llama)
    assert caught.value.code == "needs-remote-code" and "trust_remote_code: true" in caught.value.remedy
    assert not marker.exists()


def test_code_beside_a_known_architecture_is_not_run(llama):
    marker = llama / "ran"
    (llama / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit(llama / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert type(opened(llama).model).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


def test_quantised_base_adapter_and_classifier_are_refused(llama):
    before = (llama / "config.json").read_text()
    edit(llama / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(RequestError, match=r"quantised weights \(gptq\)"):
        opened(llama)
    (llama / "config.json").write_text(before)
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match="both a model and an adapter"):
        opened(llama)
    (llama / "config.json").unlink()
    with pytest.raises(RequestError, match="is an adapter, not a base model"):
        opened(llama)


def test_unknown_attention_lists_the_known_ones(llama):
    with pytest.raises(RequestError, match=r"no attention implementation 'flash'.*eager.*sdpa"):
        opened(llama, attention="flash")
    assert opened(llama, attention="eager").model.config._attn_implementation == "eager"


def test_model_dropout_sets_the_rates_that_the_model_has(llama):
    base = opened(llama, dropout=0.25)
    assert base.model.config.attention_dropout == 0.25
    assert base.model.model.layers[0].self_attn.attention_dropout == 0.25


def test_template_from_a_file_and_chatml(llama, tmp_path):
    (llama / "chat_template.jinja").unlink()
    assert open_tokenizer(ModelConfig(path=str(llama))).chat_template is None
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    ours = open_tokenizer(ModelConfig(path=str(llama), template="chatml"))
    make_tokenizer(llama, template=CHATML)
    theirs = open_tokenizer(ModelConfig(path=str(llama)))
    for end in (True, False):
        one, other = (t.apply_chat_template(chat, tokenize=False, add_generation_prompt=end) for t in (ours, theirs))
        assert one == other
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert open_tokenizer(ModelConfig(path=str(llama), template=str(file))).chat_template == file.read_text()
    file.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(RequestError, match=r"t\.jinja, line 2"):
        open_tokenizer(ModelConfig(path=str(llama), template=str(file)))
    with pytest.raises(RequestError, match="there is no file"):
        open_tokenizer(ModelConfig(path=str(llama), template=str(tmp_path / "none.jinja")))


def test_chatml_without_its_tokens_says_which_to_add(llama):
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "</s>": 1}, [])), eos_token="</s>")
    plain.save_pretrained(llama)
    (llama / "chat_template.jinja").unlink()
    with pytest.raises(RequestError, match=r'new_tokens: \["<\|im_start\|>", "<\|im_end\|>"\]'):
        opened(llama, template="chatml")
    base = opened(llama, template="chatml", new_tokens=["<|im_start|>", "<|im_end|>"])
    assert base.new_token_ids == (2, 3)
    assert base.model.generation_config.eos_token_id == [2, 1, 3]


def test_missing_padding_token_is_chosen_and_said(llama):
    make_tokenizer(llama, pad=None)
    base = opened(llama)
    assert base.tokenizer.pad_token == "<|pad|>" and base.tokenizer.padding_side == "right"
    assert any("no padding token" in note and "<|pad|>" in note for note in base.notes)
    assert base.model.get_input_embeddings().weight.shape[0] == 320


@pytest.mark.parametrize("tie", [True, False])
def test_new_tokens_get_the_mean_row_and_the_folder_reloads(tie, tmp_path):
    folder = make_llama(tmp_path / "m", tie=tie)
    base = opened(folder, new_tokens=["<|tool|>", "plainword", "<|tool|>", "<|im_end|>"])
    assert base.new_token_ids == (320, 321) and base.differs
    assert any("<|im_end|>" in note for note in base.notes)
    rows = base.model.get_input_embeddings().weight
    assert torch.allclose(rows[320], rows[:320].mean(dim=0)) and base.model.config.vocab_size == 322
    assert torch.equal(rows, opened(folder, new_tokens=["<|tool|>", "plainword"]).model.get_input_embeddings().weight)
    base.model.save_pretrained(tmp_path / "out")
    base.tokenizer.save_pretrained(tmp_path / "out")
    again = opened(tmp_path / "out")
    ids = base.tokenizer("a<|tool|>b plainword", return_tensors="pt")["input_ids"]
    assert 320 in ids and 321 in ids
    assert torch.equal(again.model(input_ids=ids).logits, base.model(input_ids=ids).logits)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("a<|tool|>")["input_ids"]
        == again.tokenizer("a<|tool|>")["input_ids"]
    )


def test_new_tokens_use_spare_rows_first(tmp_path):
    folder = make_llama(tmp_path / "m", vocab=330)
    make_tokenizer(folder, vocab=320)
    base = opened(folder, new_tokens=["<|tool|>"])
    assert base.new_token_ids == (320,) and not base.differs
    assert base.model.config.vocab_size == 330


def test_facts_come_from_headers(tmp_path):
    folder = make_qwen3_moe(tmp_path / "m", dtype=torch.bfloat16, shard="40KB")
    found = identify(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert (found.facts["architecture"], found.precision) == ("Qwen3MoeForCausalLM", "bf16")
    assert found.facts["has_tokenizer"] and found.problems == []
