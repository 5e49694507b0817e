"""What Unsloth, LLaMA-Factory, axolotl, torchtune and accelerate leave, opened as it lies there."""

from __future__ import annotations

import json

import pytest
import torch
from foreign import as_accelerate_fsdp, as_axolotl, as_llama_factory, as_torchtune, as_unsloth, trainer_state
from rows import (
    adapted,
    edit,
    logits,
    lora,
    mended,
    opens_and_trains,
    plain,
    plain_adapter,
    said,
    trained,
    without,
)  # fmt: skip
from safetensors.torch import save_file
from transformers import AutoTokenizer

import luthier


@pytest.fixture
def saved(base, tmp_path):
    model = adapted(base)
    model.save_pretrained(tmp_path / "a")
    return tmp_path / "a", logits(model), trained(model)


def test_adapter_without_a_task_is_no_warning(base, tmp_path):
    """Issue 3, section 1: peft writes `auto_mapping` where no task was named; the class is transformers' own."""
    model = adapted(base, lora(task_type=None))
    model.save_pretrained(tmp_path / "a")
    assert said(tmp_path / "a") == ("adapter", set())
    opens_and_trains(tmp_path / "a", logits(model), trained(model))
    edit(tmp_path / "a/adapter_config.json", auto_mapping={"base_model_class": "X", "parent_library": "somebody.code"})
    assert said(tmp_path / "a")[1] == {"brings-code"}


def test_unsloths_checkpoint_folder_opens_and_trains(base, saved):
    """Issue 3, section 1: Unsloth's `checkpoint-N`: its adapter with Trainer's state."""
    folder, wanted, names = saved
    as_unsloth(folder, str(base))
    (folder / "trainer_state.json").write_text(json.dumps(trainer_state(2)))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    assert said(folder) == ("trainer_checkpoint", set())
    opens_and_trains(folder, wanted, names)


def test_llama_factorys_output_opens_and_trains(base, saved):
    """Issue 3, section 1: LLaMA-Factory's output folder, which is adapter and Trainer's state in one."""
    folder, wanted, names = saved
    as_llama_factory(folder, AutoTokenizer.from_pretrained(base))
    assert said(folder) == ("trainer_checkpoint", set())
    opens_and_trains(folder, wanted, names)


def test_llama_factorys_full_output_without_a_template_opens_and_is_mended(base, tmp_path):
    """L#5836, L#8399: LLaMA-Factory trains with a template of its own and leaves none."""
    folder = without(base, tmp_path / "m", "chat_template*")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    as_llama_factory(folder, tokenizer)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert said(folder) == ("trainer_checkpoint", {"no-template"})
    opens_and_trains(folder, logits(plain(base)), trained(plain(base)))
    mended(folder, tmp_path / "out", base=base)
    assert luthier.load(tmp_path / "out", device="cpu")[1].chat_template


def test_axolotls_output_opens_and_trains_though_a_config_lies_beside_the_adapter(base, saved):
    """Issue 3, section 1: axolotl writes the base's config.json beside the adapter."""
    folder, wanted, names = saved
    as_axolotl(folder, base, AutoTokenizer.from_pretrained(base))
    kind, codes = said(folder)
    assert kind == "adapter" and not codes
    opens_and_trains(folder, wanted, names)


def test_torchtunes_epoch_opens_as_its_adapter_and_not_twice(base, tmp_path):
    """Issue 3, section 1; U#3633: merged weights beside the adapter: adding it again would apply it twice."""
    model = adapted(base)
    model.save_pretrained(tmp_path / "epoch_0")
    wanted, names = logits(model), trained(model)
    merged = model.merge_and_unload().state_dict()
    state = {name: tensor.clone() for name, tensor in merged.items() if name != "lm_head.weight"}
    folder = as_torchtune(tmp_path / "epoch_0", base, state)
    kind, codes = said(folder)
    assert kind == "adapter" and codes == {"merged-beside-adapter"}
    notes: list[str] = []
    opens_and_trains(folder, wanted, names, say=notes.append)
    assert any("whole model beside the adapter" in note for note in notes)


def test_torchtunes_adapter_file_alone_is_mended(base, tmp_path):
    """Issue 3, section 4: `adapter_0.pt` with peft's names and no config: what no tensor tells is asked for."""
    model = adapted(base)
    wanted = logits(model)
    (tmp_path / "t").mkdir()
    torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, tmp_path / "t/adapter_0.pt")
    kind, codes = said(tmp_path / "t")
    assert kind in {"adapter", "state_dict"} and codes
    with pytest.raises(luthier.LuthierError):
        luthier.load(tmp_path / "t", device="cpu")
    with pytest.raises(luthier.RequestError, match="alpha"):
        luthier.mend(tmp_path / "t", tmp_path / "out", base=base, prove=False)
    luthier.mend(tmp_path / "t", tmp_path / "out", base=base, alpha=8, prove=False)
    assert torch.equal(logits(plain_adapter(base, tmp_path / "out")), wanted)


def test_accelerates_whole_state_in_a_checkpoint_is_refused_and_mended(base, tmp_path):
    """Issue 3, section 1: accelerate with FULL_STATE_DICT: `pytorch_model_fsdp.bin`, and no config."""
    model = plain(base)
    folder = as_accelerate_fsdp(tmp_path / "checkpoint-2", model.state_dict())
    kind, codes = said(folder)
    assert kind == "trainer_checkpoint" and "no-model-config" in codes
    with pytest.raises(luthier.LuthierError, match=r"config\.json"):
        luthier.load(folder, device="cpu")
    mended(folder, tmp_path / "out", base=base)
    opens_and_trains(tmp_path / "out", logits(model), trained(model))


def test_raw_state_dict_is_recognised_and_opens_with_the_config_beside_it(base, tmp_path):
    """Issue 3, section 1: a raw `model.pt` state dict."""
    model = plain(base)
    folder = without(base, tmp_path / "m", "*")
    torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, folder / "model.pt")
    assert said(folder) == ("state_dict", {"pickle-only", "no-model-config"})
    with pytest.raises(luthier.RequestError) as refusal:
        luthier.load(folder, device="cpu")
    assert refusal.value.code == "kind"
    mended(folder, tmp_path / "out", base=base)
    opens_and_trains(tmp_path / "out", logits(model), trained(model))


def test_folder_of_a_whole_peft_state_as_a_model_is_mended_to_the_adapter(base, tmp_path):
    """U#3926, P#2957: a Trainer that did not know peft saved the whole state as `model.safetensors`."""
    model = adapted(base)
    wanted = logits(model)
    folder = without(base, tmp_path / "m", "model.safetensors")
    state = {name: t.clone() for name, t in model.state_dict().items() if not name.endswith("lm_head.weight")}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert "adapter-in-weights" in said(folder)[1]
    with pytest.raises(luthier.LuthierError) as refusal:
        luthier.load(folder, device="cpu")
    assert refusal.value.code == "adapter-in-weights"
    mended(folder, tmp_path / "out", base=base, alpha=8)
    assert torch.equal(logits(plain_adapter(base, tmp_path / "out")), wanted)
