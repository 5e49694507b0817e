"""Every option of LoRA on every architecture that people fine-tune: merged, the model answers as base and adapter do together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import PROBE
from gguf_models import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MllamaForConditionalGeneration

import luthier
from luthier.export.merged.merge import merge_folders

APART = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
PICTURE = {
    "pixel_values": torch.randn(1, 1, 2, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
    "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
    "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
}
BASES: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "llama": (lambda folder: make_model("llama", folder), APART),
    "qwen2": (lambda folder: make_model("qwen2", folder), APART),
    "qwen3-moe": (lambda folder: tiny.make_qwen3_moe(folder), ["q_proj", "v_proj", "o_proj"]),
    "gemma3": (lambda folder: make_model("gemma3", folder, tie_word_embeddings=True), APART),
    "phi3": (lambda folder: make_model("phi3", folder), FUSED),
    "mllama": (lambda folder: tiny.make_mllama(folder, dtype=torch.float32), APART),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"o_proj": 2, r".*1\.mlp\.down_proj": 3}, "alpha_pattern": {"down_proj": 3}},
    "all biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "embeddings adapted": {"also": ["embed_tokens"]},
    "embeddings saved whole": {"modules_to_save": ["embed_tokens"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [3, 5, 9]}},
    "experts": {"target_parameters": EXPERTS},
    "grown vocabulary": {"grow": 5, "modules_to_save": ["embed_tokens", "lm_head"]},
    "convolution": {"also": ["patch_embedding"]},
}
HAVE_NO_BIAS = ("llama", "gemma3", "phi3", "qwen3-moe")
CASES = [
    pytest.param(base, option, marks=[] if option == "dora" else [pytest.mark.slow])
    for base in BASES
    for option in OPTIONS
    if base == {"experts": "qwen3-moe", "convolution": "mllama"}.get(option, base)
    and (base, option) != ("mllama", "grown vocabulary")  # refused, below
    and ("bias" not in option or base not in HAVE_NO_BIAS)
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base_of(name: str) -> Path:
        if name not in made:
            made[name] = BASES[name][0](folder / name)
        return made[name]

    return base_of


def opened(folder: Path, kind: str, grow: int = 0):
    model = MllamaForConditionalGeneration if kind == "mllama" else AutoModelForCausalLM
    model = model.from_pretrained(folder, dtype=torch.float32)
    if grow:
        model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + grow, mean_resizing=False)
    return model


def make_adapter(model, folder: Path, settings: dict[str, Any], seed: int = 1) -> Path:
    """A saved adapter, every trained weight of which was disturbed."""
    torch.manual_seed(seed)
    live = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, **settings))
    with torch.no_grad():
        for name, weight in live.named_parameters():
            if weight.requires_grad:
                spread = 0.05 * torch.randn_like(weight)
                weight.copy_(weight.abs() * (1 + spread) if "magnitude" in name else weight + spread)
    live.save_pretrained(folder)
    return folder


def logits(model, kind: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROBE, **(PICTURE if kind == "mllama" else {})).logits


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_merged_model_answers_as_base_and_adapter_together(kind, option, bases, tmp_path):
    settings = dict(OPTIONS[option])
    grow = settings.pop("grow", 0)
    settings["target_modules"] = [*BASES[kind][1], *settings.pop("also", [])]
    adapter = make_adapter(opened(bases(kind), kind, grow), tmp_path / "adapter", settings)
    merge_folders(bases(kind), adapter, tmp_path / "merged")
    live = PeftModel.from_pretrained(opened(bases(kind), kind, grow), str(adapter))
    wanted, found = logits(live, kind), logits(opened(tmp_path / "merged", kind), kind)
    with live.disable_adapter():
        assert (logits(live, kind) - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert (wanted - found).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASES)
def test_two_adapters_merged_answer_as_both_active_together(kind, bases, tmp_path):
    targets = {"target_modules": BASES[kind][1]}
    first = make_adapter(opened(bases(kind), kind), tmp_path / "first", targets)
    second = make_adapter(opened(bases(kind), kind), tmp_path / "second", targets | {"use_rslora": True}, seed=2)
    merge_folders(bases(kind), [first, second], tmp_path / "merged")
    live = PeftModel.from_pretrained(opened(bases(kind), kind), str(first), adapter_name="first")
    alone = logits(live, kind)
    live.load_adapter(str(second), adapter_name="second")
    live.base_model.set_adapter(["first", "second"])
    wanted, found = logits(live, kind), logits(opened(tmp_path / "merged", kind), kind)
    assert (alone - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert (wanted - found).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_grown_vocabulary_of_llama_vision_is_refused_as_transformers_cannot_open_one(bases, tmp_path):
    grown = opened(bases("mllama"), "mllama", 5)
    grown.save_pretrained(tmp_path / "plain")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        opened(tmp_path / "plain", "mllama")
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = make_adapter(grown, tmp_path / "adapter", settings)
    with pytest.raises(luthier.RequestError, match="8 rows more than its head"):
        merge_folders(bases("mllama"), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
