"""Whatever is damaged, `luthier.load` gives exactly the model that was saved, or one of Luthier's errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from damage import damages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM

from luthier.api import load, save
from luthier.errors import LuthierError

QUICK = settings(max_examples=12, deadline=20_000, derandomize=True, database=None, suppress_health_check=list(HealthCheck))  # fmt: skip
LONG = settings(QUICK, max_examples=600)
IDS = torch.tensor([[3, 9, 27, 81, 243, 100, 5]])
# What a folder of others holds no second account of: a changed value there is another model, not a damaged one.
WEIGHT_FILES = (".safetensors", ".index.json", "adapter_config.json")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    home = tmp_path_factory.mktemp("fuzz")
    make_llama(home / "base")
    make_llama(home / "shards", shard="40KB", tie=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base"), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))  # fmt: skip
    model.save_pretrained(home / "adapter")
    save(model.eval(), home / "ours", tokenizer=make_tokenizer())
    names = ("base", "shards", "adapter", "ours")
    return {name: (home / name, logits(load(home / name)[0])) for name in names}, home / "copy"


def opens_rightly_or_not_at_all(folder: Path, expected: torch.Tensor, done: list[str]) -> None:
    try:
        model, _ = load(folder)
    except LuthierError as error:
        assert error.code and str(error), done
        return
    assert torch.equal(logits(model), expected), done


def only_told_twice(name: str) -> bool:
    return name.endswith(WEIGHT_FILES)


def undamaged_values(folder: Path, original: Path) -> bool:
    """Whether what nothing else accounts for is as it was: tensors' bytes, and numbers in an adapter's config."""
    for path in original.glob("*.safetensors"):
        found = folder / path.name
        if found.is_file() and not _same_data(found.read_bytes(), path.read_bytes()):
            return False
    config = original / "adapter_config.json"
    if not config.is_file() or not (folder / config.name).is_file():
        return True
    try:
        now, then = json.loads((folder / config.name).read_bytes()), json.loads(config.read_bytes())
    except (ValueError, RecursionError):
        return True
    keys = ("lora_alpha", "use_rslora", "alpha_pattern", "use_dora", "r", "lora_bias")
    return not isinstance(now, dict) or all(now.get(key) == then.get(key) for key in keys)


def _same_data(one: bytes, other: bytes) -> bool:
    begin = [8 + int.from_bytes(data[:8], "little") for data in (one, other)]
    return one[begin[0] :] == other[begin[1] :]


def check(name: str, homes, data, most: int) -> None:
    originals, copy = homes
    folder, expected = originals[name]
    only = (lambda file: True) if name == "ours" else only_told_twice
    done = data.draw(damages(folder, copy, only=only, most=most))
    if name == "ours" or undamaged_values(copy, folder):
        opens_rightly_or_not_at_all(copy, expected, done)


@pytest.mark.parametrize("name", ["base", "shards", "adapter", "ours"])
@QUICK
@given(data=st.data())
def test_damaged_folder_opens_rightly_or_not_at_all(name, homes, data):
    check(name, homes, data, most=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "shards", "adapter", "ours"])
@LONG
@given(data=st.data())
def test_damaged_folder_opens_rightly_or_not_at_all_at_length(name, homes, data):
    check(name, homes, data, most=4)


@pytest.mark.parametrize("name", ["base", "adapter"])
@QUICK
@given(data=st.data())
def test_damaged_config_or_tokenizer_is_no_traceback(name, homes, data):
    """Another value there may be another model that is as good; but it opens, or is refused in words."""
    originals, copy = homes
    done = data.draw(damages(originals[name][0], copy, only=lambda file: file.endswith(".json"), most=1))
    try:
        load(copy)
    except LuthierError as error:
        assert error.code and str(error), done
