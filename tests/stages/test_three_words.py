"""`continue`, `stack` and `merge`: what each trains, what it saves, and where it starts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import FrodConfig, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from stages_harness import Home, logits
from tiny import make_llama, make_qwen3_moe
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier
from luthier.artifacts import fingerprint
from luthier.artifacts import manifest as manifests
from luthier.artifacts.run_folder import folder_of
from luthier.models import stack
from luthier.training import base_folder

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("stages"))
    home.train("one")
    return home


def weights(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    return load_file((folder_of(run, step) / "adapter" if step else run / "final") / WEIGHTS)


def facts(run: Path) -> dict:
    return manifests.read(run / "final").facts


def still(**more):
    """Settings under which a step changes (next to) nothing, so that what is saved is where the stage began."""
    return {"train": {"steps": 1}, "optim": {"lr": 1e-30}, **more}


def test_each_word_starts_where_the_first_stage_ended(home):
    ended = logits(home.folder / "one" / "final")
    for then in ("continue", "stack", "merge"):
        run = home.stage(f"still-{then}", "one", then, **still())
        difference = (logits(run / "final") - ended).abs().max()
        assert difference <= (0 if then == "continue" else 2e-5), then


def test_continue_trains_the_same_adapter_and_names_its_parents(home):
    run = home.stage("continued", "one", "continue")
    assert "stage: a fresh optimiser and schedule; this is not resume. It continues the adapter of" in home.said_text()
    before, after = weights(home.folder / "one"), weights(run)
    assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in after.items()}
    assert all(not torch.equal(before[name], after[name]) for name in before)
    kinds = [(p["kind"], p["name"], p["fingerprint"]) for p in facts(run)["parents"]]
    one = facts(home.folder / "one")
    assert kinds == [
        ("base", str(home.folder / "base"), one["base"]["fingerprint"]),
        ("adapter", str(home.folder / "one" / "final"), one["fingerprint"]),
    ]


def test_stack_leaves_the_lower_adapter_and_saves_one_of_both_ranks(home):
    run = home.stage("stacked", "one", "stack", adapter={"r": 2, "alpha": 6, "dropout": 0.1})
    lower, joined = weights(home.folder / "one"), weights(run)
    for name, tensor in joined.items():
        below = tensor[:4] if ".lora_A." in name else tensor[:, :4] * (3 / 2)  # stage 1's scaling was 2, now it is 3
        assert torch.allclose(below, lower[name], rtol=1e-6), name
        assert tensor.shape[0 if ".lora_A." in name else 1] == 6
    told = facts(run)["stack"]
    assert told["below"]["fingerprint"] == facts(home.folder / "one")["fingerprint"]
    assert set(map(tuple, told["ranks"].values())) == {(4, 2)} and 0 < told["difference"] < 1e-4


def test_stacked_result_loads_for_training_as_two_adapters(home):
    run = home.stage("stacked-2", "one", "stack", adapter={"r": 2})
    model, _ = luthier.load(run, trainable=True)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(".default." in name for name in trained)
    ids = torch.tensor([[5, 81, 33, 190, 7, 44, 260]])
    with torch.no_grad():
        pair = model.eval()(input_ids=ids).logits
        with stack.plain_form(model):
            one = model(input_ids=ids).logits
    assert torch.allclose(pair, one, atol=1e-4) and torch.equal(one, logits(run / "final"))
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trained
    plain, _ = luthier.load(run)
    assert list(plain.peft_config) == ["default"]


@pytest.mark.slow
def test_three_stages_on_one_another(tmp_path):
    """A lower adapter that is itself a joined one is just a LoRA, whatever its ranks are; the top goes on alone."""
    home = Home(tmp_path, tie=False)
    home.train("one")
    two = home.stage("second", "one", "stack", adapter={"r": 2, "target": ["q_proj", "embed_tokens"]})
    config = json.loads((two / "final" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    three = home.stage("third", "second", "continue")
    changed = {name for name, tensor in weights(two).items() if not torch.equal(tensor, weights(three)[name])}
    assert changed and all("q_proj" in name or "embed_tokens" in name for name in changed)
    a = next(name for name in changed if "q_proj.lora_A" in name)
    assert torch.equal(weights(two)[a][:4], weights(three)[a][:4])
    four = home.stage("fourth", "third", "stack", adapter={"r": 1}, **still())
    assert (logits(four / "final") - logits(three / "final")).abs().max() < 2e-5


def test_merge_writes_the_sum_as_the_runs_own_base(home):
    run = home.stage("merged", "one", "merge", adapter={"r": 2})
    sum_of_both = logits(run / "base")
    assert (sum_of_both - logits(home.folder / "one" / "final")).abs().max() < 2e-5
    assert json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        run / "base"
    )
    told = manifests.read(run / "base")
    assert (
        [p["kind"] for p in told.facts["parents"]] == [p["kind"] for p in facts(run)["parents"]] == ["base", "adapter"]
    )
    assert told.kind == "merged" and told.facts["new_token_ids"] == []
    assert told.facts["fingerprint"] == fingerprint.of_folder(run / "base")
    assert told.facts["parents"][0]["fingerprint"] == fingerprint.of_folder(home.folder / "base")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (run / "base", home.folder / "base"))
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template


def test_only_what_the_stream_has_no_formula_for_is_merged_by_peft(home, tmp_path, monkeypatch):
    opened = []
    in_memory = base_folder._merge_in_memory
    monkeypatch.setattr(base_folder, "_merge_in_memory", lambda *given: (opened.append(given[0].parent.name), in_memory(*given)))  # fmt: skip
    lora, ia3, frod = foreign(home, tmp_path / "lora"), tmp_path / "ia3", tmp_path / "frod"
    for folder, config in ((ia3, IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])),
                           (frod, FrodConfig(task_type="CAUSAL_LM", target_modules=["k_proj"]))):  # fmt: skip
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(home.folder / "base"), config)
        for weight in model.parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, 1.0, 0.1)
        model.save_pretrained(folder)
    for folder in (lora, ia3, frod):
        run = home.stage(f"by-{folder.name}", str(folder), "merge", adapter={"r": 2}, **still())
        assert (logits(run / "base") - logits(folder)).abs().max() < 2e-5
        told = manifests.read(run / "base")
        assert told.kind == "merged" and told.facts["new_token_ids"] == []
    assert opened == ["by-frod"]


@pytest.mark.slow
def test_merge_is_computed_in_fp32_and_rounded_once(tmp_path):
    home = Home(tmp_path, dtype=torch.bfloat16)
    one = home.train("one", model={"path": str(tmp_path / "base"), "precision": "bf16"})
    run = home.stage("two", "one", "merge", adapter={"r": 2}, train={"steps": 1})
    base, merged, adapter = load_file(tmp_path / "base" / "model.safetensors"), load_file(run / "base" / "model.safetensors"), weights(one)  # fmt: skip
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    expected = (base[f"{name}.weight"].float() + 2.0 * (b @ a)).to(torch.bfloat16)
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert (merged[f"{name}.weight"] != expected).float().mean() < 0.01  # one addition's order, at a rounding's edge


@pytest.mark.parametrize("then", ["continue", "stack", "merge"])
def test_resumed_stage_ends_in_the_same_bits_without_its_origin(tmp_path, then):
    home = Home(tmp_path)
    home.train("one", train={"steps": 2})
    adapter = {} if then == "continue" else {"r": 2, "dropout": 0.1}
    whole = home.stage("whole", "one", then, adapter=adapter, checkpoint={"every": 1, "keep": 9})
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for step in (4, 5, 6):
        shutil.rmtree(folder_of(cut, step))
    shutil.rmtree(cut / "final")
    shutil.rmtree(tmp_path / "one")
    home.resume(cut)
    assert "resuming from step 3" in home.said_text()
    for name in ("adapter/" + WEIGHTS, "trainer/optimizer.safetensors"):
        ours, theirs = load_file(folder_of(cut, 6) / name), load_file(folder_of(whole, 6) / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    if then == "stack":
        assert {k: v for k, v in facts(cut)["stack"].items() if k != "difference"} == {k: v for k, v in facts(whole)["stack"].items() if k != "difference"}  # fmt: skip
    assert facts(cut)["parents"][1:] == facts(whole)["parents"][1:]


def test_finished_stage_is_not_run_again_and_moved_origin_is_known(home):
    run = home.stage("again", "one", "continue")
    before = (run / "final" / WEIGHTS).stat().st_mtime_ns
    os.rename(home.folder / "one", home.folder / "elsewhere")
    try:
        home.stage("again", "elsewhere", "continue")
    finally:
        os.rename(home.folder / "elsewhere", home.folder / "one")
    assert "this run is finished" in home.said_text()
    assert (run / "final" / WEIGHTS).stat().st_mtime_ns == before


@pytest.mark.slow
def test_carried_moments_are_those_of_the_checkpoint(home):
    for start in ("one", "one/checkpoints/step-00000006"):
        run = home.stage(
            f"carried-{Path(start).name}", start, "continue", **still(optim={"lr": 1e-30, "from": "carried"})
        )
        assert "moments are carried over" in home.said_text()
        old = load_file(folder_of(home.folder / "one", 6) / "trainer" / "optimizer.safetensors")
        new = load_file(folder_of(run, 1) / "trainer" / "optimizer.safetensors")
        steps = {name: (float(old[name]), float(new[name])) for name in old if name.endswith("::step")}
        assert set(steps.values()) == {(6.0, 7.0)}


def foreign(home: Home, folder: Path, **config) -> Path:
    """An adapter as plain peft saves it, with what transformers' Trainer leaves beside it."""
    base = AutoModelForCausalLM.from_pretrained(home.folder / "base")
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{"r": 3, "target_modules": ["q_proj"], "init_lora_weights": False, **config}))  # fmt: skip
    model.save_pretrained(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("then", ["continue", "stack", "merge"])
def test_foreign_checkpoint_is_a_start_and_the_log_says_what_is_left(home, tmp_path, then):
    folder = foreign(home, tmp_path / "checkpoint-7")
    run = home.stage(f"foreign-{then}", str(folder), then, **still())
    assert (logits(run / "final") - logits(folder)).abs().max() < 1e-4
    assert "not carried over: optimizer.pt, rng_state.pth, scheduler.pt" in home.said_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 5}},
        {"trainable_token_indices": [5, 81]},
    ],
    ids=lambda config: next(iter(config)),
)
def test_every_adapter_merges_and_continues_to_where_it_was(home, tmp_path, config):
    folder = foreign(home, tmp_path / "a", **config)
    for then in ("continue", "merge"):
        run = home.stage(f"{next(iter(config))}-{then}", str(folder), then, **still())
        assert (logits(run / "final") - logits(folder)).abs().max() < 1e-4, then


@pytest.mark.slow
@pytest.mark.parametrize("then", ["continue", "merge"])
def test_new_tokens_and_the_base_they_made_go_along(tmp_path, then):
    home = Home(tmp_path)
    tokens = ["<|tool|>", "<|more|>"]
    one = home.train("one", model={"path": str(tmp_path / "base"), "new_tokens": tokens}, train={"steps": 2})
    ended = logits(one / "final")
    run = home.stage("two", "one", then, **still())
    shutil.rmtree(one)
    assert (logits(run / "final") - ended).abs().max() < 2e-5
    assert luthier.load(run)[1].convert_tokens_to_ids(tokens) == [320, 321]


def test_template_that_only_the_adapter_has_is_taken(tmp_path):
    home = Home(tmp_path)
    one = home.train("one", train={"steps": 1})
    adapter = tmp_path / "adapter"
    shutil.copytree(one / "final", adapter)
    (adapter / "luthier.json").unlink()
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copy(tmp_path / "base" / name, adapter / name)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    run = home.stage("two", str(adapter), "continue", **still())
    assert (run / "final" / "chat_template.jinja").read_text() == (adapter / "chat_template.jinja").read_text()


@pytest.mark.slow
def test_stack_is_saved_by_hand_as_one_adapter_and_trains_on(home, tmp_path):
    run = home.stage("by-hand", "one", "stack", adapter={"r": 2}, train={"steps": 2})
    model, tokenizer = luthier.load(run, trainable=True)
    assert tokenizer.name_or_path == str(
        run / "final"
    )  # the one that lies with the adapter, with the template it was trained with
    assert luthier.save(model, tmp_path / "saved", tokenizer=tokenizer).proof.passed
    assert torch.equal(logits(tmp_path / "saved"), logits(run / "final"))
    on = home.stage("by-hand-2", str(tmp_path / "saved"), "continue", train={"steps": 1})
    before, after = weights(run), weights(on)
    a = next(name for name in before if "lora_A" in name)
    assert torch.equal(before[a][:4], after[a][:4]) and not torch.equal(before[a][4:], after[a][4:])


def refused(home: Home, output: str, start: str, then: str, **more) -> luthier.RequestError:
    with pytest.raises(luthier.RequestError) as caught:
        home.stage(output, start, then, **more)
    assert not (home.folder / output / "checkpoints").exists()
    return caught.value


def test_continue_with_other_settings_names_them_and_the_other_words(home):
    error = refused(home, "no-1", "one", "continue", adapter={"r": 8, "type": "lora"})
    assert error.code == "adapter-differs"
    assert "r is 4 there and 8 here" in str(error) and "stack" in str(error) and "merge" in str(error)
    assert "type" not in error.message


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_only_plain_lora_is_stacked_upon(home, tmp_path, config, text):
    error = refused(home, "no-2", str(foreign(home, tmp_path / "a", **config)), "stack")
    assert error.code == "cannot-stack" and text in str(error) and "then: merge" in str(error)


def test_new_adapter_of_a_stack_is_plain_lora_too(home):
    error = refused(home, "no-3", "one", "stack", adapter={"dora": True})
    assert error.code == "cannot-stack" and "adapter.dora" in str(error)


@pytest.mark.slow
def test_experts_are_refused_by_name_in_a_stack_and_continue(tmp_path):
    home = Home(tmp_path)
    shutil.rmtree(tmp_path / "base")
    make_qwen3_moe(tmp_path / "base")
    one = home.train("one", adapter={"r": 2}, train={"steps": 2})
    error = refused(home, "no", "one", "stack", adapter={"r": 2})
    assert error.code == "cannot-stack" and "target_parameters" in str(error)
    for then in ("continue", "merge"):
        run = home.stage(then, "one", then, **still(adapter={} if then == "continue" else {"r": 2}))
        assert (logits(run / "final") - logits(one / "final")).abs().max() < 2e-5


def test_another_base_is_an_error_before_anything_is_trained(home, tmp_path):
    other = make_llama(tmp_path / "other", seed=1)
    error = refused(home, "no-4", "one", "continue", model=str(other))
    assert error.code == "other-base" and str(other) in str(error)


def test_whole_model_is_no_adapter_to_start_from(home):
    error = refused(home, "no-5", "base", "continue")
    assert error.code == "no-adapter"


def test_moments_that_are_not_there_are_an_error(home, tmp_path):
    folder = foreign(home, tmp_path / "checkpoint-7")
    error = refused(home, "no-6", str(folder), "continue", optim={"from": "carried"})
    assert error.code == "no-moments"


@pytest.mark.parametrize(
    "what", ["one", "one/final", "one/checkpoints/step-00000006", "one/checkpoints/step-00000006/adapter"]
)
def test_model_that_is_an_adapter_shows_the_three_words(home, what):
    path = home.folder / what
    with pytest.raises(luthier.RequestError) as caught:
        home.train("no-7", model=str(path))
    assert caught.value.code == "adapter-as-base"
    for then in ("continue", "stack", "merge"):
        assert f"adapter: {{from: {path}, then: {then}" in str(caught.value)


def test_model_beside_an_adapter_shows_the_three_words(home, tmp_path):
    folder = foreign(home, tmp_path / "both")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(home.folder / "base" / name, folder / name)
    with pytest.raises(luthier.RequestError) as caught:
        home.train("no-8", model=str(folder))
    assert caught.value.code == "adapter-in-base" and f"from: {folder}, then: stack" in str(caught.value)


@pytest.mark.parametrize("adapter", [{"from": "runs/stage1"}, {"then": "continue"}])
def test_half_a_start_shows_the_three_words(home, adapter):
    with pytest.raises(luthier.RequestError) as caught:
        home.train("no-9", adapter=adapter)
    for then in ("continue", "stack", "merge"):
        assert f"adapter: {{from: runs/stage1, then: {then}" in str(caught.value)


def test_damaged_lower_part_is_noticed_when_a_stack_is_restored(home):
    run = home.stage("restored", "one", "stack", adapter={"r": 2}, train={"steps": 2})
    model, _ = luthier.load(run, trainable=True)
    checkpoint = folder_of(run, 2) / "adapter" / WEIGHTS
    changed = {name: tensor + (1 if "lora_A" in name else 0) for name, tensor in load_file(checkpoint).items()}
    checkpoint.unlink()
    save_file(changed, checkpoint, metadata={"format": "pt"})
    from luthier.artifacts.run_folder import Found
    from luthier.checkpoint.checkpoints import Checkpoints

    with pytest.raises(luthier.ArtifactError) as caught:
        Checkpoints(run).load(Found(2, folder_of(run, 2)), model)
    assert caught.value.code == "other-below"


@pytest.mark.slow
@pytest.mark.parametrize("then", ["continue", "stack", "merge"])
def test_plain_libraries_prove_the_second_stage(home, then):
    run = home.stage(f"proven-{then}", "one", then, prove=True)
    assert json.loads((run / "final" / "proof.json").read_text())["verdict"] == "passed"
