"""Reading run files: what is accepted, and what the errors say."""

import os
import subprocess
import sys

import pytest
import yaml

from luthier.config.read import json_schema, parse_run, read_resolved, read_run, write_run
from luthier.errors import RequestError

BASE = "model: org/name\ndata: {train: train.jsonl}\noutput: runs/a\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "base").mkdir()
    return tmp_path


def read(text, *overrides):
    with open("run.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    return read_run("run.yaml", overrides)


def refusal(text, *overrides):
    with pytest.raises(RequestError) as caught:
        read(text, *overrides)
    return str(caught.value)


def test_short_forms_and_exponents_are_read(folder):
    config = read(BASE + "adapter: lora\noptim: {lr: 1e-4}\ntrain: {batch_tokens: 64e3}\n")
    assert config.model.path == "org/name"
    assert config.adapter.type == "lora"
    assert config.optim.lr == 1e-4
    assert config.train.batch_tokens == 64000
    assert config.output == str(folder / "runs/a")
    assert config.data.train == str(folder / "train.jsonl")


@pytest.mark.parametrize("line", ["adapter: none", "adapter: None", "adapter:", ""])
def test_no_adapter_is_full_fine_tuning(line):
    assert read(BASE + line + "\n").adapter is None


def test_an_empty_block_counts_as_left_out():
    assert read(BASE + "train:\noptim:\n").train.packing is True


def test_every_key_survives_writing_and_reading(folder):
    config = read(
        BASE + "adapter: {r: 8, init_lora_weights: pissa}\noptim: {lr: 1e-5, clip: null, betas: [0.9, 0.95]}\n"
    )
    write_run(config, "resolved.yaml")
    first = (folder / "resolved.yaml").read_bytes()
    assert read_run("resolved.yaml") == config == read_resolved("resolved.yaml")
    write_run(read_run("resolved.yaml"), "resolved.yaml")
    assert (folder / "resolved.yaml").read_bytes() == first
    assert first.startswith(b"format: 1\n")
    assert {"nan_limit", "micro_batch", "seed"} <= set(yaml.safe_load(first)["train"])
    assert sorted(os.listdir(folder)) == ["base", "resolved.yaml", "run.yaml", "train.jsonl"]


def test_a_resolved_file_is_read_after_its_data_has_gone(folder):
    write_run(read(BASE), "resolved.yaml")
    (folder / "train.jsonl").unlink()
    assert read_resolved("resolved.yaml").data.train == str(folder / "train.jsonl")
    with pytest.raises(RequestError, match="does not exist"):
        read_run("resolved.yaml")


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    config = read(BASE)
    write_run(config, "resolved.yaml")
    before = (folder / "resolved.yaml").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_run(config, "resolved.yaml")
    assert (folder / "resolved.yaml").read_bytes() == before
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_overrides_win_and_are_read_as_yaml():
    config = read(
        BASE + "train: {epochs: 3}\n",
        "optim.lr=1e-4",
        "model.precision=fp32",
        "train.steps=7",
        "adapter.r=8",
        "log=[wandb]",
    )
    assert (config.optim.lr, config.model.precision, config.train.steps, config.train.epochs) == (1e-4, "fp32", 7, None)
    assert config.adapter.r == 8
    assert config.log == ["wandb"]


def test_an_override_below_a_short_form_keeps_what_it_stood_for(folder):
    config = read(BASE, "data.train.limit=5", "data.eval.path=train.jsonl")
    assert config.data.train.path == config.data.eval.path == str(folder / "train.jsonl")
    assert config.data.train.limit == 5


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        (BASE + "lr: 1e-4\n", (), ["line 4", "`lr`", "`optim.lr: 0.0001`"]),
        (BASE + "epoch: 2\n", (), ["`train.epochs`"]),
        (BASE, ("seed=3",), ["override seed=3", "`train.seed: 3`"]),
        (BASE, ("train.batch=3",), ["override train.batch=3", "`train.micro_batch`"]),
        (BASE, ("train.steps",), ["key.sub=value"]),
        (BASE, ("output.x=1",), ["`output` is runs/a"]),
        (BASE + "optim.lr: 3\n", (), ["Write it as a block", "`lr: 3`"]),
        (BASE + "optim:\n  lr: -1\n", (), ["line 5", "`optim.lr` is -1", "a number above 0", "Peak learning rate"]),
        (BASE + "optim: {name: adamm}\n", (), ["adamw, adafactor, muon", "Did you mean `adamw`?"]),
        (BASE + "optim: adamw_torch\n", (), ["`optim` is adamw_torch", "`optim.name: adamw`"]),
        (
            BASE + "optim: {betas: [0.9, 2]}\n",
            (),
            ["`optim.betas` is [0.9, 2]", "a list of 2 numbers from 0 and below 1"],
        ),
        (BASE + "optim: {lr: true}\n", (), ["`optim.lr` is true", "a number above 0"]),
        (BASE + "optim: {clip: none}\n", (), ["Write `null`"]),
        (BASE, ("model.precision=4bit",), ["bf16, fp16, fp32, nf4, int8, fp8", "Did you mean `nf4`?"]),
        (BASE, ("model.precision=nf4",), ["an adapter has to train on them", "adapter: lora"]),
        (BASE, ("model.precision=bfloat16",), ["Did you mean `bf16`?"]),
        (BASE + "train: {epochs: 1, steps: 3}\n", (), ["line 4", "exclude each other"]),
        (BASE + "checkpoint: {every: 2 epoc}\n", (), ['"1 epoch"', "2 epoc"]),
        (BASE + "adapter: {type: lora}\noptim: {name: muon}\n", (), ["muon", "full fine-tuning"]),
        (BASE + "optim: {name: adafactor, states: 8bit}\n", (), ["8bit", "adafactor"]),
        (BASE + "format: 2\n", (), ["line 4", "It takes 1."]),
        (BASE + "output: b\n", (), ["line 4", "stands twice", "lines 3 and 4"]),
        (BASE + "optim: {lr: 1, lr: 2}\n", (), ["`optim.lr` stands twice"]),
        ("a: [\n", (), ["line 2", "not valid YAML"]),
        ("\ta: 1\n", (), ["line 1", "Replace the tab by spaces"]),
        ("", (), ["empty", "`model`"]),
        ("- a\n", (), ["mapping of keys"]),
        ("data: {train: train.jsonl}\noutput: x\n", (), ["`model` is missing"]),
        (BASE.replace("train.jsonl", "trian.jsonl"), (), ["line 2", "`data.train`", "Did you mean", "train.jsonl"]),
        (BASE.replace("train.jsonl", "dat/train.jsonl"), (), ["There is no folder", "dat"]),
        (BASE.replace("train.jsonl", "'*.csv'"), (), ["matches no file"]),
        (BASE.replace("org/name", "./bas"), (), ["line 1", "`model.path`", "Did you mean", "base"]),
        (BASE.replace("org/name", "a/b/c"), (), ["`model.path`", "does not exist"]),
        (BASE.replace("org/name", "m.gguf"), (), ["`model.path` is m.gguf", "does not exist"]),
        (BASE.replace("runs/a", "train.jsonl"), (), ["which is a file"]),
        (BASE.replace("org/name", "base").replace("runs/a", "base"), (), ["line 3", "would write over it"]),
        (BASE.replace("org/name", "base").replace("runs/a", "base/out"), (), ["would write over it"]),
        (BASE.replace("runs/a", "${LUTHIER_NOT_SET}/a"), (), ["line 3", "LUTHIER_NOT_SET", "not set"]),
        ("model: org/name\ndata: train.jsonl\noutput: a\n", (), ["line 2", "Did you mean `data.train: train.jsonl`?"]),
        (BASE.replace("train.jsonl", "[]"), (), ["`data.train` is []", "file, folder, glob or hub id"]),
        (BASE.replace("train.jsonl", "''"), (), ["`data.train` is ''"]),
        (BASE, ("data.columns.prompt=3",), ["`data.columns.prompt` is 3", "Maps our field names"]),
        (BASE + "3: 4\n", (), ["`3` is not a key"]),
        (BASE + "zzz: 1\n", (), ["`zzz`", "Keys at the top are format, model"]),
        (BASE, ("model.template='{{ x }}'",), ["Write the template into a file"]),
        (BASE, ("model.template=chat.jinja",), ["`model.template` is chat.jinja, which does not exist"]),
    ],
)
def test_a_wrong_request_names_key_place_and_remedy(text, overrides, parts):
    message = refusal(text, *overrides)
    assert all(part in message for part in parts), message


def test_every_wrong_key_is_listed_at_once():
    message = refusal(
        BASE + "learning_rate: 1e-4\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 8\noptim: {name: x}\n"
    )
    assert "4 things are wrong" in message
    assert (
        "- line 4: `learning_rate` is not a key of the run file. `learning_rate: 0.0001` is `optim.lr: 0.0001` here."
        in message
    )
    assert "`train.micro_batch: 4` and `train.batch_samples: 32`" in message
    assert "- line 7: `optim.name` is x. It takes one of adamw" in message


def test_wrong_sources_are_named_one_by_one():
    message = refusal(BASE.replace("train.jsonl", "[{path: train.jsonl, weight: -1, limt: 3}, 5]"))
    assert "3 things" in message
    assert "`data.train.0.limt`" in message and "Did you mean `data.train.0.limit`?" in message
    assert "`data.train.0.weight` is -1" in message
    assert "`data.train.1` is 5" in message


def test_a_wrong_source_key_is_the_only_complaint():
    message = refusal(BASE, "data.eval={path: train.jsonl, limt: 3}")
    assert "things are wrong" not in message
    assert "`data.eval.limit`" in message


def test_peft_names_for_our_adapter_keys_are_refused_and_its_own_keys_pass():
    message = refusal(BASE + "adapter: {lora_alpha: 32, target_modules: all, alhpa: 3, task_type: CAUSAL_LM}\n")
    assert "`adapter.alpha: 32`" in message and "`adapter.target: all-linear`" in message
    assert "Did you mean `adapter.alpha`?" in message and "Leave it out" in message
    config = read(BASE + "adapter: {rank_pattern: {q_proj: 4}, alpha_pattern: {q_proj: 8}, bias: none}\n")
    assert config.adapter.model_extra == {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}, "bias": "none"}


def test_local_paths_become_absolute_and_hub_ids_stay(folder, monkeypatch):
    monkeypatch.setenv("DATA", str(folder))
    (folder / "more").mkdir()
    (folder / "chat.jinja").write_text("{{ messages }}")
    config = read(
        "model: {path: base, template: chat.jinja}\n"
        "data: {train: ['${DATA}/train.jsonl', more, '*.jsonl', org/set, squad, {path: train.jsonl}], eval: 0.1}\n"
        "output: ~/out\n"
    )
    assert config.model.path == str(folder / "base")
    assert config.model.template == str(folder / "chat.jinja")
    here = [str(folder / name) for name in ("train.jsonl", "more", "*.jsonl")]
    assert config.data.train[:5] == [*here, "org/set", "squad"]
    assert config.data.train[5].path == str(folder / "train.jsonl")
    assert config.data.eval == 0.1
    assert config.output == os.path.expanduser("~/out")


def test_a_mapping_is_read_without_being_changed(folder):
    mapping = {"model": "org/name", "data": {"train": "train.jsonl"}, "output": "out"}
    config = parse_run(mapping, ["data.train.limit=3"])
    assert config.data.train.limit == 3
    assert mapping["data"] == {"train": "train.jsonl"}
    with pytest.raises(RequestError, match=r"`optim\.lr` is x"):
        parse_run({**mapping, "optim": {"lr": "x"}})


def test_a_missing_run_file_suggests_its_neighbour(folder):
    read(BASE)
    with pytest.raises(RequestError, match=r"Did you mean .*run\.yaml"):
        read_run("rum.yaml")
    with pytest.raises(RequestError, match="luthier resume base"):
        read_run("base")


def test_a_byte_order_mark_is_no_part_of_the_first_key(folder):
    (folder / "run.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert read_run("run.yaml").model.path == "org/name"
    (folder / "run.yaml").write_bytes("model: 模型\n".encode("gb18030"))
    with pytest.raises(RequestError, match="not UTF-8"):
        read_run("run.yaml")


def test_the_json_schema_knows_short_forms_and_bounds():
    schema = json_schema()
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    assert {"type": "string"} in schema["properties"]["adapter"]["anyOf"]
    assert schema["$defs"]["OptimConfig"]["additionalProperties"] is False
    assert {"exclusiveMinimum": 0, "type": "number"} in schema["$defs"]["OptimConfig"]["properties"]["lr"]["anyOf"]


def test_reading_a_run_file_imports_nothing_heavy():
    code = (
        "import sys, luthier.config.read, luthier.config.compare; "
        "print([m for m in ('torch', 'transformers', 'peft', 'numpy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
