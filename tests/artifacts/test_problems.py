"""Every problem of a folder has its code, a sentence and a remedy, and a sound folder has none."""

import json

import pytest
from folders import (
    ADAPTER,
    CONFIG,
    adapter_tensors,
    make_adapter,
    make_distcp,
    make_model,
    make_shards,
    make_tokenizer,
    model_tensors,
    tensor_file,
    torch_archive,
    write_json,
)

from luthier.artifacts.identify import identify

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("make", [make_model, make_shards, make_adapter])
def test_a_sound_folder_has_no_problem(make, tmp_path):
    found = identify(make(tmp_path / "x"))
    assert (found.problems, found.whole) == ([], True)
    assert found.opens_with.startswith("luthier.load, ")


def wrapped(prefix):
    return lambda f: tensor_file(make_model(f) / "model.safetensors", {prefix + k: v for k, v in model_tensors().items()})  # fmt: skip


def cut(f):
    path = make_model(f) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def pointer(f):
    (make_model(f) / "model.safetensors").write_bytes(LFS)


def no_index(f):
    (make_shards(f) / "model.safetensors.index.json").unlink()


def no_shard(f):
    (make_shards(f) / "model-00002-of-00003.safetensors").unlink()


def change_index(change):
    def make(f):
        path = make_shards(f) / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return make


def config_only(f):
    write_json(f / "config.json", CONFIG)


def bins(f):
    torch_archive(f / "pytorch_model.bin")
    write_json(f / "config.json", CONFIG)
    make_tokenizer(f)


def cut_bin(f):
    bins(f)
    path = f / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-30])


def beside(f):
    make_adapter(f)
    tensor_file(f / "model.safetensors", model_tensors())


def without(half):
    return lambda f: make_adapter(f, {k: v for k, v in adapter_tensors().items() if half not in k})


def uneven(f):
    tensors = adapter_tensors()
    make_adapter(f, {name: ("F32", (8, 3)) if "lora_B" in name else value for name, value in tensors.items()})


def peft_state(f):
    make_model(f)
    tensor_file(f / "model.safetensors", model_tensors() | adapter_tensors())


def lost_shard_of_torch(f):
    make_distcp(f)
    (f / "__1_0.distcp").unlink()


def lost_metadata(f):
    make_distcp(f)
    (f / ".metadata").unlink()


def few_rows(f):
    make_model(f)
    make_tokenizer(f, tokens=17)


def no_template(f):
    make_model(f)
    make_tokenizer(f, template=False)


CASES = {
    "torch.compile's prefix": (wrapped("_orig_mod."), "wrapped-names", False),
    "data parallelism's prefix": (wrapped("module."), "wrapped-names", False),
    "prefix within": (lambda f: make_adapter(f, adapter_tensors("base_model.model._orig_mod.")), "wrapped-names", False),
    "doubled": (lambda f: make_adapter(f, adapter_tensors("base_model.model.base_model.model.")), "doubled-prefix", False),
    "adapter's name within": (lambda f: make_adapter(f, adapter_tensors(inner=".default")), "adapter-names", False),
    "no adapter config": (lambda f: tensor_file(f / "adapter_model.safetensors", adapter_tensors()), "no-adapter-config", True),
    "pickles only": (bins, "pickle-only", False),
    "cut": (cut, "file-size", True),
    "cut archive": (cut_bin, "file-size", True),
    "pointer": (pointer, "lfs-pointer", True),
    "no index": (no_index, "missing-index", True),
    "no shard": (no_shard, "file-missing", True),
    "index too long": (change_index(lambda m: m.update({"ghost": "model-00001-of-00003.safetensors"})), "tensor-missing", True),
    "index too short": (change_index(lambda m: m.pop("model.layers.1.mlp.up_proj.weight")), "stranger", False),
    "index of wrong files": (change_index(lambda m: m.update({"model.layers.1.mlp.up_proj.weight": "model-00002-of-00003.safetensors"})), "tensor-missing", True),
    "index outside": (change_index(lambda m: m.update({"x": "../../etc/passwd"})), "path-escape", True),
    "index of numbers": (change_index(lambda m: m.update({"x": 3})), "broken-index", True),
    "no weights": (config_only, "no-weights", True),
    "no tensors": (lambda f: tensor_file(make_adapter(f) / "adapter_model.safetensors", {}), "no-tensors", True),
    "size 0": (lambda f: make_adapter(f, dict.fromkeys(adapter_tensors(), ("F32", (0,)))), "empty-tensors", True),
    "no tokenizer": (lambda f: make_model(f, tokenizer=False), "no-tokenizer", False),
    "no template": (no_template, "no-template", False),
    "rows and config": (lambda f: make_model(f, vocab=20), "vocabulary", False),
    "rows and tokenizer": (few_rows, "vocabulary", False),
    "untrained": (lambda f: make_adapter(f, fill=0), "untrained", False),
    "A without B": (without("lora_B"), "adapter-pairs", True),
    "B without A": (without("lora_A"), "adapter-pairs", True),
    "integers": (lambda f: tensor_file(make_model(f) / "model.safetensors", model_tensors(dtype="I32")), "tensor-type", True),
    "uneven ranks": (uneven, "adapter-pairs", True),
    "merged beside": (beside, "merged-beside-adapter", False),
    "a peft model's state": (peft_state, "adapter-in-weights", True),
    "base gone": (lambda f: make_adapter(f, config={"base_model_name_or_path": "/no/such/base"}), "base-missing", False),
    "torch's shard gone": (lost_shard_of_torch, "file-missing", True),
    "torch's metadata gone": (lost_metadata, "no-metadata", True),
    "adapter config beside a model": (lambda f: write_json(make_model(f) / "adapter_config.json", ADAPTER), "adapter-in-base", True),
    "broken config": (lambda f: (make_model(f) / "config.json").write_text("{"), "broken-json", True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_problem_is_named_with_its_remedy(case, tmp_path):
    make, code, fault = CASES[case]
    folder = tmp_path / "x"
    folder.mkdir()
    make(folder)
    found = identify(folder)
    hits = [problem for problem in found.problems if problem.code == code]
    assert hits, found.problems
    assert all(problem.message and problem.remedy for problem in found.problems)
    assert hits[0].fault == fault
    assert found.whole == (not found.faults)


@pytest.mark.parametrize("case", ["torch.compile's prefix", "doubled", "no adapter config", "pickles only", "no index"])
def test_remedy_names_mend_where_it_helps(case, tmp_path):
    make, code, _ = CASES[case]
    (tmp_path / "x").mkdir()
    make(tmp_path / "x")
    problem = next(problem for problem in identify(tmp_path / "x").problems if problem.code == code)
    assert "luthier mend SRC DST" in problem.remedy


def test_other_tensors_of_peft_are_no_wrong_names(tmp_path):
    names = [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "base_model.model.lm_head.weight",
        "base_model.vera_A", "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.k_proj.ia3_l",
    ]  # fmt: skip
    make_adapter(tmp_path / "x", adapter_tensors() | dict.fromkeys(names, ("F32", (4, 8))))
    assert identify(tmp_path / "x").problems == []
