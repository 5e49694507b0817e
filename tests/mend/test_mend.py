"""Mending: a damaged folder in, a repaired copy out that opens plainly and computes the same, or a refusal."""

import functools
import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM

import luthier
from luthier.artifacts.tensorfile import TensorSpec
from luthier.artifacts.verify import verify_all
from luthier.cli import main
from luthier.export.mend.mend import _publish, _Repair
from luthier.export.source import Source
from luthier.export.stream import Output, write_stream

mend = functools.partial(luthier.mend, prove=False)  # the tests open results plainly themselves; one keeps the proof
IDS = torch.arange(3, 40).unsqueeze(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("base") / "base")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def adapter(base, config=None, seed=1):
    model = get_peft_model(plain(base), config or LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, 1.0 if "ia3" in name else 0.0, 0.1)
    return model


def saved(base, folder, config=None):
    model = adapter(base, config)
    model.save_pretrained(folder)
    return model


def opened(base, folder):
    return logits(PeftModel.from_pretrained(plain(base), folder))


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def done(folder):
    return [step["code"] for step in json.loads((folder / "mended.json").read_text())["done"]]


def test_wrapped_shards_without_index_become_a_model_that_opens_with_the_same_logits(tmp_path, base):
    state = {f"_orig_mod.module.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    source = tmp_path / "src"
    shutil.copytree(base, source, ignore=shutil.ignore_patterns("model.safetensors", "generation_config.json"))
    names = sorted(state)
    for number, part in enumerate((names[:7], names[7:]), 1):
        save_file({name: state[name] for name in part}, source / f"model-{number:05d}-of-00002.safetensors")
    before = snapshot(source)
    mend(source, tmp_path / "out", base=base)
    assert snapshot(source) == before
    assert done(tmp_path / "out") == ["renamed", "index", "generation"]
    assert torch.equal(logits(plain(tmp_path / "out")), logits(plain(base)))
    assert verify_all(tmp_path / "out").whole
    assert json.loads((tmp_path / "out/luthier.json").read_text())["parents"][0]["name"] == str(source)
    (source / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(luthier.ArtifactError, match=r"shard 1 of 2 .* missing"):
        mend(source, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir() if path.name != "src"] == ["out"]


def test_index_that_names_wrong_files_is_written_anew(tmp_path):
    source = make_llama(tmp_path / "src", shard="40KB")
    index = next(source.glob("*.index.json"))
    content = json.loads(index.read_text())
    first = sorted(set(content["weight_map"].values()))[0]
    content["weight_map"] = dict.fromkeys(content["weight_map"], first)
    index.write_text(json.dumps(content))
    expected = load_all(source)
    mend(source, tmp_path / "out")
    assert done(tmp_path / "out") == ["index"]
    found = load_all(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    content["weight_map"]["model.nowhere.weight"] = first
    index.write_text(json.dumps(content))
    with pytest.raises(luthier.ArtifactError, match=r"model.nowhere.weight.* in no file"):
        mend(source, tmp_path / "other")


def load_all(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def test_bin_of_a_tied_model_becomes_safetensors_with_the_tied_weight_once(tmp_path, base):
    source = tmp_path / "src"
    shutil.copytree(base, source, ignore=shutil.ignore_patterns("model.safetensors"))
    torch.save(plain(base).state_dict(), source / "pytorch_model.bin")
    luthier.mend(source, tmp_path / "out")
    assert done(tmp_path / "out") == ["safetensors", "tied"]
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(logits(plain(tmp_path / "out")), logits(plain(base)))
    assert json.loads((tmp_path / "out/proof.json").read_text())["passed"]


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, base):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    source = tmp_path / "src"
    source.mkdir()
    torch.save({"model.norm.weight": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(luthier.RequestError, match=r"call .*open.* would run code") as refusal:
        mend(source, tmp_path / "out", base=base)
    assert refusal.value.code == "pickle-code"
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.mlp.down_proj": 2}),
        LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "embed_tokens"]),
        LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj"], use_dora=True, modules_to_save=["norm"]),
        LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj"], lora_bias=True, use_rslora=True),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["ranks", "embedding", "dora", "bias", "ia3"],
)  # fmt: skip
def test_lost_adapter_config_is_rebuilt_to_the_same_logits(tmp_path, base, config):
    model = saved(base, tmp_path / "src", config)
    (tmp_path / "src/adapter_config.json").unlink()
    lora = isinstance(config, LoraConfig)
    if lora:
        with pytest.raises(luthier.RequestError, match="--alpha") as refusal:
            mend(tmp_path / "src", tmp_path / "out", base=base)
        assert refusal.value.code == "cannot-know"
    mend(tmp_path / "src", tmp_path / "out", base=base, alpha=8 if lora else None, rslora=lora and config.use_rslora)  # fmt: skip
    assert torch.equal(opened(base, tmp_path / "out"), logits(model))
    saved_whole = json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] or []
    assert not any("base_layer" in name or "embed" in name for name in saved_whole)
    assert ("model.norm" in saved_whole) == getattr(config, "use_dora", False)


def test_method_that_shapes_do_not_determine_is_refused_by_name(tmp_path, base):
    save_file({"base_model.model.model.layers.0.mlp.up_proj.hada_w1_a": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(luthier.RequestError, match="hada_w1_a"):
        mend(tmp_path / "x.safetensors", tmp_path / "out", base=base, alpha=8)


def test_adapter_is_split_out_of_a_whole_peft_state_dict(tmp_path, base):
    model = adapter(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["norm"]))
    torch.save({"state_dict": {f"module.{name}": t for name, t in model.state_dict().items()}}, tmp_path / "model.pt")
    mend(tmp_path / "model.pt", tmp_path / "out", base=base, alpha=8)
    assert {"split", "renamed", "unnested", "safetensors", "adapter-config"} <= set(done(tmp_path / "out"))
    assert torch.equal(opened(base, tmp_path / "out"), logits(model))


def test_empty_final_folder_gets_the_newest_whole_checkpoint(tmp_path, base):
    model = saved(base, tmp_path / "src/checkpoint-9")
    for number in (2, 10):
        shutil.copytree(tmp_path / "src/checkpoint-9", tmp_path / f"src/checkpoint-{number}")
    torn = tmp_path / "src/checkpoint-10/adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    made = mend(tmp_path / "src", tmp_path / "out")
    assert "checkpoint-9" in made.done[0]["what"] and "checkpoint-10 is not whole" in made.done[0]["what"]
    assert torch.equal(opened(base, tmp_path / "out"), logits(model))


def test_missing_template_and_tokenizer_come_from_the_base(tmp_path, base):
    for name in ("a", "b"):
        shutil.copytree(base, tmp_path / name, ignore=shutil.ignore_patterns("chat_template*", *(["token*"] * (name == "b"))))  # fmt: skip
        mend(tmp_path / name, tmp_path / f"{name}-out", base=base)
    assert done(tmp_path / "a-out") == ["template"] and done(tmp_path / "b-out") == ["tokenizer"]
    for name in ("a-out", "b-out"):
        assert luthier.load(tmp_path / name)[1].chat_template == make_tokenizer().chat_template


def test_whole_folder_is_nothing_to_mend_and_an_existing_target_is_refused(tmp_path, base):
    with pytest.raises(luthier.RequestError) as refusal:
        mend(base, tmp_path / "out")
    assert refusal.value.code == "nothing-to-mend" and not (tmp_path / "out").exists()
    with pytest.raises(luthier.RequestError) as refusal:
        mend(base, tmp_path)
    assert refusal.value.code == "exists"


def test_failure_while_checking_leaves_nothing(tmp_path, base):
    source = tmp_path / "src"
    shutil.copytree(base, source, ignore=shutil.ignore_patterns("model.safetensors"))
    state = plain(base).state_dict()
    del state["model.norm.weight"]
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(luthier.ArtifactError, match=r"model\.norm\.weight"):
        mend(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_command_line_mends_and_says_what_was_done(tmp_path, base, capsys):
    saved(base, tmp_path / "src")
    (tmp_path / "src/adapter_config.json").unlink()
    arguments = ["mend", str(tmp_path / "src"), str(tmp_path / "out"), "--base", str(base)]
    assert main(arguments) == 2
    assert "--alpha A" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*arguments, "--alpha", "8", "--no-proof", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "adapter"


def test_disk_without_room_is_named_before_anything_is_written(tmp_path, base):
    spec = TensorSpec("x", "F32", (2**50,))
    outputs = [Output(spec, Source(tmp_path, {"x": spec}), "x")]
    with pytest.raises(luthier.LuthierError, match="are needed") as refusal:
        write_stream(tmp_path, outputs, {"config.json": b"{}"}, stem="model", kind="base", metadata={})
    assert refusal.value.code == "disk-full" and list(tmp_path.iterdir()) == []


def test_interrupt_while_writing_leaves_nothing(tmp_path, base):
    class Interrupted(Source):
        def read(self, name, start, target):
            raise KeyboardInterrupt

    spec = TensorSpec("x", "F32", (4,))
    repair = _Repair(tmp_path, None, items={"x": Output(spec, Interrupted(tmp_path, {"x": spec}), "x")})
    with pytest.raises(KeyboardInterrupt):
        _publish(repair, tmp_path / "out", prove=False)
    assert list(tmp_path.iterdir()) == []
