"""Every kind is told by what is in the folder, whatever the folder is called."""

import json
import os

import pytest
from folders import (
    CONFIG,
    adapter_tensors,
    gguf_file,
    make_adapter,
    make_distcp,
    make_model,
    make_shards,
    make_trainer_checkpoint,
    model_tensors,
    tensor_file,
    torch_archive,
    write_json,
)

from luthier.artifacts.identify import identify
from luthier.artifacts.show import show

KEYS = {"kind", "whole", "problems", "base", "adapter", "precision", "parameters", "parents"}


def bin_model(folder):
    torch_archive(folder / "pytorch_model.bin")
    write_json(folder / "config.json", CONFIG)


def bin_adapter(folder):
    torch_archive(folder / "adapter_model.bin")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 8})


def many_adapters(folder):
    make_adapter(folder / "one")
    make_adapter(folder / "two")


def trainer_output(folder):
    make_trainer_checkpoint(folder / "checkpoint-10", step=10)
    make_trainer_checkpoint(folder / "checkpoint-9", step=9)
    torch_archive(folder / "training_args.bin")


def finished_trainer_output(folder):
    make_trainer_checkpoint(folder / "checkpoint-10", adapter=True)
    make_adapter(folder)
    torch_archive(folder / "training_args.bin")


def cookbook(folder):
    make_distcp(folder)
    (folder / "train_params.yaml").write_text("model_name: meta-llama/x\n")


def hf_shards(folder):
    tensor_file(folder / "shard-00001-model-00001-of-00001.safetensors", model_tensors(), metadata={"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [0] * len(shape)} for name, (_, shape) in model_tensors().items()})})  # fmt: skip


def quantised(folder):
    tensors = {"model.layers.0.mlp.up_proj.weight": ("U8", (32, 1)), "model.layers.0.mlp.up_proj.weight.absmax": ("F32", (1,))}  # fmt: skip
    tensor_file(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", CONFIG | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}})  # fmt: skip


FOLDERS = {
    "base": (make_model, "base"),
    "shards": (make_shards, "base"),
    "bin": (bin_model, "base"),
    "quantised": (quantised, "base"),
    "adapter": (make_adapter, "adapter"),
    "bin adapter": (bin_adapter, "adapter"),
    "several adapters": (many_adapters, "adapter"),
    "adapter without config": (lambda f: tensor_file(f / "adapter_model.safetensors", adapter_tensors()), "adapter"),
    "adapter under a model's name": (lambda f: tensor_file(f / "model.safetensors", adapter_tensors()), "adapter"),
    "trainer": (make_trainer_checkpoint, "trainer_checkpoint"),
    "trainer adapter": (lambda f: make_trainer_checkpoint(f, adapter=True), "trainer_checkpoint"),
    "trainer output": (trainer_output, "trainer_checkpoint"),
    "finished trainer output": (finished_trainer_output, "adapter"),
    "distcp": (make_distcp, "distcp"),
    "llama-cookbook": (cookbook, "distcp"),
    "torch's safetensors shards": (hf_shards, "distcp"),
    "state dict": (lambda f: torch_archive(f / "consolidated.00.pth"), "state_dict"),
    "weights without config": (lambda f: tensor_file(f / "model.safetensors", model_tensors()), "state_dict"),
    "gguf": (lambda f: gguf_file(f / "m.gguf", {"general.architecture": "llama"}), "gguf"),
    "gguf adapter": (lambda f: gguf_file(f / "m.gguf", {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}), "gguf_adapter"),
    "text": (lambda f: write_json(f / "notes.json", {}), "unknown"),
    "optimiser alone": (lambda f: torch_archive(f / "optimizer.pt"), "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_kind_is_told_by_content(case, tmp_path):
    make, kind = FOLDERS[case]
    folder = tmp_path / "checkpoint-7-adapter-gguf"
    folder.mkdir()
    make(folder)
    found = identify(folder)
    assert found.kind == kind
    told = found.as_dict()
    assert set(told) >= KEYS
    assert all(set(problem) == {"code", "message", "remedy"} for problem in told["problems"])
    assert found.kind in show(found)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda p: torch_archive(p), "state_dict"),
        (lambda p: gguf_file(p, {"general.architecture": "llama"}), "gguf"),
        (lambda p: tensor_file(p, adapter_tensors()), "adapter"),
        (lambda p: tensor_file(p, model_tensors()), "state_dict"),
        (lambda p: p.write_text("hello"), "unknown"),
    ],
)
def test_kind_of_a_file_is_told_by_its_first_bytes(make, kind, tmp_path):
    make(tmp_path / "weights.gguf")
    assert identify(tmp_path / "weights.gguf").kind == kind


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert identify(tmp_path / "pipe").kind == "unknown"
    assert identify("/dev/zero").kind == "unknown"


def test_quantised_weights_are_counted_unpacked(tmp_path):
    quantised(tmp_path)
    found = identify(tmp_path)
    assert (found.precision, found.parameters) == ("nf4", 64)


def test_newest_checkpoint_stands_for_an_output_folder(tmp_path):
    trainer_output(tmp_path)
    facts = identify(tmp_path).facts
    assert facts["step"] == 10
    assert facts["weights"].endswith("checkpoint-10")
    assert [entry["step"] for entry in facts["checkpoints"]] == [9, 10]


def test_rank_and_targets_of_an_adapter_without_config_come_from_its_tensors(tmp_path):
    tensor_file(tmp_path / "adapter_model.safetensors", adapter_tensors())
    assert identify(tmp_path).adapter == {"type": "lora", "r": 4, "target_modules": ["up_proj"]}


def test_sharded_weights_in_a_trainer_checkpoint_are_named(tmp_path):
    make_distcp(tmp_path / "pytorch_model_fsdp_0")
    write_json(tmp_path / "trainer_state.json", {"global_step": 3})
    found = identify(tmp_path)
    assert (found.kind, [problem.code for problem in found.faults]) == ("trainer_checkpoint", ["sharded-weights"])


def test_run_that_saved_nothing_says_so_and_what_to_do(tmp_path):
    (tmp_path / "run.yaml").write_text("model: base\noutput: here\n")
    found = identify(tmp_path)
    assert (found.kind, found.whole) == ("run", True)
    assert [problem.code for problem in found.problems] == ["nothing-saved"]
    assert "luthier resume" in show(found)


def test_sharded_folder_is_described_by_its_metadata(tmp_path):
    found = identify(make_distcp(tmp_path / "d", ranks=3))
    assert (found.whole, found.precision, found.parameters, found.facts["files"]) == (True, "fp32", 9, 3)
    assert "luthier export" in found.opens_with
    data = (tmp_path / "d/.metadata").read_bytes()
    (tmp_path / "d/.metadata").write_bytes(data.replace(b"TensorProperties", b"TensorPropertiez"))
    assert [problem.code for problem in identify(tmp_path / "d").faults] == ["pickle-code"]
    (tmp_path / "d/.metadata").write_bytes(data[:-40])
    assert [problem.code for problem in identify(tmp_path / "d").faults] == ["sharded-damaged"]
