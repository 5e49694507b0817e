"""Section 4 of the table of failures: identity: the base, the class, the template."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from rows import (
    ADAPTER,
    adapted,
    edit,
    logits,
    lora,
    mended,
    opens_and_trains,
    plain,
    plain_adapter,
    said,
    trained,
    without,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from tiny import make_gguf, make_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from stages_harness import Home


@pytest.fixture
def saved(base, tmp_path):
    """An adapter in a folder by itself, its logits and what it trains."""
    model = adapted(base)
    model.save_pretrained(tmp_path / "there/a")
    return tmp_path / "there/a", logits(model), trained(model)


def test_base_of_another_machine_is_asked_for_and_taken_when_given(base, saved):
    """P#1567: the adapter's base is a local path of another machine."""
    folder, wanted, names = saved
    edit(folder / "adapter_config.json", base_model_name_or_path="/home/someone/models/base")
    assert said(folder) == ("adapter", {"base-missing"})
    with pytest.raises(luthier.RequestError, match="/home/someone/models/base") as refusal:
        luthier.load(folder, device="cpu")
    assert refusal.value.code == "base-missing" and "base=" in refusal.value.remedy
    opens_and_trains(folder, wanted, names, base=base)


def test_base_that_lies_next_to_the_adapter_is_found_by_its_name(base, saved):
    """P#1567: the folder was copied together with its base."""
    folder, wanted, names = saved
    edit(folder / "adapter_config.json", base_model_name_or_path="/home/someone/models/mine")
    shutil.copytree(base, folder.parent / "mine")
    notes: list[str] = []
    opens_and_trains(folder, wanted, names, say=notes.append)
    assert any("next to the adapter" in note for note in notes)


def test_base_at_another_revision_is_refused_for_our_adapter(base, tmp_path):
    """P#1567: the base moved to another revision: same shapes, other weights. An adapter of ours knows its base."""
    home = Home(tmp_path / "home")
    run = home.train("run", train={"steps": 1})
    shutil.rmtree(home.folder / "base")
    make_llama(home.folder / "base", seed=7)
    with pytest.raises(luthier.ArtifactError) as refusal:
        luthier.load(run, device="cpu")
    assert refusal.value.code == "other-base" and "insists" in refusal.value.remedy
    notes: list[str] = []
    luthier.load(run, base=home.folder / "base", device="cpu", say=notes.append)
    assert any("insisted" in note for note in notes)


def test_base_of_another_shape_is_refused(saved, tmp_path):
    """P#1567: another base altogether."""
    folder, _, _ = saved
    other = make_llama(tmp_path / "other", hidden=64)
    with pytest.raises(luthier.ArtifactError) as refusal:
        luthier.load(folder, base=other, device="cpu")
    assert refusal.value.code == "adapter-does-not-fit"


def test_adapter_on_a_quantised_mirror_opens_on_the_model_that_is_given(base, saved):
    """U#2139: the base is a quantised mirror, which is not here."""
    folder, wanted, names = saved
    edit(folder / "adapter_config.json", base_model_name_or_path="unsloth/tiny-llama-bnb-4bit")
    notes: list[str] = []
    with pytest.raises(luthier.RequestError) as refusal:
        luthier.load(folder, device="cpu", say=notes.append)
    assert refusal.value.code == "hub-offline"
    assert any("unsloth/tiny-llama'" in note and "quantised mirror" in note for note in notes)
    opens_and_trains(folder, wanted, names, base=base)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [330, 321], ids=["padded", "exact"])
def test_adapter_on_a_grown_vocabulary_opens_without_a_word_from_anyone(base, untied, tmp_path, tie, rows):
    """P#838, P#1457, U#2733: the vocabulary was resized for training, and the loader does not know."""
    base = base if tie else untied
    model = plain(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model = adapted(model)
    model.save_pretrained(tmp_path / "a")  # without a tokenizer: only the file's own rows tell
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain_adapter(base, tmp_path / "a")
    assert said(tmp_path / "a") == ("adapter", set())
    opens_and_trains(tmp_path / "a", logits(model), trained(model))


@pytest.mark.slow
@pytest.mark.parametrize("whole", [None, ["lm_head"]], ids=["frozen", "trained"])
def test_stage_on_a_grown_vocabulary_ends_in_a_folder_that_plain_peft_opens(untied, tmp_path, whole):
    """P#838: training such an adapter further: its final folder is on the run's own base, which has the rows."""
    tokenizer = AutoTokenizer.from_pretrained(untied)
    tokenizer.add_tokens(["<|tool|>"])
    model = plain(untied)
    model.resize_token_embeddings(len(tokenizer) + 3, mean_resizing=False)
    adapted(model, lora(modules_to_save=whole)).save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    home = Home(tmp_path / "home", tie=False)
    run = home.stage("run", str(tmp_path / "a"), "continue", prove=True, train={"steps": 2})
    assert json.loads((run / "final/proof.json").read_text())["passed"]
    assert plain(run / "base").get_input_embeddings().weight.shape[0] == len(tokenizer) + 3


@pytest.mark.slow
def test_saving_an_adapter_whose_base_grew_is_refused_and_merging_it_works(untied, tmp_path):
    """P#1457: plain peft cannot open an adapter on a base without its rows: that is said, and the merged model opens."""
    tokenizer = AutoTokenizer.from_pretrained(untied)
    model = plain(untied)
    model.resize_token_embeddings(330, mean_resizing=False)
    model = adapted(model, lora(modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "a")
    again, _ = luthier.load(tmp_path / "a", device="cpu")
    with pytest.raises(luthier.RequestError, match="330 rows") as refusal:
        luthier.save(again, tmp_path / "again", tokenizer=tokenizer)
    assert refusal.value.code == "grown-base" and not (tmp_path / "again").exists()
    luthier.save(again.merge_and_unload(), tmp_path / "one", tokenizer=tokenizer)  # what the remedy says
    assert torch.allclose(logits(plain(tmp_path / "one")), logits(model), atol=1e-4)
    luthier.export(tmp_path / "a", tmp_path / "merged", to="merged", prove=False)
    assert torch.allclose(logits(plain(tmp_path / "merged")), logits(model), atol=1e-4)


def test_model_whose_config_has_the_old_vocabulary_is_refused_and_the_remedy_works(base, tmp_path):
    """P#838, U#2733: a resized model with the config from before; transformers draws the embeddings at random."""
    model = plain(base)
    model.resize_token_embeddings(333, mean_resizing=False)
    model.save_pretrained(tmp_path / "m")
    edit(tmp_path / "m/config.json", vocab_size=320)
    assert "vocabulary" in said(tmp_path / "m")[1]
    with pytest.raises(luthier.ArtifactError, match="embed_tokens") as refusal:
        luthier.load(tmp_path / "m", device="cpu")
    assert refusal.value.code == "tensors-differ" and "vocab_size" in refusal.value.remedy
    edit(tmp_path / "m/config.json", vocab_size=333)  # what the remedy says
    opens_and_trains(tmp_path / "m", logits(model), trained(model))


def test_template_that_is_not_in_the_output_is_named_and_mended_from_the_base(base, tmp_path):
    """L#5836, L#8399, L#10396: the chat template used in training is not in the output."""
    folder = without(base, tmp_path / "m", "chat_template*")
    edit(folder / "tokenizer_config.json", chat_template=None)
    assert said(folder) == ("base", {"no-template"})
    assert luthier.load(folder, device="cpu")[1].chat_template is None
    mended(folder, tmp_path / "out", base=base)
    assert luthier.load(tmp_path / "out", device="cpu")[1].chat_template == AutoTokenizer.from_pretrained(base).chat_template  # fmt: skip
    opens_and_trains(tmp_path / "out", logits(plain(base)), trained(plain(base)))


def test_adapter_without_a_tokenizer_gets_its_bases_with_the_template(base, saved):
    """L#8399: peft saves no tokenizer; the base's is taken, template included."""
    folder, _, _ = saved
    tokenizer = luthier.load(folder, device="cpu")[1]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_end_of_turn_token_of_training_is_in_the_final_folder(tmp_path):
    """U#798, L#6320: end-of-turn tokens differ between training and serving."""
    home = Home(tmp_path / "home")
    for name in ("config.json", "generation_config.json"):
        if (home.folder / "base" / name).is_file():
            edit(home.folder / "base" / name, eos_token_id=1)
    run = home.train("run", train={"steps": 1})
    told = json.loads((run / "final/generation_config.json").read_text())["eos_token_id"]
    end = AutoTokenizer.from_pretrained(run / "final").convert_tokens_to_ids("<|im_end|>")
    assert end in (told if isinstance(told, list) else [told])


def test_saving_an_adapter_asks_nobody_for_its_base(base, tmp_path, monkeypatch):
    """P#1452, P#3211: saving asks the network for the base's config, and fails offline at the end of training."""
    model = adapted(base)
    model.save_pretrained(tmp_path / "a")
    edit(tmp_path / "a/adapter_config.json", base_model_name_or_path="someone/never-fetched")
    loaded, tokenizer = luthier.load(tmp_path / "a", base=base, device="cpu", trainable=True)

    def refuse(*arguments, **named):
        raise AssertionError(f"a connection was made: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with luthier.Checkpoints(tmp_path / "run", tokenizer=tokenizer) as checkpoints:
        checkpoints.save(1, loaded, torch.optim.SGD([p for p in loaded.parameters() if p.requires_grad], lr=0.1))
    written = tmp_path / "run/checkpoints/step-00000001"
    assert torch.equal(logits(luthier.load(written, base=base, device="cpu")[0]), logits(model))


def test_model_opened_from_gguf_is_saved_as_a_folder_that_opens_and_trains(tmp_path):
    """Run: `save_pretrained` of a model opened from GGUF: "quantized with gguf and is not serializable"."""
    file = make_gguf(tmp_path / "m.gguf")
    assert said(file) == ("gguf", set())
    model, tokenizer = luthier.load(file, device="cpu")
    wanted = logits(model)
    luthier.save(model, tmp_path / "out", tokenizer=tokenizer)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), wanted)
    opens_and_trains(tmp_path / "out", wanted, trained(plain(tmp_path / "out")))


def test_adapter_whose_tensors_were_renamed_for_another_class_is_refused(base, saved):
    """P#1567: the class above the layers differs between two versions, and no name matches."""
    folder, _, _ = saved
    tensors = {name.replace(".model.layers.", ".transformer.layers."): t for name, t in load_file(folder / ADAPTER).items()}  # fmt: skip
    save_file(tensors, folder / ADAPTER)
    with pytest.raises(luthier.ArtifactError, match=r"transformer\.layers") as refusal:
        luthier.load(folder, device="cpu")
    assert refusal.value.code == "coverage"
