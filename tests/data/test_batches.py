"""Steps: functions of their number, with every sample once an epoch; packed rows train as their samples alone."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from luthier.config.schema import TrainConfig
from luthier.data import batches as batches_module
from luthier.data.batches import IGNORED, Batches
from luthier.data.order import Share

VOCABULARY = 64


@dataclass
class Made:
    """Samples in memory with what batches need of ``Tokens``."""

    samples: list
    shares: tuple

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    @property
    def lengths(self):
        return np.array([len(ids) for ids, _ in self.samples], np.int32)

    @property
    def trained(self):
        return np.array([mask.sum() for _, mask in self.samples], np.int32)


def make(count=100, longest=40, seed=0, shares=None):
    random = np.random.default_rng(seed)
    samples = []
    for length in random.integers(2, longest + 1, count):
        mask = random.random(length) < 0.5
        mask[0], mask[-1] = False, True
        samples.append((random.integers(1, VOCABULARY, length).astype(np.int32), mask))
    return Made(samples, shares or (Share(0, count),))


SETTINGS = [
    {"batch_samples": 7},
    {"batch_samples": 7, "packing": False},
    {"batch_tokens": 150},
    {"batch_tokens": 150, "packing": False, "micro_batch": 3},
    {"batch_tokens": 5},
    {},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("count", [1, 5, 100])
def test_every_sample_is_in_one_step_of_an_epoch(settings, count):
    batches = Batches(make(count), TrainConfig(max_length=40, **settings), pad_id=0)
    for epoch in range(2):
        steps = [batches.step_samples(epoch * batches.steps_per_epoch + k) for k in range(batches.steps_per_epoch)]
        assert all(len(step) for step in steps)
        assert sorted(index for step in steps for index in step.tolist()) == list(range(count))


@pytest.mark.parametrize("settings", SETTINGS)
def test_step_is_the_same_whatever_was_asked_for_before(settings):
    tokens, train = make(), TrainConfig(max_length=40, **settings)
    batches = Batches(tokens, train, pad_id=0)
    in_order = [batches.step(number) for number in range(2 * batches.steps_per_epoch)]
    for number in reversed(range(len(in_order))):
        alone = Batches(tokens, train, pad_id=0).step(number)
        assert alone.indices == in_order[number].indices
        for one, other in zip(alone.micro_batches, in_order[number].micro_batches, strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
            assert torch.equal(one.position_ids, other.position_ids)


@pytest.mark.parametrize("settings", SETTINGS)
def test_counts_of_a_step_are_those_of_its_samples(settings):
    tokens = make()
    batches = Batches(tokens, TrainConfig(max_length=40, **settings), pad_id=0)
    for number in range(batches.steps_per_epoch):
        step = batches.step(number)
        labels = [batch.labels for batch in step.micro_batches]
        assert step.trained_tokens == sum(int((label != IGNORED).sum()) for label in labels)
        assert step.trained_tokens == tokens.trained[step.indices].sum()
        assert step.tokens == tokens.lengths[step.indices].sum()
        places = sum(batch.input_ids.numel() for batch in step.micro_batches)
        assert batches.places(number) == (step.tokens, places)
        for batch in step.micro_batches:
            targets = batch.labels != IGNORED
            assert torch.equal(batch.labels[targets], batch.input_ids[targets])
            assert not targets[batch.position_ids == 0].any()


def test_windows_of_tokens_are_nearly_equal_however_the_epoch_is_chunked(monkeypatch):
    tokens, train = make(500), TrainConfig(max_length=40, batch_tokens=400)
    whole = Batches(tokens, train, pad_id=0)
    sizes = [tokens.lengths[whole.step_samples(number)].sum() for number in range(whole.steps_per_epoch)]
    assert whole.steps_per_epoch == -(-int(tokens.lengths.sum()) // 400)
    assert max(sizes) <= 400 + 40 and min(sizes) >= 400 - 2 * 40
    monkeypatch.setattr(batches_module, "CHUNK", 7)
    chunked = Batches(tokens, train, pad_id=0)
    for number in range(whole.steps_per_epoch):
        assert np.array_equal(whole.step_samples(number), chunked.step_samples(number))


def test_mixture_by_tokens_fills_every_step_of_every_epoch():
    tokens = make(60, shares=(Share(0, 50, 1.0), Share(50, 10, 0.37)))
    batches = Batches(tokens, TrainConfig(max_length=40, batch_tokens=120), pad_id=0)
    for number in range(5 * batches.steps_per_epoch):
        assert len(batches.step_samples(number))


def test_without_packing_a_batch_has_samples_of_like_length_in_shuffled_order():
    tokens = make(1000)
    batches = Batches(tokens, TrainConfig(max_length=40, batch_samples=8, packing=False, micro_batch=8), pad_id=0)
    sizes = [batches.places(number) for number in range(batches.steps_per_epoch)]
    held, places = map(sum, zip(*sizes, strict=True))
    assert 1 - held / places < 0.06
    means = [held for held, _ in sizes]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_rows_without_packing_have_a_mask_only_where_padded():
    batches = Batches(make(), TrainConfig(max_length=40, batch_samples=8, packing=False, micro_batch=4), pad_id=0)
    for batch in batches.step(0).micro_batches:
        if batch.attention_mask is None:
            assert (batch.position_ids[:, -1] == batch.input_ids.shape[1] - 1).all()
        else:
            assert batch.attention_mask.sum() == batch.tokens < batch.input_ids.numel()


def tiny_model(kind, attention):
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": attention,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**settings))
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **settings))


def loss_sum(model, batch):
    logits = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def gradients(model, batches):
    model.zero_grad()
    for batch in batches:
        loss_sum(model, batch).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [{"micro_batch": 1}, {"micro_batch": 3}, {"micro_batch": 4, "packing": False}])
def test_gradients_of_a_batch_are_those_of_its_samples_alone(kind, attention, rows):
    model, tokens = tiny_model(kind, attention), make(12, longest=20)
    together = Batches(tokens, TrainConfig(max_length=48, batch_samples=12, **rows), pad_id=0).step(0)
    alone = Batches(tokens, TrainConfig(max_length=48, batch_samples=1, packing=False), pad_id=0)
    singles = [alone.step(number).micro_batches[0] for number in range(12)]
    if rows.get("packing", True):
        assert any((batch.position_ids[:, 1:] == 0).any() for batch in together.micro_batches), "nothing was packed"
    expected, found = gradients(model, singles), gradients(model, together.micro_batches)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_packed_samples_would_show_each_other_without_restarted_positions():
    model, tokens = tiny_model("llama", "sdpa"), make(12, longest=20)
    batch = Batches(tokens, TrainConfig(max_length=256, batch_samples=12), pad_id=0).step(0).micro_batches[0]
    right = loss_sum(model, batch)
    batch.position_ids.copy_(torch.arange(batch.input_ids.shape[1]).expand_as(batch.position_ids))
    assert abs(loss_sum(model, batch) - right) > 1e-3
