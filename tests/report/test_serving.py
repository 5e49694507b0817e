"""The commands that serve a folder are those that the servers take."""

from __future__ import annotations

import json
import shlex

import pytest

from luthier.cli import VERBS
from luthier.report import serving


def adapter(folder, **settings):
    told = {"peft_type": "LORA", "r": 16, "base_model_name_or_path": "/machine/base", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(told | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "rank"),
    [({}, 16), ({"r": 12}, 16), ({"r": 100}, 128), ({"use_rslora": True}, 16)],
)
def test_lora_is_served_by_vllm_beside_its_base_with_room_for_its_rank(tmp_path, settings, rank):
    lines = serving.commands(adapter(tmp_path, **settings), shown="mine", base="owner/base")
    assert f"vllm serve owner/base --enable-lora --max-lora-rank {rank} --lora-modules mine=mine" in lines


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules trained whole"),
        ({"peft_type": "IA3", "r": None}, "IA3"),
        ({"r": 1024}, "rank 1024"),
        ({"rank_pattern": {"k_proj": 100}}, "ranks of their own"),
        ({"alpha_pattern": {"k_proj": 100}}, "factors of their own"),
        ({"bias": "lora_only"}, "biases"),
        ({"trainable_token_indices": [3]}, "trained token rows"),
    ],
)
def test_what_vllm_cannot_take_is_merged_first_and_the_reason_said(tmp_path, settings, why):
    lines = serving.commands(adapter(tmp_path, **settings), shown="mine")
    assert not any("--enable-lora" in line for line in lines)
    merge = next(line for line in lines if "--to merged" in line)
    assert why in merge and lines[lines.index(merge) + 1] == "vllm serve MERGED"


def test_card_of_an_adapter_names_no_path_of_this_machine(tmp_path):
    card = serving.card(adapter(tmp_path), b'{"verdict": "passed", "says": "equal bits."}')
    assert "/machine" not in card and str(tmp_path) not in card
    assert "library_name: peft" in card and "equal bits" in card and "vllm serve BASE" in card


def test_model_quantised_already_is_not_sent_to_gguf(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    lines = serving.commands(tmp_path, shown="mine")
    assert any(line.startswith("vllm serve mine") for line in lines) and not any("gguf" in line for line in lines)


def test_path_with_a_space_or_a_quote_stays_one_word_of_the_shell(tmp_path):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    for line in serving.commands(adapter(folder)):
        words = shlex.split(line, comments=True)
        assert any(word.rpartition("=")[2] == str(folder) for word in words), line


def test_the_upload_to_the_hub_is_a_verb_of_ours(tmp_path):
    lines = serving.commands(adapter(tmp_path), shown="it's mine")
    words = shlex.split(lines[-1], comments=True)
    assert words == ["luthier", "push", "it's mine", "OWNER/NAME"] and "push" in VERBS
