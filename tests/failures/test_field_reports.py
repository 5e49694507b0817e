"""The five field reports S1 to S5: what people had in their hands at the end, and what it is worth here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from foreign import as_unsloth, sharded_by_torch, trainer_state
from peft import PeftModel, get_peft_model
from rows import (  # fmt: skip
    ADAPTER,
    adapted,
    disturb,
    logits,
    lora,
    opens_and_trains,
    plain,
    plain_adapter,
    remedies,
    said,
    trained,
    without,
)
from safetensors.torch import load_file
from trainers import by_trl
from transformers import AutoTokenizer
from transformers.models.llama import modeling_llama

import luthier

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from stages_harness import Home, unproven


@pytest.fixture(scope="module")
def merged_at_the_end(base, tmp_path_factory):
    """TRL's output folder after `merge_and_unload()` and then `save_pretrained()`, with its live adapter's logits."""
    folder = tmp_path_factory.mktemp("trl") / "out"
    trainer = by_trl(base, folder)
    wanted, names = logits(trainer.model), trained(trainer.model)
    trainer.model.merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder, wanted, names


def test_run_without_any_setting_for_saving_leaves_an_adapter_in_every_checkpoint_and_at_the_end(tmp_path):
    """S1 (C#221, C#646): one GPU, no flag set: the save path was chosen after the epoch, and was None."""
    home = Home(tmp_path)
    config = home.file("run", train={"steps": 2})
    del config["checkpoint"]
    with unproven():
        luthier.train(config, say=home.said.append)
    run = home.folder / "run"
    assert said(run) == ("run", set())
    checkpoints = [file.parent for file in run.glob("checkpoints/*/adapter")]
    assert checkpoints
    for folder in (*checkpoints, run / "final"):
        inner = folder / "adapter" if (folder / "adapter").is_dir() else folder
        by_peft = PeftModel.from_pretrained(plain(home.folder / "base"), inner, is_trainable=True)
        opens_and_trains(folder, logits(by_peft), trained(by_peft))


def test_folder_merged_at_the_end_opens_as_a_model_and_names_where_the_adapter_is(merged_at_the_end):
    """S2: adapter files only in `checkpoint-*`, not in the final folder."""
    folder, wanted, names = merged_at_the_end
    assert not (folder / ADAPTER).exists()
    kind, codes = said(folder)
    assert kind == "base" and codes == {"adapter-in-checkpoints"}
    assert str(folder / "checkpoint-2") in remedies(folder)
    merged = plain(folder)
    opens_and_trains(folder, logits(merged), trained(merged))
    assert torch.allclose(logits(merged), wanted, atol=1e-4)
    opens_and_trains(folder / "checkpoint-2", wanted, names)


def test_adapter_is_recovered_where_only_the_merged_model_was_kept(base, merged_at_the_end, tmp_path):
    """S2: the checkpoints were deleted; base and merged model give the adapter back."""
    folder, wanted, _ = merged_at_the_end
    kept = without(folder, tmp_path / "kept", "checkpoint-*")
    luthier.mend(kept, tmp_path / "out", base=base, prove=False)
    assert torch.allclose(logits(plain_adapter(base, tmp_path / "out")), wanted, atol=1e-4)
    model, _ = luthier.load(tmp_path / "out", base=base, device="cpu", trainable=True)
    assert trained(model) and all("lora_" in name for name in trained(model))


def test_final_folder_without_weights_opens_as_its_newest_checkpoint(merged_at_the_end, tmp_path):
    """S2: nothing was saved at the end, and the checkpoints are all there is."""
    folder, wanted, names = merged_at_the_end
    kept = without(folder, tmp_path / "kept", "model.safetensors", "config.json", "generation_config.json")
    assert said(kept)[0] == "trainer_checkpoint"
    opens_and_trains(kept, wanted, names)


def test_unsloths_adapter_opens_trains_on_and_touches_no_class(base, tmp_path):
    """S3: reloaded with plain `AutoModel` + `PeftModel` and trained on: "object has no attribute 'apply_qkv'"."""
    classes = {name: dict(vars(kind)) for name, kind in vars(modeling_llama).items() if isinstance(kind, type)}
    model = adapted(base)
    model.save_pretrained(tmp_path / "a")
    folder = as_unsloth(tmp_path / "a", "unsloth/tiny-llama-bnb-4bit")
    assert said(folder) == ("adapter", set())
    again = opens_and_trains(folder, logits(model), trained(model), base=base)
    assert {n: dict(vars(k)) for n, k in vars(modeling_llama).items() if isinstance(k, type)} == classes
    again.save_pretrained(tmp_path / "plain")  # by peft alone; what is saved opens anywhere
    assert torch.equal(logits(plain_adapter(base, tmp_path / "plain")), logits(again))


def test_cookbooks_sharded_folder_is_recognised_and_refused_with_what_it_is(base, tmp_path):
    """S4 (C#711, C#727, C#737, C#741): `__0_0.distcp … train_params.yaml`, opened by nothing."""
    folder = sharded_by_torch(tmp_path / "fine-tuned-meta-llama", {"model": plain(base).state_dict()})
    (folder / "train_params.yaml").write_text("model_name: meta-llama/Llama-3.2-11B-Vision\nenable_fsdp: 'True'\n")
    assert any(file.name.endswith(".distcp") for file in folder.iterdir())
    assert said(folder) == ("distcp", set())
    with pytest.raises(luthier.RequestError, match=r"torch\.distributed\.checkpoint") as refusal:
        luthier.load(folder, device="cpu")
    assert refusal.value.code == "kind"
    assert_the_remedy_works(folder, base, str(refusal.value), tmp_path)
    (folder / ".metadata").unlink()
    assert said(folder) == ("distcp", {"no-metadata"})


def assert_the_remedy_works(sharded: Path, base: Path, text: str, tmp_path: Path) -> None:
    """What an error names for torch's sharded form: an export, for which the base needs no weights."""
    assert "luthier export FOLDER DST --to transformers --base BASE" in text
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    luthier.export(sharded, tmp_path / "out", to="transformers", base=bare)
    opens_and_trains(tmp_path / "out", logits(plain(base)), trained(plain(base)))


def test_cookbooks_folder_that_lacks_a_shard_is_called_so(base, tmp_path):
    """S4: part of it was copied."""
    folder = sharded_by_torch(tmp_path / "d", {"model": plain(base).state_dict()})
    next(folder.glob("*.distcp")).rename(tmp_path / "elsewhere")
    (folder / "__9_0.distcp").write_bytes(b"PK")
    assert {"file-missing", "stranger"} <= said(folder)[1]


def test_trainers_checkpoint_that_torch_sharded_says_what_it_is(base, tmp_path):
    """S4: accelerate's SHARDED_STATE_DICT: `pytorch_model_fsdp_0` within `checkpoint-N`."""
    folder = tmp_path / "checkpoint-2"
    sharded_by_torch(folder / "pytorch_model_fsdp_0", {"model": plain(base).state_dict()})
    (folder / "trainer_state.json").write_text(json.dumps(trainer_state(2)))
    assert said(folder) == ("trainer_checkpoint", {"sharded-weights", "no-tokenizer"})
    with pytest.raises(luthier.LuthierError, match="sharded") as refusal:
        luthier.load(folder, device="cpu")
    assert refusal.value.code == "sharded-weights"
    assert_the_remedy_works(folder / "pytorch_model_fsdp_0", base, str(refusal.value), tmp_path)


@pytest.fixture(scope="module")
def first_stage(base, tmp_path_factory):
    """A first stage by TRL."""
    folder = tmp_path_factory.mktemp("first") / "out"
    trainer = by_trl(base, folder, lora_dropout=0.1)
    trainer.save_model()
    return folder, logits(trainer.model)


@pytest.mark.parametrize("then", ["continue", "stack", "merge"])
def test_second_stage_on_trls_adapter_is_three_words(first_stage, tmp_path, then):
    """S5: `get_peft_model` on a model that already had adapters: "Target module Dropout… is not supported"."""
    folder, wanted = first_stage
    home = Home(tmp_path)
    run = home.stage("second", str(folder), then, adapter={} if then == "continue" else {"type": "lora", "r": 2}, train={"steps": 1}, optim={"lr": 1e-30})  # fmt: skip
    assert "output" not in said(run)[1]
    opened, _ = luthier.load(run, device="cpu", trainable=True)
    assert torch.allclose(logits(opened), wanted, atol=2e-5)
    assert trained(opened) and all("lora_" in name for name in trained(opened))
    assert not any("dropout" in name or "base_layer" in name for name in trained(opened))


def test_adapter_of_a_peft_model_wrapped_again_is_never_opened_wrongly(base, tmp_path):
    """S5: what `get_peft_model` on a peft model saves: two adapters' tensors, or names with the prefix twice."""
    inner = adapted(base, lora(target_modules=["q_proj"]))
    outer = get_peft_model(inner, lora(target_modules=["v_proj"]))
    disturb(outer)
    outer.save_pretrained(tmp_path / "a")
    tensors = list(load_file(tmp_path / "a" / ADAPTER))
    assert all(name.startswith("base_model.model.base_model.model.") for name in tensors)
    assert said(tmp_path / "a") == ("adapter", {"doubled-prefix"})
    with pytest.raises(
        luthier.ArtifactError, match="q_proj"
    ) as refusal:  # the config speaks of the outer adapter alone
        luthier.load(tmp_path / "a", base=base, device="cpu")
    assert refusal.value.code == "coverage"


def test_base_is_named_as_an_adapter_and_the_three_words_are_shown(first_stage, tmp_path):
    """S5: `model:` that points at something with an adapter, without `then`."""
    folder, _ = first_stage
    home = Home(tmp_path)
    with pytest.raises(luthier.RequestError) as refusal:
        home.train("run", model={"path": str(folder)})
    assert refusal.value.code == "adapter-as-base"
    assert all(f"then: {word}" in refusal.value.remedy for word in ("continue", "stack", "merge"))
    shutil.rmtree(home.folder)
