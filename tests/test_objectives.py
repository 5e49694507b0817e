"""The summed loss equals transformers' own mean loss times its count, and so do the gradients."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from tiny import make_llama, make_qwen3_moe
from transformers import AutoModelForCausalLM

from luthier import objectives
from luthier.data.batches import IGNORED
from luthier.objectives import causal_loss

MAKERS = {"llama": make_llama, "qwen3_moe": make_qwen3_moe}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param), tokenizer=False)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def padded() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 320, (3, 20), generator=generator)
    lengths = torch.tensor([20, 13, 7])
    mask = (torch.arange(20) < lengths[:, None]).long()
    labels = ids.clone()
    labels[:, :5] = IGNORED
    labels[0, 9:14] = IGNORED
    labels[mask == 0] = IGNORED
    return SimpleNamespace(
        input_ids=ids.masked_fill(mask == 0, 0),
        labels=labels,
        position_ids=torch.arange(20).expand(3, -1).contiguous(),
        attention_mask=mask,
    )


def packed() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 320, (1, 24), generator=generator)
    labels = ids.clone()
    for hidden in (slice(0, 3), slice(10, 14), slice(19, 20)):
        labels[:, hidden] = IGNORED
    positions = torch.cat([torch.arange(10), torch.arange(9), torch.arange(5)])[None]
    return SimpleNamespace(input_ids=ids, labels=labels, position_ids=positions, attention_mask=None)


def reference(model, batch) -> torch.Tensor:
    """Transformers' mean loss times the number of trained tokens."""
    count = int((batch.labels[:, 1:] != IGNORED).sum())
    outputs = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        labels=batch.labels,
        use_cache=False,
    )
    return outputs.loss * count


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("batch", [padded(), packed()], ids=["padded", "packed"])
def test_loss_and_gradients_equal_those_of_transformers(model, batch):
    expected = reference(model, batch)
    expected.backward()
    expected_gradients = gradients(model)

    loss = causal_loss(model, batch)
    loss.sum.backward()

    assert loss.count == int((batch.labels[:, 1:] != IGNORED).sum())
    assert loss.sum.dtype == torch.float32
    torch.testing.assert_close(loss.sum, expected, rtol=1e-6, atol=0)
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= 2e-6 * scale + 1e-9, name


def test_loss_in_pieces_equals_the_whole_and_holds_no_probabilities(model, monkeypatch):
    batch = packed()
    whole = causal_loss(model, batch)
    whole.sum.backward()
    expected = gradients(model)

    monkeypatch.setattr(objectives, "SOFTMAX_BYTES", 4 * 320 * 5)
    held = []  # every tensor kept for the backward pass: of vocabulary width only the logits themselves, no softmax
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        pieces = causal_loss(model, batch)
    wide = {t.untyped_storage().data_ptr() for t in held if t.shape[-1:] == (320,) and t.is_floating_point()}
    assert len(wide - {model.lm_head.weight.untyped_storage().data_ptr()}) == 1
    pieces.sum.backward()

    torch.testing.assert_close(pieces.sum, whole.sum, rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_head_runs_only_where_the_next_token_is_trained(model):
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    batch = packed()
    loss = causal_loss(model, batch)
    assert rows == [loss.count]
    assert loss.count < batch.input_ids.shape[1]


def test_last_column_predicts_nothing_even_if_all_is_trained(model):
    batch = packed()
    batch.labels = batch.input_ids.clone()
    loss = causal_loss(model, batch)
    assert loss.count == batch.input_ids.shape[1] - 1
    torch.testing.assert_close(loss.sum, reference(model, batch), rtol=1e-6, atol=0)


def test_untrained_micro_batch_is_a_zero_with_zero_gradients(model):
    batch = padded()
    batch.labels = torch.full_like(batch.labels, IGNORED)
    loss = causal_loss(model, batch)
    assert (loss.count, float(loss.sum.detach())) == (0, 0.0)
    loss.sum.backward()
    found = gradients(model)
    assert found
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_balance_loss_is_weighted_and_only_where_the_config_asks(tmp_path):
    folder = make_qwen3_moe(tmp_path, tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert causal_loss(model, padded()).extra is None

    model.config.output_router_logits = True
    loss = causal_loss(model, padded())
    batch = padded()
    outputs = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        labels=batch.labels,
    )
    torch.testing.assert_close(loss.sum / loss.count + loss.extra, outputs.loss, rtol=1e-6, atol=0)
    loss.extra.backward()
    assert any("mlp.gate" in name for name in gradients(model))


def test_virtual_tokens_of_prompt_tuning_are_no_positions_of_the_row(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path, tokenizer=False), dtype=torch.float32)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(base, config)
    batch = padded()
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        loss = causal_loss(model, batch)
        expected = reference(model, batch)
    torch.testing.assert_close(loss.sum, expected, rtol=1e-6, atol=0)


def test_adapted_model_computes_as_little_as_its_base(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path, tokenizer=False), dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = []
    base.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    loss = causal_loss(model, packed())
    assert rows == [loss.count]
    torch.testing.assert_close(loss.sum, reference(model, packed()), rtol=1e-6, atol=0)
