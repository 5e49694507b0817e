"""The verb: forms, safety, proof."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from adapters import make_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import luthier
from luthier.artifacts import direct
from luthier.cli import main
from luthier.export import stream
from luthier.export.merged.merge import merge_folders

SETTINGS = {"target_modules": ["q_proj", "v_proj"], "r": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("base") / "base", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", **SETTINGS)


def test_merged_is_proven_against_base_and_adapter_and_says_its_parents(base, adapter, tmp_path, capsys):
    assert main(["export", str(adapter), str(tmp_path / "merged"), "--to", "merged"]) == 0
    told = json.loads((tmp_path / "merged/luthier.json").read_text())
    assert told["kind"] == "merged"
    assert [parent["kind"] for parent in told["parents"]] == ["base", "adapter"]
    assert all(parent["fingerprint"] for parent in told["parents"])
    proof = json.loads((tmp_path / "merged/proof.json").read_text())
    assert proof["verdict"] == "passed", proof
    assert 0 < proof["max_difference"] <= proof["bound"] < proof["effect"] / 10
    assert "AutoModelForCausalLM.from_pretrained" in capsys.readouterr().out
    assert load_file(tmp_path / "merged/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert main(["verify", str(tmp_path / "merged")]) == 0
    # the same adapter on what it was merged into would be added twice
    again = ["export", str(adapter), str(tmp_path / "twice"), "--to", "merged", "--base", str(tmp_path / "merged")]
    assert main(again) == 3
    assert "twice" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


@pytest.mark.slow
def test_wrong_merge_fails_the_proof_and_publishes_nothing(base, adapter, tmp_path):
    from luthier.export.proof.exports import prove_merge

    with pytest.raises(luthier.ArtifactError, match="proof failed"):
        merge_folders(base, adapter, tmp_path / "out", weights=[0.9], prove=prove_merge(base, [adapter]))
    assert list(tmp_path.iterdir()) == []


def test_sum_of_two_adapters_is_weighted(base, adapter, tmp_path):
    other = make_adapter(base, tmp_path / "other", seed=9, **SETTINGS)
    luthier.export([adapter, other], tmp_path / "sum", to="merged", weights=[0.75, 0.5], dtype="fp32", prove=False)
    parts = []
    for number, each in enumerate((adapter, other)):
        luthier.export(each, tmp_path / f"{number}", to="merged", dtype="fp32", prove=False)
        parts.append(load_file(tmp_path / f"{number}/model.safetensors"))
    plain, found = load_file(base / "model.safetensors"), load_file(tmp_path / "sum/model.safetensors")
    for name, tensor in plain.items():
        before = tensor.float()
        wanted = before + 0.75 * (parts[0][name] - before) + 0.5 * (parts[1][name] - before)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_sum_of_adapters_is_proven_against_peft_with_all_of_them_active(base, adapter, tmp_path):
    from luthier.export.proof.exports import prove_merge

    other = make_adapter(base, tmp_path / "other", seed=9, r=2, lora_alpha=3, use_rslora=True, target_modules=["v_proj", "up_proj"])  # fmt: skip
    made = luthier.export([adapter, other], tmp_path / "sum", to="merged", weights=[0.75, 0.5], dtype="fp32")
    proof = json.loads((tmp_path / "sum/proof.json").read_text())
    assert proof["verdict"] == "passed" and "0.75 × adapter, 0.5 × other" in proof["compared"], proof
    with pytest.raises(luthier.ArtifactError, match="the proof failed"):
        prove_merge(base, [adapter, other], [0.75, 0.6])(made.path)


@pytest.mark.slow
def test_other_combinations_say_that_no_plain_library_computes_them(base, adapter, tmp_path):
    other = make_adapter(base, tmp_path / "other", seed=9, **SETTINGS)
    made = luthier.export([adapter, other], tmp_path / "out", to="merged", combine="ties", density=0.5)
    assert "inconclusive: no plain library computes ties of whole changes" in (made.proof or "")


@pytest.mark.slow
def test_transformers_form_is_resharded_and_cast_and_proven(base, tmp_path):
    luthier.export(base, tmp_path / "out", to="transformers", shard_size="20KB", dtype="fp16")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    wanted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert json.loads((tmp_path / "out/proof.json").read_text())["max_difference"] == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"


def test_export_of_an_export_says_so_and_export_of_a_model_does_not(base, tmp_path):
    first = luthier.export(base, tmp_path / "first", to="transformers", dtype="bf16", prove=False)
    again = luthier.export(first.path, tmp_path / "again", to="transformers", dtype="fp32", prove=False)
    quantised = luthier.export(first.path, tmp_path / "quantised", to="quantized", packing="int8", prove=False)
    told = f"{first.path} is an export itself, made from {base}; what was rounded there stays rounded"
    assert told in again.notes and told in quantised.notes
    assert not any("export itself" in note for note in first.notes)


def test_pickled_weights_become_safetensors(base, tmp_path):
    source = tmp_path / "pickled"
    source.mkdir()
    torch.save(load_file(base / "model.safetensors"), source / "pytorch_model.bin")
    (source / "config.json").write_bytes((base / "config.json").read_bytes())
    luthier.export(source, tmp_path / "out", to="transformers", prove=False)
    wanted, found = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.slow
def test_adapter_form_holds_the_same_adapter(adapter, tmp_path):
    luthier.export(adapter, tmp_path / "out", to="adapter")
    wanted, found = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert json.loads((tmp_path / "out/proof.json").read_text())["passed"] is True


def test_tensor_that_fits_nowhere_is_an_error(base, adapter, tmp_path):
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {
        name.replace("layers.1", "layers.7"): value.clone() for name, value in tensors.items() if "layers.1" in name
    }
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(luthier.ArtifactError, match=r"layers\.7"):
        luthier.export(broken, tmp_path / "out", to="merged")
    kept = {
        name: value for name, value in tensors.items() if "layers.0.self_attn.q" not in name and "layers.7" not in name
    }
    save_file(kept, broken / "adapter_model.safetensors")
    with pytest.raises(luthier.ArtifactError, match=r"layers\.0\.self_attn\.q_proj"):
        luthier.export(broken, tmp_path / "out", to="merged")
    assert not (tmp_path / "out").exists()


def test_target_that_exists_or_lies_in_a_source_is_refused(base, adapter, tmp_path):
    with pytest.raises(luthier.RequestError, match="exists"):
        luthier.export(adapter, tmp_path, to="merged")
    with pytest.raises(luthier.RequestError, match="only read"):
        luthier.export(adapter, base / "inner", to="merged")


@pytest.mark.parametrize("setting", [{"peft_type": "FROD"}, {"init_lora_weights": "pissa"}, {"use_qalora": True}])
def test_method_without_a_formula_is_refused_by_name(setting, base, adapter, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text()) | setting
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(luthier.RequestError) as raised:
        luthier.export(other, tmp_path / "out", to="merged")
    assert str(next(iter(setting.values()))) in str(raised.value) or next(iter(setting)) in str(raised.value)


STREAM = """
import sys
from pathlib import Path
from luthier.export.merged.merge import merge_folders
merge_folders(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
assert not {"transformers", "peft"} & set(sys.modules), "the stream imported what it must not"
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_stream_imports_neither_transformers_nor_peft(base, adapter, tmp_path):
    command = [sys.executable, "-c", STREAM, str(base), str(adapter), str(tmp_path / "out")]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0


@pytest.mark.slow
def test_killed_exports_leave_nothing_and_a_second_call_finishes(base, adapter, tmp_path):
    command = [sys.executable, "-c", STREAM, str(base), str(adapter), str(tmp_path / "out")]
    for wait in (0.5, 1.0, 1.5, 2.0, 2.5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():
            break
    if not (tmp_path / "out").exists():
        subprocess.run(command, check=True, capture_output=True)
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_failed_write_back_is_never_lost_with_the_thread_that_was_told(base, adapter, tmp_path, monkeypatch):
    told = []

    def fails_once(descriptor: int) -> None:
        if not told:
            told.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")

    write = stream._Worker.write

    def slowly(self, *piece) -> None:
        time.sleep(0.01)
        write(self, *piece)

    monkeypatch.setattr(direct, "_open_direct", lambda path: None)  # with direct writes no thread has anything to flush
    monkeypatch.setattr(stream.os, "fdatasync", fails_once)
    monkeypatch.setattr(stream, "FLUSH_EVERY", 0.001)
    monkeypatch.setattr(stream._Worker, "write", slowly)
    with pytest.raises(OSError, match="Input/output error"):
        merge_folders(base, adapter, tmp_path / "out")
    assert told and not (tmp_path / "out").exists()


VERB = """
import sys
from luthier.cli import main
assert main(sys.argv[1:]) == 0
heavy = {"transformers", "peft", "torch.distributed.tensor"} & set(sys.modules)
assert not heavy, f"the verb imported {heavy}, which takes longer than a merge"
"""


@pytest.mark.parametrize("form", ["merged", "transformers", "adapter"])
def test_verb_that_only_streams_imports_no_library_that_opens_models(base, adapter, tmp_path, form):
    source = base if form == "transformers" else adapter
    done = subprocess.run([sys.executable, "-c", VERB, "export", str(source), str(tmp_path / "out"), "--to", form, "--no-proof"], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("form", "flag", "value"),
    [("transformers", "onto", "trained"), ("adapter", "shard_size", "1GB"), ("gguf", "dtype", "bf16"), ("quantized", "combine", "ties"),
     ("merged", "quant", "F16"), ("transformers", "packing", "nf4"), ("quantized", "weights", [1.0])],
)  # fmt: skip
def test_flag_that_means_nothing_for_a_form_is_refused_and_says_where_it_does(base, tmp_path, form, flag, value):
    with pytest.raises(luthier.RequestError, match=f"not for the form {form}") as refusal:
        luthier.export(base, tmp_path / "out", to=form, **{flag: value})
    assert refusal.value.code == "form" and "--to" in (refusal.value.remedy or "")


@pytest.mark.parametrize(
    "form", ["merged", *(pytest.param(form, marks=pytest.mark.slow) for form in ("transformers", "adapter"))]
)
def test_relative_paths_are_proven_as_absolute_ones_are(base, adapter, tmp_path, form, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = base if form == "transformers" else adapter
    given = [] if form == "transformers" else ["--base", os.path.relpath(base)]
    assert main(["export", os.path.relpath(source), "out", "--to", form, *given]) == 0
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "passed", proof["says"]
