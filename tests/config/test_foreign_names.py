"""Names of other tools: every row converts to keys that exist, with values the schema takes."""

from pathlib import Path

import pytest

from luthier.config import document
from luthier.config.check import validate
from luthier.config.foreign import TABLE, TOOLS, convert
from luthier.config.keys import keys
from luthier.config.schema import QUANTISED


def nested(ours):
    values = {"model": {"path": "m"}, "data": {"train": {"path": "d"}}, "output": "o"}
    for key, value in ours.items():
        here = values
        *sections, leaf = key.split(".")
        for section in sections:
            here = here.setdefault(section, {})
        here[leaf] = value
    if values["model"].get("precision") in QUANTISED:
        values.setdefault("adapter", "lora")
    return values


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_a_foreign_name_converts_to_what_the_schema_takes(row):
    ours = row.convert(row.example, {})
    assert set(row.tools) <= set(TOOLS)
    if isinstance(ours, str):
        assert ours.endswith(".")
        return
    config, problems = validate(nested(ours))
    assert config is not None, problems
    if "adapter" not in ours:
        assert all(key in keys() or key.startswith("adapter.") for key in ours)


def test_no_key_of_ours_is_taken_for_a_foreign_one_in_its_place():
    top = {name for name in keys() if "." not in name}
    assert top & set(TABLE) <= {"optim"}  # `optim: adamw_torch` is refused because it is no block


@pytest.mark.parametrize(
    ("name", "value", "given", "ours"),
    [
        (
            "per_device_train_batch_size",
            4,
            {"gradient_accumulation_steps": 8},
            {"train.micro_batch": 4, "train.batch_samples": 32},
        ),
        ("gradient_accumulation_steps", 8, {"micro_batch_size": 2}, {"train.batch_samples": 16}),
        ("lora_target", "q_proj, v_proj", {}, {"adapter.target": ["q_proj", "v_proj"]}),
        ("lr_scheduler_type", "warmup_stable_decay", {}, {"optim.schedule": "wsd"}),
        ("max_grad_norm", 0, {}, {"optim.clip": None}),
        ("optim", "paged_adamw_8bit", {}, {"optim.name": "adamw", "optim.states": "8bit"}),
        ("optimizer", {"_component_": "torch.optim.AdamW"}, {}, {"optim.name": "adamw"}),
        ("loraplus_lr_ratio", 16, {"learning_rate": 1e-4}, {"optim.lr_b": 0.0016}),
        ("adam_beta2", 0.95, {"adam_beta1": 0.8}, {"optim.betas": [0.8, 0.95]}),
        ("torch_dtype", "torch.bfloat16", {}, {"model.precision": "bf16"}),
        ("datasets", [{"path": "a", "type": "alpaca"}, {"path": "b"}], {}, {"data.train": ["a", "b"]}),
        ("use_peft", False, {}, {"adapter": "none"}),
        ("load_in_4bit", True, {}, {"model.precision": "nf4"}),
        ("quantization_bit", 8, {}, {"model.precision": "int8"}),
        ("quantization_config", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {}, {"model.precision": "nf4"}),
        ("report_to", "wandb,tensorboard", {}, {"log": ["wandb", "tensorboard"]}),
    ],
)
def test_values_are_converted_with_what_stands_beside_them(name, value, given, ours):
    assert convert(name, value, given) == ours


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("lr_scheduler_type", "polynomial", "`polynomial` has no counterpart"),
        ("max_steps", -1, "train.epochs"),
        ("load_in_4bit", False, "Leave it out"),
        ("save_steps", 0.1, "0.5 epoch"),
        ("per_device_train_batch_size", "auto", "`train.micro_batch` and `train.batch_samples`"),
        ("template", "llama3", "tokenizer's own"),
    ],
)
def test_what_has_no_counterpart_is_said(name, value, part):
    assert part in convert(name, value, {})


def test_unknown_names_are_not_foreign():
    assert convert("frobnicate", 1, {}) is None


@pytest.mark.parametrize("name", document.pages())
def test_the_committed_page_is_the_generated_one(name):
    committed = Path(__file__).parents[2] / "docs" / name
    assert committed.read_text(encoding="utf-8") == document.pages()[name], "run python -m luthier.config.document"


def test_every_key_stands_in_the_reference():
    page = document.pages()["run-file.md"]
    assert all(f"`{name}`" in page for name in keys())
