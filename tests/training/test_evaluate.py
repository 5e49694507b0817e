"""Held-out loss: the mean over all targets, however batches are cut, and nothing of the model is left changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import make_llama
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from luthier.config.schema import TrainConfig
from luthier.data.order import Share
from luthier.errors import RequestError
from luthier.training.evaluate import evaluate_loss

LENGTHS = [9, 30, 4, 17, 30, 2, 12]


class Samples:
    """What evaluation needs of `luthier.data.tokens.Tokens`, held in memory."""

    def __init__(self, lengths: list[int], *, targets: bool = True) -> None:
        generator = np.random.default_rng(0)
        self._ids = [generator.integers(3, 320, length).astype(np.int32) for length in lengths]
        self._masks = [(generator.random(length) < 0.6) & targets for length in lengths]
        for mask in self._masks:
            mask[0] = False
        self.lengths = np.array(lengths, np.int32)
        self.trained = np.array([mask.sum() for mask in self._masks], np.int32)
        self.shares = (Share(0, len(lengths), None),)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._ids[index], self._masks[index]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"), tokenizer=False, dropout=0.5)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def evaluate(model, samples, **train):
    return evaluate_loss(model, samples, TrainConfig(**train), pad_id=0, device=torch.device("cpu"))


def by_hand(model, samples) -> float:
    """Each sample alone, with the plain model."""
    model.eval()
    total = 0.0
    for index in range(len(samples)):
        ids, mask = samples[index]
        with torch.no_grad():
            logits = model(torch.from_numpy(ids).long()[None]).logits[0, :-1]
        targets = torch.from_numpy(np.where(mask, ids, -100)).long()[1:]
        total += float(cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
    return total / int(samples.trained.sum())


def test_loss_is_the_mean_over_all_targets_however_batches_are_cut(model):
    samples = Samples(LENGTHS)
    expected = by_hand(model, samples)
    one_by_one = evaluate(model, samples, micro_batch=1, max_length=30)
    together = evaluate(model, samples, micro_batch=8, max_length=64)
    assert one_by_one.tokens == together.tokens == samples.trained.sum()
    assert one_by_one.loss == pytest.approx(expected, rel=1e-5)
    assert together.loss == pytest.approx(expected, rel=1e-5)
    assert together.perplexity == pytest.approx(math.exp(together.loss))


def test_batches_stay_within_a_training_micro_batch_and_hold_everything(model):
    shapes = []
    model.register_forward_pre_hook(lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    evaluate(model, Samples(LENGTHS), micro_batch=2, max_length=32)
    assert max(rows * length for rows, length in shapes) <= 64
    assert sum(rows for rows, _ in shapes) == len(LENGTHS)
    assert [length for _, length in shapes] == sorted(length for _, length in shapes)


def test_sample_longer_than_a_batch_runs_alone(model):
    shapes = []
    model.register_forward_pre_hook(lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    evaluate(model, Samples([40, 3]), micro_batch=1, max_length=8)
    assert shapes == [(1, 3), (1, 40)]


def test_repeated_evaluation_gives_equal_bits_and_draws_no_random_number(model):
    model.train()
    before = torch.get_rng_state()
    first = evaluate(model, Samples(LENGTHS), micro_batch=4, max_length=32)
    torch.manual_seed(99)
    second = evaluate(model, Samples(LENGTHS), micro_batch=4, max_length=32)
    assert first.loss == second.loss
    torch.manual_seed(0)
    torch.set_rng_state(before)
    evaluate(model, Samples(LENGTHS), micro_batch=4, max_length=32)
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_are_restored_module_by_module_even_after_an_error(model):
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    evaluate(model, Samples(LENGTHS), max_length=32)
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(IndexError):
        evaluate(model, _Broken([3]), max_length=32)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()


class _Broken(Samples):
    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        raise IndexError(index)


def test_held_out_data_without_targets_is_an_error_that_names_the_key(model):
    with pytest.raises(RequestError, match=r"data\.eval: no token of the held-out data is trained on") as caught:
        evaluate(model, Samples(LENGTHS, targets=False), max_length=32)
    assert "luthier data" in caught.value.remedy
