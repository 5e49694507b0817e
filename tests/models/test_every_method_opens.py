"""Whatever method of the installed peft an adapter is of: it opens, trains what was trained, and is saved to open again."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft_methods
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import luthier
from luthier.training.base_folder import write_folder

PROBE = torch.arange(3, 43)[None] * 7 % 320
NEEDS = {"ADAMSS": "sklearn"}  # what a method of peft imports beyond peft
NOT_IN_THE_FILE = {"P_TUNING": "prompt_encoder.mlp_head"}  # peft saves what the encoder computes, not the encoder
MIXTURE = "XLORA"  # consists of adapters saved before


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tiny.make_llama(tmp_path_factory.mktemp("base") / "base", tie=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": False}))  # X-LoRA insists on it
    return folder


def logits(model: Any) -> torch.Tensor:
    task = getattr(getattr(model, "active_peft_config", None), "peft_type", "")
    more = {"task_ids": torch.tensor([1])} if task in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    with torch.no_grad():
        return model.eval()(input_ids=PROBE, use_cache=False, **more).logits[..., -PROBE.shape[1] :, :]


def trained(model: Any) -> set[str]:
    return {name.replace(".default", "") for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("method", peft_methods.methods())
def test_opens_trains_and_saves_what_plain_peft_saved(method, base, tmp_path):
    if method in NEEDS and find_spec(NEEDS[method]) is None:
        with pytest.raises(ImportError):  # peft itself has no such method here
            peft_methods.make_method(base, tmp_path / "adapter", method)
        return
    more = {}
    if method == MIXTURE:
        peft_methods.make_method(base, tmp_path / "part", "LORA")
        more = {"adapters": {"0": str(tmp_path / "part")}}
    live = peft_methods.make_method(base, tmp_path / "adapter", method, **more)
    if method == MIXTURE:  # peft writes a file without a tensor for it, which is said rather than opened
        with pytest.raises(luthier.ArtifactError, match="no tensors"):
            luthier.load(tmp_path / "adapter", base=str(base))
        return
    wanted, names = logits(live), trained(live)
    opened, tokenizer = luthier.load(tmp_path / "adapter", base=str(base))
    assert torch.equal(logits(opened), wanted)
    assert trained(opened) == set()
    opened, tokenizer = luthier.load(tmp_path / "adapter", base=str(base), trainable=True)
    lost = NOT_IN_THE_FILE.get(method, "\0")
    assert trained(opened) == {name for name in names if not name.startswith(lost)}
    opened.eval()
    write_folder(tmp_path / "again", opened, tokenizer, kind="adapter", facts={"parents": []})
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "again"))
    assert torch.equal(logits(again), wanted)
