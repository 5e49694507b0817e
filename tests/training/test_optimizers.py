"""The optimiser: groups, fp32 sums and masters, and states that go on bit for bit."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from luthier.config.schema import OptimConfig
from luthier.errors import ArtifactError, RequestError
from luthier.training.engines import Group, make, works_fused
from luthier.training.groups import Role, members
from luthier.training.masters import decode_into, encode, round_into
from luthier.training.optimizers import build

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OPTIMIZERS = [
    pytest.param({"name": "adamw"}, id="adamw"),
    pytest.param({"name": "adafactor"}, id="adafactor"),
    pytest.param({"name": "muon"}, id="muon"),
    pytest.param({"name": "adamw", "states": "8bit"}, id="8bit", marks=needs_bitsandbytes),
]
PRECISIONS = [
    pytest.param(torch.float32, "fp32", id="fp32"),
    pytest.param(torch.bfloat16, "fp32", id="bf16-master"),
    pytest.param(torch.bfloat16, "none", id="bf16"),
    pytest.param(torch.float16, "fp32", id="fp16-master"),
]


class Small(nn.Module):
    """An embedding, a matrix large enough for 8-bit states, a norm, a bias, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 64)
        self.inner = nn.Linear(64, 72)
        self.norm = nn.LayerNorm(72)
        self.lm_head = nn.Linear(72, 50, bias=False)

    def get_output_embeddings(self):
        return self.lm_head


def fill_gradients(model, optimizer, step):
    """Two micro-batches of gradients that depend on the step alone."""
    for micro in range(2):
        generator = torch.Generator().manual_seed(100 * step + micro)
        for parameter in model.parameters():
            if parameter.requires_grad:
                gradient = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        optimizer.accumulate()


def run(model, optimizer, steps):
    for step in steps:
        fill_gradients(model, optimizer, step)
        optimizer.scale_gradients(0.5)
        assert optimizer.finite(optimizer.clip(1.0))
        optimizer.step(1.0 / (step + 1))
        optimizer.zero_grad()


def tiny_llama(**changes):
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 60, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes}))


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "master"), PRECISIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_three_steps_saved_and_three_more_are_six(optim, dtype, master, device):
    config = OptimConfig(**optim, lr=1e-2, weight_decay=0.1, master=master)
    through = Small().to(device, dtype)
    optimizer = build(through, config, adapter=False)
    run(through, optimizer, range(3))
    weights = {name: tensor.clone() for name, tensor in through.state_dict().items()}
    states = {name: tensor.clone().cpu() for name, tensor in optimizer.state_tensors().items()}
    residuals = {name: tensor.clone().cpu() for name, tensor in optimizer.master_tensors().items()}
    run(through, optimizer, range(3, 6))

    again = Small().to(device, dtype)
    again.load_state_dict(weights)
    fresh = build(again, config, adapter=False)
    fresh.load_tensors(states, residuals)
    run(again, fresh, range(3, 6))
    for name, tensor in through.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(fresh.state_tensors()[name], tensor), name
    for name, tensor in optimizer.master_tensors().items():
        assert torch.equal(fresh.master_tensors()[name], tensor), name
    assert not torch.equal(through.inner.weight, weights["inner.weight"])
    assert bool(residuals) == (dtype != torch.float32 and master == "fp32")


def test_masters_of_bf16_are_half_their_size_on_disk():
    model = Small().bfloat16()
    optimizer = build(model, OptimConfig(lr=1e-3), adapter=False)
    run(model, optimizer, range(2))
    tensors = optimizer.master_tensors()
    assert set(tensors) == {f"{name}::master" for name, _ in model.named_parameters()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int16}
    assert any(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("device", DEVICES)
def test_every_master_is_restored_from_its_weight_and_16_bits(device):
    halves = torch.arange(1 << 16, dtype=torch.int32)
    uppers = torch.tensor(  # zero, denormals, ordinary numbers with even and odd last bits, the largest
        [0x0000, 0x0001, 0x0002, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x4049, 0x7F00, 0x7F7E], dtype=torch.int32
    )
    positive = ((uppers << 16)[:, None] + halves[None, :]).flatten()
    bits = torch.cat([positive, positive | -(1 << 31)]).to(device)
    master = bits.view(torch.float32)
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    round_into(weight, master)
    stored, strange = encode(weight, master)
    assert stored.dtype == torch.int16 and not strange
    assert stored.min() == -(1 << 15) and stored.max() == (1 << 15) - 1
    restored = torch.empty_like(master)
    decode_into(restored, weight, stored, "weight")
    assert torch.equal(restored.view(torch.int32), bits)


def test_masters_round_to_the_nearest_and_ties_away_from_zero():
    generator = torch.Generator().manual_seed(1)
    master = torch.randn(100_000, generator=generator)
    master = master[(master.view(torch.int32) & 0xFFFF) != 0x8000]
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    round_into(weight, master)
    assert torch.equal(weight, master.bfloat16())
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x00008000], dtype=torch.int32).view(torch.float32)
    ties = torch.cat([ties, -ties])
    weight = torch.empty_like(ties, dtype=torch.bfloat16)
    round_into(weight, ties)
    assert (weight.float().abs() > ties.abs()).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_weight_that_is_not_finite_stays_so(value):
    master = torch.tensor([value, 1.0])
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    round_into(weight, master)
    stored, strange = encode(weight, master)
    restored = torch.empty_like(master)
    decode_into(restored, weight, stored, "weight")
    assert not torch.isfinite(weight[0]) and not torch.isfinite(restored[0])
    assert restored[1] == 1.0 and not strange


def test_a_weight_changed_behind_the_optimiser_is_named_when_saving():
    model = Small().bfloat16()
    optimizer = build(model, OptimConfig(lr=1e-3), adapter=False)
    run(model, optimizer, range(1))
    with torch.no_grad():
        model.inner.weight[0, 0] += 1
    with pytest.raises(ArtifactError, match=r"inner\.weight"):
        optimizer.master_tensors()


def test_fp16_masters_of_another_step_are_refused():
    model = Small().half()
    optimizer = build(model, OptimConfig(lr=1e-1), adapter=False)
    run(model, optimizer, range(1))
    states, residuals = optimizer.state_tensors(), optimizer.master_tensors()
    fresh = Small().half()
    with pytest.raises(ArtifactError, match="different steps"):
        build(fresh, OptimConfig(), adapter=False).load_tensors(states, residuals)


def test_small_updates_reach_bf16_weights_only_through_masters():
    moved = {}
    for master in ("fp32", "none"):
        model = Small().bfloat16()
        before = model.inner.weight.detach().clone()
        optimizer = build(model, OptimConfig(lr=1e-5, master=master), adapter=False)
        for _ in range(20):
            model.inner.weight.grad = torch.ones_like(model.inner.weight)
            optimizer.accumulate()
            optimizer.step(1.0)
            optimizer.zero_grad()
        moved[master] = (model.inner.weight != before).float().mean().item()
    assert moved["fp32"] > 2 * moved["none"]


def test_micro_batches_are_summed_in_fp32():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = build(model, OptimConfig(), adapter=False)
    for value in [256.0, 0.5, 0.5, 0.5]:
        model.weight.grad = torch.full_like(model.weight, value)
        optimizer.accumulate()
        assert model.weight.grad is None
    assert optimizer.clip(None) == 257.5  # bf16 would have stayed at 256


def test_clipping_gives_torchs_bits():
    ours, theirs = Small(), Small()
    optimizer = build(ours, OptimConfig(), adapter=False)
    fill_gradients(ours, optimizer, 0)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        other.grad = mine.grad.clone()
    by_name = [parameter for _, parameter in sorted(theirs.named_parameters())]
    expected = torch.nn.utils.clip_grad_norm_(by_name, 0.5)
    assert optimizer.clip(0.5) == expected
    assert all(torch.equal(mine.grad, other.grad) for mine, other in zip(ours.parameters(), theirs.parameters()))


def test_without_a_limit_the_norm_is_measured_and_nothing_changes():
    model = Small()
    optimizer = build(model, OptimConfig(), adapter=False)
    fill_gradients(model, optimizer, 0)
    before = model.inner.weight.grad.clone()
    assert optimizer.clip(None) > 1
    assert torch.equal(model.inner.weight.grad, before)
    optimizer.zero_grad()
    assert optimizer.clip(1.0) == 0


def test_a_gradient_that_is_not_finite_shows_in_the_norm():
    model = Small()
    optimizer = build(model, OptimConfig(), adapter=False)
    fill_gradients(model, optimizer, 0)
    model.norm.weight.grad[3] = float("nan")
    assert not optimizer.finite(optimizer.clip(1.0))


def test_adamw_gives_torchs_bits():
    ours, theirs = Small(), Small()
    config = OptimConfig(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    optimizer = build(ours, config, adapter=False)
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    plain = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, fused=True)
    for step in range(3):
        fill_gradients(ours, optimizer, step)
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            other.grad = mine.grad.clone()
        optimizer.step(1.0)
        optimizer.zero_grad()
        reference.step()
    assert works_fused(torch.device("cpu"), torch.float32)
    assert all(torch.equal(mine, other) for mine, other in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Muon", pytest.param("AdamW 8-bit", marks=needs_bitsandbytes)])
@pytest.mark.parametrize("shape", [(8,), (16, 8), (80, 64), (2, 6, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_at_the_start_are_those_the_library_makes_itself(name, shape, dtype):
    if name == "Muon" and len(shape) != 2:
        pytest.skip("Muon takes matrices only")
    weight = torch.ones(shape, dtype=dtype)
    ours = make(name, [Group([weight], 1e-3, 0.0)], OptimConfig())
    mine = {key: value for key, value in ours.state[weight].items()}
    ours.state.clear()
    weight.grad = torch.zeros_like(weight)
    ours.step()
    theirs = ours.state[weight]
    assert set(mine) == set(theirs)
    for key, value in theirs.items():
        if not isinstance(value, torch.Tensor):
            assert type(mine[key]) is type(value) and mine[key] == 0
            continue
        assert (mine[key].shape, mine[key].dtype, mine[key].device) == (value.shape, value.dtype, value.device), key
        assert key.startswith("qmap") or not mine[key].any()


def test_states_have_names_before_the_first_step_and_in_order():
    optimizer = build(Small(), OptimConfig(), adapter=False)
    names = list(optimizer.state_tensors())
    assert names[:3] == ["embed.weight::exp_avg", "embed.weight::exp_avg_sq", "embed.weight::step"]
    assert names == sorted(names)
    assert all(isinstance(tensor, torch.Tensor) for tensor in optimizer.state_tensors().values())


def test_tensors_that_do_not_fit_are_named_and_nothing_changes():
    model = Small()
    optimizer = build(model, OptimConfig(lr=1e-3), adapter=False)
    run(model, optimizer, range(1))
    states = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    del states["inner.weight::exp_avg"]
    states["outer.weight::exp_avg"] = torch.zeros(2)
    states["norm.bias::exp_avg"] = torch.zeros(3)
    fresh = build(Small(), OptimConfig(), adapter=False)
    with pytest.raises(ArtifactError) as caught:
        fresh.load_tensors(states, {"inner.weight::master": torch.zeros(2)})
    message = str(caught.value)
    assert "missing: inner.weight::exp_avg" in message and "outer.weight::exp_avg" in message
    assert "norm.bias::exp_avg is float32 [3], float32 [72] is wanted" in message
    assert not any(tensor.any() for tensor in fresh.state_tensors().values())
    with pytest.raises(ArtifactError, match=r"fp32 masters .* inner\.weight::master"):
        fresh.load_tensors(optimizer.state_tensors(), {"inner.weight::master": torch.zeros(2)})


def test_norms_and_biases_do_not_decay():
    model = Small()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build(model, OptimConfig(lr=1e-2, weight_decay=0.5), adapter=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1.0)
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert same == {"inner.bias", "norm.weight", "norm.bias"}


def test_a_parameter_without_a_gradient_is_left_alone():
    for dtype in (torch.float32, torch.bfloat16):
        model = Small().to(dtype)
        before = model.embed.weight.detach().clone()
        optimizer = build(model, OptimConfig(lr=1e-2, weight_decay=0.5), adapter=False)
        model.inner.weight.grad = torch.ones_like(model.inner.weight)
        optimizer.accumulate()
        optimizer.step(1.0)
        assert torch.equal(model.embed.weight, before)


def test_lora_b_and_embeddings_have_their_own_rates():
    model = get_peft_model(
        tiny_llama(),
        LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], use_dora=False),
    )
    roles = {member.name.removeprefix("base_model.model."): member.role for member in members(model)}
    assert roles["model.layers.0.self_attn.q_proj.lora_A.default.weight"] is Role.MATRIX
    assert roles["model.layers.0.self_attn.q_proj.lora_B.default.weight"] is Role.LORA_B
    assert roles["model.embed_tokens.lora_embedding_A.default"] is Role.MATRIX
    assert roles["model.embed_tokens.lora_embedding_B.default"] is Role.LORA_B
    assert roles["lm_head.modules_to_save.default.weight"] is Role.EMBEDDING
    optimizer = build(model, OptimConfig(lr_b=1e-2, lr_embeddings=1e-6), adapter=True)
    assert optimizer.base_rate == 2e-4
    lines = optimizer.describe()
    assert len(lines) == 3
    assert any("LoRA B, 3 tensors" in line and "lr 0.01" in line for line in lines)
    assert any("embeddings and head, 1 tensor, 1,920 parameters, lr 1e-06" in line for line in lines)
    assert any("lr 0.0002" in line for line in lines)


def test_new_tokens_train_at_the_rate_of_embeddings():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5]))
    roles = {member.name: member.role for member in members(model) if "token_adapter" in member.name}
    assert roles and set(roles.values()) == {Role.EMBEDDING}


def test_muon_takes_hidden_matrices_and_says_so():
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, vocab_size=60, num_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip
    lines = build(model, OptimConfig(name="muon"), adapter=False).describe()
    muon = [line for line in lines if line.startswith("Muon")]
    assert len(muon) == 1 and "model.layers.*.self_attn.q_proj.weight ×2" in muon[0]
    assert "embed_tokens" not in muon[0] and "lm_head" not in muon[0]
    assert any(line.startswith("AdamW: stacked matrices") and "experts" in line for line in lines)


def test_tied_embeddings_are_updated_once():
    model = tiny_llama(tie_word_embeddings=True)
    names = [member.name for member in members(model)]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_impossible_requests_are_refused():
    with pytest.raises(RequestError, match="full fine-tuning"):
        build(Small(), OptimConfig(name="muon"), adapter=True)
    with pytest.raises(RequestError, match="nothing would train"):
        build(Small().requires_grad_(False), OptimConfig(), adapter=True)


def test_default_rates_depend_on_what_trains():
    assert build(Small(), OptimConfig(), adapter=False).base_rate == 1e-5
    assert build(Small(), OptimConfig(lr=3e-3), adapter=True).base_rate == 3e-3


@needs_bitsandbytes
def test_eight_bit_states_are_bytes_but_for_small_tensors_and_embeddings():
    states = build(Small(), OptimConfig(states="8bit"), adapter=False).state_tensors()
    assert states["inner.weight::state1"].dtype == torch.uint8
    assert states["inner.weight::step"].shape == ()
    assert states["norm.weight::state1"].dtype == torch.float32
    assert states["embed.weight::exp_avg"].dtype == torch.float32
