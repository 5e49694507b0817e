"""An adapter that was lost because only the merged model was kept, recovered from the difference to its base."""

import functools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_llama
from transformers import AutoModelForCausalLM

import luthier
from luthier.cli import main
from luthier.export.mend import mend
from luthier.export.mend.recover import noise_floor

IDS = torch.arange(3, 40).unsqueeze(0)
TARGETS = ["q_proj", "v_proj", "down_proj"]
recover = functools.partial(luthier.mend, prove=False)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def make_merged(folder, *, dtype, std=0.1, hidden=64, targets=TARGETS, tie=True, touch=None):
    """A base, and the same with a random LoRA of rank 4 merged into it in `dtype`."""
    base = make_llama(folder / "base", dtype=dtype, hidden=hidden, tie=tie)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets))  # fmt: skip
    torch.manual_seed(3)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, 0.0, std)
    merged = model.merge_and_unload().to(dtype)
    if touch is not None:
        with torch.no_grad():
            touch(merged)
    merged.save_pretrained(folder / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / "merged" / name)
    return base, folder / "merged"


def recovered(base, folder):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


def plain(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def test_fp32_merge_gives_the_true_rank_and_the_merged_logits(tmp_path):
    base, merged = make_merged(tmp_path, dtype=torch.float32)
    made = recover(merged, tmp_path / "out", base=base)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    assert config["target_modules"] == sorted(TARGETS)
    facts = json.loads((tmp_path / "out/luthier.json").read_text())["mended"]
    assert len(facts["recovered"]["layers"]) == 6
    assert all(layer["relative_error"] < 1e-5 for layer in facts["recovered"]["layers"])
    scale = float((plain(merged) - plain(base)).abs().max())
    assert float((recovered(base, tmp_path / "out") - plain(merged)).abs().max()) < 1e-4 * scale
    assert "relative error" in str(made)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_recovered_adapter_is_proven_against_the_merged_model(tmp_path, dtype, most):
    base, merged = make_merged(tmp_path, dtype=dtype)
    luthier.mend(merged, tmp_path / "out", base=base)
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["passed"] and "the merged model's logits are matched" in proof["says"]
    facts = json.loads((tmp_path / "out/luthier.json").read_text())["mended"]["against_merged"]
    assert 0 < facts["missing_share"] < most
    missing = (plain(merged) - recovered(base, tmp_path / "out")).norm() / (plain(merged) - plain(base)).norm()
    assert float(missing) < most


@pytest.mark.slow
def test_recovered_adapter_that_does_not_give_the_merged_model_is_not_published(tmp_path, monkeypatch):
    base, merged = make_merged(tmp_path, dtype=torch.float32)

    def twice(*args, **kwargs):
        found = true_recover(*args, **kwargs)
        found.config["lora_alpha"] *= 2
        return found

    true_recover = mend.recover
    monkeypatch.setattr(mend, "recover", twice)
    with pytest.raises(luthier.ArtifactError, match="more than the 0\\.1 that rounding may cost") as failure:
        luthier.mend(merged, tmp_path / "out", base=base)
    assert failure.value.code == "proof-failed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]


@pytest.mark.slow
def test_rank_that_is_too_low_is_inconclusive_and_says_what_it_does_not_carry(tmp_path):
    base, merged = make_merged(tmp_path, dtype=torch.float32)
    luthier.mend(merged, tmp_path / "out", base=base, rank=2)
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["verdict"] == "inconclusive" and not proof["passed"]
    assert "which the rank that was asked for does not carry" in proof["says"]


def test_quantised_base_is_refused_before_codes_are_taken_for_weights(tmp_path):
    base, merged = make_merged(tmp_path, dtype=torch.float32, hidden=32)
    for quantised in (base, merged):
        path = quantised / "config.json"
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | {"quantization_config": {"quant_method": "bitsandbytes"}}))
        with pytest.raises(luthier.RequestError, match="is quantised") as refusal:
            recover(merged, tmp_path / "out", base=base)
        assert refusal.value.code == "not-recoverable" and refusal.value.where == str(quantised)
        path.write_text(kept)


def test_bf16_merge_is_recovered_as_far_as_rounding_allows_and_says_how_far(tmp_path):
    base, merged = make_merged(tmp_path, dtype=torch.bfloat16)
    recover(merged, tmp_path / "out", base=base)
    layers = json.loads((tmp_path / "out/luthier.json").read_text())["mended"]["recovered"]["layers"]
    assert {layer["rank"] for layer in layers} == {4}
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    adapter = load_file(tmp_path / "out/adapter_model.safetensors")
    for layer in layers:
        name = f"{layer['module']}.weight"
        delta = after[name].float() - before[name].float()
        b, a = (adapter[f"base_model.model.{layer['module']}.lora_{part}.weight"] for part in "BA")
        assert layer["relative_error"] == pytest.approx(float((delta - b @ a).norm() / delta.norm()), rel=1e-3)
        assert 1e-4 < layer["relative_error"] < 0.1
    change = (plain(merged) - plain(base)).norm()
    assert float((recovered(base, tmp_path / "out") - plain(merged)).norm() / change) < 0.1


def test_rank_given_is_kept_with_its_error(tmp_path):
    base, merged = make_merged(tmp_path, dtype=torch.float32)
    recover(merged, tmp_path / "out", base=base, rank=2)
    layers = json.loads((tmp_path / "out/luthier.json").read_text())["mended"]["recovered"]["layers"]
    assert all(layer["rank"] == 2 and 0.2 < layer["relative_error"] < 1 for layer in layers)


def test_changed_norms_are_saved_whole(tmp_path):
    base, merged = make_merged(tmp_path, dtype=torch.float32, touch=lambda model: model.model.norm.weight.mul_(1.5))
    recover(merged, tmp_path / "out", base=base)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]
    assert float((recovered(base, tmp_path / "out") - plain(merged)).abs().max()) < 1e-3


def test_what_no_adapter_carries_is_refused_by_name(tmp_path):
    base, merged = make_merged(tmp_path, dtype=torch.float32, hidden=32)
    weights = load_file(merged / "model.safetensors")

    def refused(change, match):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        shutil.copytree(merged, tmp_path / "other")
        save_file(change(dict(weights)), tmp_path / "other/model.safetensors", {"format": "pt"})
        with pytest.raises(luthier.RequestError, match=match) as refusal:
            recover(tmp_path / "other", tmp_path / "out", base=base)
        assert refusal.value.code == "not-recoverable" and not (tmp_path / "out").exists()

    embedding = "model.embed_tokens.weight"
    refused(lambda w: w | {embedding: w[embedding] + 0.1}, "tied to the head")
    refused(lambda w: w | {embedding: torch.cat([w[embedding], w[embedding][:8]])}, "from 320 to 328 rows")
    full = "model.layers.1.mlp.up_proj.weight"
    refused(
        lambda w: w | {full: w[full] + 0.1 * torch.randn_like(w[full])},
        r"not changed by a low-rank adapter \(rank 8 would leave \d+%; rank 16 would leave",
    )


def test_equal_models_are_nothing_to_recover(tmp_path):
    base = make_llama(tmp_path / "base")
    with pytest.raises(luthier.RequestError) as refusal:
        recover(base, tmp_path / "out", base=base)
    assert refusal.value.code == "nothing-to-mend"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_floor_is_just_above_what_rounding_does(dtype):
    torch.manual_seed(0)
    weight = torch.randn(300, 500) * 0.05
    noise = torch.linalg.matrix_norm(weight.to(dtype).float() - weight, 2)
    floor = noise_floor(torch.zeros_like(weight), weight.to(dtype))
    assert noise < floor < 1.6 * noise


def test_export_to_adapter_recovers_it_from_a_merged_model_and_its_base(tmp_path, capsys):
    base, merged = make_merged(tmp_path, dtype=torch.float32)
    arguments = ["export", str(merged), str(tmp_path / "out"), "--to", "adapter", "--base", str(base)]
    assert main([*arguments, "--rank", "4", "--no-proof"]) == 0
    assert "recovered from the difference to the base" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 4
    torch.testing.assert_close(recovered(base, tmp_path / "out"), plain(merged), rtol=1e-4, atol=1e-4)


def test_export_to_adapter_says_what_it_needs_and_what_a_rank_is_for(tmp_path, capsys):
    base, merged = make_merged(tmp_path, dtype=torch.float32)
    assert main(["export", str(merged), str(tmp_path / "out"), "--to", "adapter"]) == 2
    assert "--base BASE" in capsys.readouterr().err
    assert main(["export", str(merged), str(tmp_path / "out"), "--to", "adapter", "--rank", "4"]) == 2
    assert "--rank is for an adapter recovered" in capsys.readouterr().err
    assert main(["export", str(merged), str(tmp_path / "out"), "--to", "transformers", "--rank", "4"]) == 2
    assert "--rank is not for the form transformers" in capsys.readouterr().err
    assert main(["export", str(base), str(tmp_path / "out"), "--to", "adapter", "--base", str(base)]) == 2
    assert not (tmp_path / "out").exists()
