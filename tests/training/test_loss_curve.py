"""Training computes what a hand-written loop of plain transformers, peft and torch computes, step for step.

The hand-written side knows nothing of packing, micro-batches or masks: it runs one sample at a time. Ours packs.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM

from luthier.artifacts.run_folder import folder_of
from luthier.config.read import parse_run
from luthier.data.batches import IGNORED
from luthier.errors import LuthierError
from luthier.training.events import Events
from luthier.training.loop import Loop
from luthier.training.numerics import settled
from luthier.training.progress import Progress
from luthier.training.session import Session
from luthier.training.signals import StopRequest
from luthier.training.state import State

STEPS, WARMUP, RATE, DECAY, CLIP, LIKE = 12, 3, 2e-3, 0.1, 1.0, 1e-5
WORDS = ["one", "two", "order", "lamp", "red", "blue", "help", "late", "paid", "lost", "ship", "box", "sea", "violin"]
POISON = "Z"
"""A letter of no word; its embedding can be made NaN without touching any other sample."""


@dataclass(frozen=True)
class Trained:
    """A run without its proof: its records, the samples of every step, and the weights it began with."""

    run: Path
    records: list[dict[str, Any]]
    batches: list[list[tuple[torch.Tensor, torch.Tensor]]]
    micro_batches: list[int]
    beginning: dict[str, torch.Tensor]
    said: str
    error: LuthierError | None


@pytest.fixture(autouse=True)
def _own_cache_and_one_thread(tmp_path, monkeypatch):
    """Models of this size only lose by sharing their work among threads, and lose most on a busy machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _data(path: Path, *, poisoned: range = range(0), samples: int = 24) -> Path:
    chosen = random.Random(3)
    with open(path, "w") as file:
        for number in range(samples):
            turns = [" ".join(chosen.choices(WORDS, k=chosen.randint(2, 12))) for _ in range(2)]
            turns[0] += f" {POISON}" if number in poisoned else ""
            messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def _config(folder: Path, name: str, *, lora: bool, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model": {"path": str(folder / "base"), "precision": "fp32"},
        "data": {"train": str(folder / "data.jsonl")},
        "optim": {"lr": RATE, "warmup": WARMUP, "clip": CLIP, "weight_decay": DECAY},
        "train": {"steps": STEPS, "batch_samples": 8, "max_length": 192},
        "checkpoint": {"every": STEPS, "keep": STEPS},
        "output": str(folder / name),
    }
    if lora:
        config["adapter"] = {"type": "lora", "r": 4, "alpha": 8}
    for section, values in changes.items():
        config[section] = {**config[section], **values}
    return config


def _train(values: dict[str, Any], capsys: Any) -> Trained:
    """What ``luthier train`` does up to its last step; the proof has tests of its own."""
    config = parse_run(values)
    run = Path(config.output)
    run.mkdir()
    said: list[str] = []
    device, error = torch.device("cpu"), None
    with settled(config, device):
        session = Session(config, run, device, None, (), said.append)
        prepared, batches, total = session.data()
        base, model = session.model()
        parts = session.parts(base, model, prepared, batches, total, Events((), (), run, config, said.append))
        get = get_peft_model_state_dict if config.adapter else type(model).state_dict
        beginning = {name: value.clone() for name, value in get(model).items()}
        steps = [batches.step(number) for number in range(total)]
        samples = [[_sample(prepared.train[index]) for index in step.indices] for step in steps]
        progress = Progress(total)
        try:
            Loop(parts, State(), progress, StopRequest()).run()
        except LuthierError as raised:
            error = raised
        parts.checkpoints.wait()
        progress.close()
        parts.metrics.close()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["kind"] == "train"]
    text = "\n".join(said) + capsys.readouterr().out
    return Trained(run, records, samples, [len(step.micro_batches) for step in steps], beginning, text, error)


def _sample(tokens: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(tokens[0].astype("int64"))
    return ids, torch.where(torch.from_numpy(tokens[1].copy()), ids, IGNORED)


def _by_hand(base: Path, ours: Trained, *, lora: bool) -> tuple[list[float], list[float], torch.nn.Module]:
    """Losses and gradient norms of a plain loop over the same samples; nothing of it is ours."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        set_peft_model_state_dict(model, ours.beginning)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": DECAY},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    losses, norms = [], []
    for step, samples in enumerate(ours.batches):
        after = (step - WARMUP) / (STEPS - WARMUP)
        factor = (step + 1) / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * after))
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        count = sum(int((labels[1:] != IGNORED).sum()) for _, labels in samples)
        total = 0.0
        for ids, labels in samples:
            loss = model(input_ids=ids[None], labels=labels[None], num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, model


def _saved(trained: Trained, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimiser states of a checkpoint."""
    return {
        f"{file.parent.name}/{name}": value
        for file in sorted(folder_of(trained.run, step).rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def _of(trained: Trained, key: str) -> list[float]:
    return [record[key] for record in trained.records]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_loss_curve_is_that_of_a_hand_written_loop(tmp_path, capsys, lora):
    base = make_llama(tmp_path / "base", seed=1)
    _data(tmp_path / "data.jsonl")
    ours = _train(_config(tmp_path, "run", lora=lora), capsys)
    assert min(ours.micro_batches) >= 2  # accumulation is at work,
    assert max(ours.micro_batches) < 8  # and packing
    losses, norms, model = _by_hand(base, ours, lora=lora)
    assert sum(norm > CLIP for norm in norms) >= STEPS // 2  # clipping too
    assert losses[-1] < losses[0] - 0.1  # and there is a curve
    assert _of(ours, "loss") == pytest.approx(losses, rel=LIKE)
    assert _of(ours, "grad_norm") == pytest.approx(norms, rel=10 * LIKE)
    saved = load_file(next(folder_of(ours.run, STEPS).glob("adapter/*.safetensors" if lora else "model/*.safetensors")))
    expected = get_peft_model_state_dict(model) if lora else model.state_dict()
    assert set(saved) == {name for name in expected if name != "lm_head.weight"}
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=RATE / 100)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_recomputing_activations_changes_no_bit(tmp_path, capsys, lora):
    make_llama(tmp_path / "base", dropout=0.1)
    _data(tmp_path / "data.jsonl")
    kept, recomputed = (
        _train(_config(tmp_path, memory, lora=lora, model={"dropout": 0.1}, train={"memory": memory}), capsys)
        for memory in ("keep", "recompute")
    )
    assert _of(kept, "loss") == _of(recomputed, "loss")
    ours, theirs = _saved(kept, STEPS), _saved(recomputed, STEPS)
    assert set(ours) == set(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "rows"])
def test_two_rows_at_once_are_one_and_one(tmp_path, capsys, packing):
    make_llama(tmp_path / "base")
    _data(tmp_path / "data.jsonl")
    one, two = (
        _train(_config(tmp_path, f"rows-{rows}", lora=True, train={"micro_batch": rows, "packing": packing}), capsys)
        for rows in (1, 2)
    )
    assert max(two.micro_batches) < max(one.micro_batches)
    assert _of(two, "loss") == pytest.approx(_of(one, "loss"), rel=LIKE)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_fp16_trains_beside_a_loss_scale_that_a_checkpoint_keeps(tmp_path, capsys, lora):
    make_llama(tmp_path / "base")
    _data(tmp_path / "data.jsonl")
    exact = _train(_config(tmp_path, "fp32", lora=lora), capsys)
    half = _train(_config(tmp_path, "fp16", lora=lora, model={"precision": "fp16"}), capsys)
    skipped = [record for record in half.records if record["skipped"]]
    state = json.loads((folder_of(half.run, STEPS) / "trainer" / "state.json").read_text())["extra"]["state"]
    assert state["loss_scale"]["value"] == 2.0 ** (16 - len(skipped))
    assert state["loss_scale"]["good_steps"] == STEPS - 1 - max((record["step"] - 1 for record in skipped), default=-1)
    assert all("fp16 overflow" in record["reason"] for record in skipped)
    assert half.error is None
    if not skipped:
        assert _of(half, "loss") == pytest.approx(_of(exact, "loss"), rel=1e-2)
    assert half.records[-1]["loss"] < half.records[0]["loss"] - 0.1


def test_overflow_in_fp16_halves_the_scale_and_costs_no_weights(tmp_path, capsys):
    """Weights so large that gradients times the first scale leave fp16's range, and fit after some halvings."""
    base = make_llama(tmp_path / "base", tie=False)
    _scale(base, "lm_head.weight", 30.0)
    _data(tmp_path / "data.jsonl")
    half = _train(
        _config(
            tmp_path, "run", lora=True, model={"precision": "fp16"}, train={"nan_limit": 1}, checkpoint={"every": 1}
        ),
        capsys,
    )
    assert half.error is None  # an overflow is the scale's doing, not the run's
    assert half.records[0]["skipped"]
    assert "fp16 overflow; the loss scale is now 32768" in half.records[0]["reason"]
    assert not half.records[-1]["skipped"]
    assert all(math.isfinite(loss) for loss in _of(half, "loss"))
    first = _saved(half, 1)
    assert all(not value.any() for name, value in first.items() if "lora_B" in name)


def test_step_that_is_not_finite_is_skipped_and_its_samples_named(tmp_path, capsys):
    base = make_llama(tmp_path / "base", tie=False)
    _poison(base)
    _data(tmp_path / "data.jsonl", poisoned=range(5, 6))
    trained = _train(_config(tmp_path, "run", lora=True, train={"nan_limit": 2}, checkpoint={"every": 1}), capsys)
    assert trained.error is None
    skipped = [record for record in trained.records if record["skipped"]]
    assert len(skipped) == 4  # once in each of four epochs, never twice in a row
    for record in skipped:
        assert record["reason"] == "loss is nan"
        assert 5 in record["indices"]
        said = f"step {record['step']} skipped: loss is nan; its samples are {tmp_path / 'data.jsonl'}:"
        _, found, rest = trained.said.partition(said)
        assert found
        assert rest.splitlines()[0].split(",") == [str(index + 1) for index in record["indices"]]
    step = next(record["step"] for record in skipped if record["step"] > 1)
    before, after = _saved(trained, step - 1), _saved(trained, step)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(torch.isfinite(value).all() for value in _saved(trained, STEPS).values())
    healthy = [record["loss"] for record in trained.records if not record["skipped"]]
    assert healthy[-1] < healthy[0]


def test_run_stops_after_too_many_steps_in_a_row_that_are_not_finite(tmp_path, capsys):
    base = make_llama(tmp_path / "base", tie=False)
    _poison(base)
    _data(tmp_path / "data.jsonl", poisoned=range(24))
    trained = _train(_config(tmp_path, "run", lora=False, train={"nan_limit": 3}), capsys)
    assert trained.error is not None
    assert "3 steps in a row were not finite (the last: loss is nan)." in str(trained.error)
    assert trained.error.where == "step 3"
    assert "optim.lr" in trained.error.remedy and "Nothing was saved yet" in trained.error.remedy


def _poison(base: Path) -> None:
    """Make the embedding of one letter NaN: a sample with it has no finite loss, and no other sample is touched."""
    (token,) = make_tokenizer()(POISON)["input_ids"]
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def _scale(base: Path, name: str, factor: float) -> None:
    weights = load_file(base / "model.safetensors")
    weights[name] *= factor
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
