"""The quantised layer computes with the dequantised weight, forward and backward, and keeps nothing of it."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import luthier
from luthier.models.quantised import fp8
from luthier.models.quantised.adapter import QuantisedLora, register
from luthier.models.quantised.choose import choose
from luthier.models.quantised.formats import FORMS, by_row, quantise
from luthier.models.quantised.layer import QuantisedLinear, quantised_layers
from luthier.models.quantised.loading import quantise_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def layer(form: Any, *, bias: bool = True) -> QuantisedLinear:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(48), requires_grad=False) if bias else None
    made = QuantisedLinear(64, 48, form, torch.float32, bias=weight)
    made.fill(*quantise(torch.randn(48, 64), form))
    return made


@pytest.mark.parametrize("form", FORMS)
def test_product_and_gradient_are_those_of_the_dequantised_weight(form):
    made = layer(form)
    x = torch.randn(2, 5, 64, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    weigh = torch.randn(2, 5, 48)
    (made(x) * weigh).sum().backward()
    (nn.functional.linear(same, made.dequantize(), made.bias) * weigh).sum().backward()
    assert torch.allclose(made(x), nn.functional.linear(same, made.dequantize(), made.bias), atol=1e-5)
    assert torch.allclose(x.grad, same.grad, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_dequantised_is_kept_for_backward(form):
    made, kept = layer(form), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        made(torch.randn(2, 64, requires_grad=True))
    assert {tensor.data_ptr() for tensor in kept} == {made.codes.data_ptr(), made.scales.data_ptr()}


@pytest.mark.parametrize("form", FORMS)
def test_casts_leave_the_bytes_alone_and_they_are_in_the_state_dict(form):
    made = layer(form)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.to(torch.bfloat16).float().half()
    assert set(before) == {"codes", "scales", "bias"}
    assert torch.equal(made.codes, before["codes"])
    assert torch.equal(made.scales, before["scales"])
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_products_in_fp8_round_activations_and_gradients_by_row():
    made = layer("fp8", bias=False)
    made.multiplies = "fp8"
    x = torch.randn(7, 64, requires_grad=True)
    weigh = torch.randn(7, 48)
    (made(x) * weigh).sum().backward()
    rounded = [codes.float() * scales for codes, scales in (by_row(x.detach()), by_row(weigh))]
    weight = made.dequantize()
    assert torch.allclose(made(x), rounded[0] @ weight.t(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made(x), x @ weight.t(), rtol=1e-4, atol=1e-4)
    # Backward folds W's row scales into the gradient before it is rounded.
    scales = made.scales.view(torch.float32).reshape(1, -1)
    folded, by = by_row(weigh * scales)
    wanted = folded.float() * by @ made.codes.view(torch.float8_e4m3fn).float()
    assert torch.allclose(x.grad, wanted, rtol=1e-4, atol=1e-4)
    exact = weigh @ weight
    assert float((x.grad - exact).norm() / exact.norm()) < 0.05


def test_fp8_product_that_is_wrong_on_a_device_is_not_used(monkeypatch):
    fp8._trial.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, **known: torch.zeros(a.shape[0], b.shape[1]))
    try:
        assert not fp8.multiplies_in_fp8(torch.device("cpu"), torch.float32)
    finally:
        fp8._trial.cache_clear()


def test_llm_int8_form_has_the_bits_of_bitsandbytes():
    made = layer("int8", bias=False)
    made.multiplies = "llm.int8"
    theirs = bitsandbytes.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=6.0)
    torch.manual_seed(0)
    torch.randn(48, 64)
    weight = torch.randn(48, 64)
    made.fill(*quantise(weight, "int8"))
    theirs.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    x = torch.randn(9, 64)
    x[:, 3] = 9.0  # a column of outliers
    with torch.no_grad():
        assert torch.equal(made(x), theirs.eval()(x))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("base"), hidden=64, dtype=torch.bfloat16)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_loaded_base_is_that_of_transformers_with_bitsandbytes(base, form):
    ours, _ = luthier.load(base, precision=form, device="cpu")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32) if form == "nf4" else BitsAndBytesConfig(load_in_8bit=True)  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"})  # fmt: skip
    for name, module in ours.named_modules():
        if isinstance(module, QuantisedLinear):
            assert torch.equal(module.codes.reshape(-1), plain.get_submodule(name).weight.data.view(torch.uint8).reshape(-1))  # fmt: skip
    for module in quantised_layers(ours):
        module.multiplies = "llm.int8" if form == "int8" else "16 bits"
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, plain.eval()(IDS).logits)


@pytest.mark.parametrize("form", FORMS)
def test_quantised_while_read_is_quantised_in_memory(base, form):
    """And nothing of a quantiser is left on the model: it is described, saved and trained by what it holds."""
    ours, _ = luthier.load(base, precision=form, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    quantise_model(plain, form, ())
    ours_state, plain_state = ours.state_dict(), plain.state_dict()
    assert list(ours_state) == list(plain_state)
    assert all(torch.equal(ours_state[name], plain_state[name]) for name in ours_state)
    assert not hasattr(ours, "is_quantized")
    assert not hasattr(ours.config, "quantization_config")
    assert not hasattr(ours, "hf_quantizer")


def test_layers_stay_in_16_bits_by_default_by_name_and_where_blocks_do_not_fit(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "a", hidden=64, tie=False))
    assert choose(model, "nf4", ()).kept == ("lm_head",)
    named = choose(model, "nf4", ["layers.1.mlp.down_proj", "q_proj"])
    assert named.kept == ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj")  # fmt: skip
    assert not named.notes
    with pytest.raises(luthier.RequestError, match="no module is called"):
        choose(model, "nf4", ["down_projection"])
    odd = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path / "b", hidden=32))
    choice = choose(odd, "nf4", ())
    assert choice.quantised == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert "don't divide by 64: model.layers.*.mlp.gate_proj" in choice.notes[0]
    assert len(choose(odd, "fp8", ()).quantised) == 14


def adapted(base: Any, form: str, **options: Any) -> Any:
    model, _ = luthier.load(base, precision=form, device="cpu")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    for name, value in options.items():  # peft asks for scipy when "loftq" is given to it
        setattr(config, name, value)
    register(config, model)
    return get_peft_model(model, config)


@pytest.mark.parametrize("form", FORMS)
def test_dora_is_computed_with_the_dequantised_weight(base, form):
    torch.manual_seed(0)
    model = adapted(base, form, use_dora=True, init_lora_weights=False)
    found = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(found, QuantisedLora)
    weight = found.get_base_layer().dequantize()
    update = found.lora_B["default"].weight @ found.lora_A["default"].weight * found.scaling["default"]
    magnitude = found.lora_magnitude_vector["default"].weight
    assert torch.allclose(magnitude, (weight + update).norm(dim=1), rtol=1e-5)
    x = torch.randn(3, 64)
    whole = magnitude.unsqueeze(1) / (weight + update).norm(dim=1, keepdim=True) * (weight + update)
    for layer in quantised_layers(model):
        layer.multiplies = "16 bits"
    assert torch.allclose(found(x), x @ whole.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "eva", "orthogonal", "pissa_niter_4"])
def test_starts_that_read_or_change_the_weight_are_refused_by_name(base, start):
    with pytest.raises(luthier.RequestError, match=f"init_lora_weights '{start}'"):
        adapted(base, "nf4", init_lora_weights=start)


def test_merging_in_memory_is_refused_with_the_way_that_works(base):
    model = adapted(base, "int8")
    with pytest.raises(luthier.RequestError, match="--to merged"):
        model.merge_and_unload()


def test_other_methods_are_refused_by_name(base):
    from peft import LoHaConfig

    model, _ = luthier.load(base, precision="nf4", device="cpu")
    with pytest.raises(luthier.RequestError, match="loha has no form"):
        register(LoHaConfig(target_modules=["q_proj"]), model)
    with pytest.raises(luthier.RequestError, match="no gradient changes"):
        luthier.load(base, precision="nf4", device="cpu", trainable=True)


def test_second_adapter_with_other_targets_goes_on_through_the_same_hook(base, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, target in (("one", "q_proj"), ("two", "up_proj")):
        config = LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM", init_lora_weights=False)
        adapter = get_peft_model(plain, config)
        adapter.save_pretrained(tmp_path / name)
        plain = adapter.unload()
    both = {"one": tmp_path / "one", "two": tmp_path / "two"}
    model, _ = luthier.load(base, precision="nf4", device="cpu", adapter=both)
    carried = [type(module) for module in model.modules() if hasattr(module, "lora_A")]
    assert carried == [QuantisedLora] * 4
    logits = []
    with torch.no_grad():
        for name in both:
            model.set_adapter(name)
            logits.append(model(IDS).logits)
    assert not torch.equal(*logits)
    assert luthier.describe(model).precision == "nf4"
    assert luthier.describe(model).parameters == sum(weight.numel() for weight in plain.parameters()) + 4 * 4 * (
        64 + 96
    )
