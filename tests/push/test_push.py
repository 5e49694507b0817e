"""What is pushed is what was checked, and nothing else: over a real socket to a hub that keeps what it is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import TOKEN
from huggingface_hub import constants
from pushable import PROOF, finished_run, gguf_file, make_adapter, make_model, make_shards, ours, write_json

from luthier.artifacts.manifest import verify
from luthier.errors import ArtifactError, RequestError
from luthier.export.push.push import push

SRC = Path(__file__).parents[2] / "src"


def test_a_run_sends_its_final_folder_privately_and_is_whole_when_it_comes_back(hub, tmp_path):
    run = finished_run(tmp_path / "run")
    for name in ("train.log", "trainer_state.json", ".luthier-x"):
        (run / "final" / name).write_text("{}")
    made = push(run, "me/model")
    held = hub.repos["me/model"]
    assert held.private and made.private and made.new
    assert set(held.files()) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "luthier.json", "proof.json"}  # fmt: skip
    assert held.files()["adapter_model.safetensors"] == (run / "final/adapter_model.safetensors").read_bytes()
    assert made.checked == made.files == 5 and made.proof == "passed"
    assert "passed" in held.messages[0]["description"] and "f" * 64 in held.messages[0]["description"]
    manifest, problems = verify(hub.download("me/model", tmp_path / "again"))
    assert manifest and problems == []


def test_a_second_push_of_the_same_sends_nothing(hub, tmp_path):
    run = finished_run(tmp_path / "run")
    first = push(run, "me/model")
    second = push(run, "me/model")
    assert not second.new and second.commit == first.commit and second.checked == first.checked
    assert set(hub.puts.values()) == {1} and len(hub.repos["me/model"].messages) == 1


def test_a_push_that_was_killed_goes_on_where_it_was(hub, tmp_path):
    folder = ours(make_shards(tmp_path / "model"), "model")
    shards = sorted(folder.glob("*.safetensors"))
    for number, shard in enumerate(shards):  # else they would be the same bytes, and one object
        data = bytearray(shard.read_bytes())
        data[-1] = number
        shard.write_bytes(data)
    ours(folder, "model")
    hub.hold(shards[-1].read_bytes())
    home = tmp_path / "home"
    told = {**os.environ, "PYTHONPATH": str(SRC), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}  # fmt: skip
    line = [sys.executable, "-m", "luthier", "push", str(folder), "me/model", "--json"]
    first = subprocess.Popen(line, env=told, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.arrived.wait(60)
    while len(hub.puts) < len(shards) - 1:
        assert first.poll() is None
    first.kill()
    first.wait()
    assert set(hub.repos["me/model"].files()) == {".gitattributes"}
    hub.held = None
    hub.released.set()
    second = subprocess.run(line, env=told, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["checked"] == len(list(folder.iterdir()))
    assert set(hub.puts.values()) == {1} and len(hub.puts) == len(shards)
    assert TOKEN not in second.stdout + second.stderr


def test_states_of_training_logs_and_hidden_files_stay_here(hub, tmp_path):
    folder = make_adapter(tmp_path / "plain")
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "run.log", ".luthier-x", "events.out", "metrics.jsonl"):  # fmt: skip
        (folder / name).write_bytes(b"{}")
    make_adapter(folder / "checkpoint-10")
    (folder / "LICENSE").write_text("mine")
    made = push(folder, "me/model")
    assert set(hub.repos["me/model"].files()) == {".gitattributes", "LICENSE", "README.md", "adapter_config.json", "adapter_model.safetensors"}  # fmt: skip
    assert {"optimizer.pt", "run.log", ".luthier-x"} <= set(made.left_out)


def test_a_checkpoint_sends_its_weights_without_the_training_state(hub, tmp_path):
    run = finished_run(tmp_path / "run")
    push(run / "checkpoints/step-00000004", "me/model")
    files = hub.repos["me/model"].files()
    assert "adapter_model.safetensors" in files and not any("trainer" in name for name in files)
    manifest, problems = verify(hub.download("me/model", tmp_path / "again"))
    assert problems == [] and manifest.kind == "adapter" and manifest.facts["step"] == 4
    assert b"was not proven" in files["README.md"]


def test_no_path_of_this_machine_goes_out(hub, tmp_path):
    base = tmp_path / "bases" / "mine"
    run = finished_run(tmp_path / "run", base_model_name_or_path=str(base))
    (run / "final/README.md").write_text(f"# Trained in {tmp_path}/run on {base}, see https://example.org/a/b\n")
    ours(run / "final", "adapter", base={"name": str(base)}, parents=[{"kind": "adapter", "name": str(tmp_path / "other/final"), "run": str(tmp_path / "other")}])  # fmt: skip
    with pytest.raises(RequestError) as error:
        push(run, "me/model")
    assert error.value.code == "base-is-a-path" and "--base" in error.value.remedy and not hub.asked
    made = push(run, "me/model", base="owner/base")
    files = hub.repos["me/model"].files()
    assert made.base == "owner/base"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    assert json.loads(files["luthier.json"])["base"]["name"] == "owner/base"
    assert b"base_model: owner/base" in files["README.md"] and b"https://example.org/a/b" in files["README.md"]
    for name, data in files.items():
        assert str(tmp_path).encode() not in data, name
    assert verify(hub.download("me/model", tmp_path / "again"))[1] == []
    assert str(base) in (run / "final/adapter_config.json").read_text()  # what lies here stays as it is


def test_a_base_in_the_local_cache_of_the_hub_keeps_its_name_and_commit(hub, tmp_path):
    place = f"/cache/hub/models--owner--base/snapshots/{'a' * 40}"
    push(make_adapter(tmp_path / "one", config={"base_model_name_or_path": place}), "me/model")
    config = json.loads(hub.repos["me/model"].files()["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/base" and config["revision"] == "a" * 40


def test_the_card_names_the_repository_and_one_that_was_edited_is_no_damage(hub, tmp_path):
    run = finished_run(tmp_path / "run")
    push(run, "me/model", revision="v2")
    assert b'from_pretrained("me/model", revision="v2")' in hub.repos["me/model"].files("v2")["README.md"]
    assert set(hub.repos["me/model"].files("main")) == {".gitattributes"}
    (run / "final/README.md").write_text("---\nlicense: mit\n---\n\nWritten by hand.\n")
    push(run, "me/other")
    held = hub.repos["me/other"].files()["README.md"]
    assert b"Written by hand." in held and b"license: mit" in held
    assert verify(hub.download("me/other", tmp_path / "again"))[1] == []


def test_a_folder_without_a_card_gets_one(hub, tmp_path):
    push(make_model(tmp_path / "plain"), "me/model")
    assert b"How to serve it" in hub.repos["me/model"].files()["README.md"]


@pytest.mark.parametrize("what", ["byte", "cut", "missing", "stranger"])
def test_a_damaged_folder_is_refused_before_any_request(hub, tmp_path, what):
    folder = ours(make_model(tmp_path / "model"), "model")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if what == "byte":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif what == "cut":
        weights.write_bytes(data[:-8])
    elif what == "missing":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "model-00001-of-00002.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError) as error:
        push(folder, "me/model")
    assert error.value.code == {"byte": "bytes-changed", "cut": "file-size", "missing": "file-missing", "stranger": "stranger"}[what]  # fmt: skip
    assert not hub.asked


def test_a_plain_folder_whose_weights_are_cut_is_refused(hub, tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ArtifactError):
        push(folder, "me/model")
    assert not hub.asked


def test_what_failed_its_proof_is_refused_unless_told(hub, tmp_path):
    failed = {**PROOF, "verdict": "failed", "says": "the logits differ."}
    folder = ours(make_model(tmp_path / "model"), "model", proof=failed)
    with pytest.raises(ArtifactError) as error:
        push(folder, "me/model")
    assert error.value.code == "proof-failed" and "--unproven" in error.value.remedy and not hub.asked
    assert push(folder, "me/model", unproven=True).proof == "failed"


def test_a_run_whose_last_proof_failed_does_not_send_the_result_before_it(hub, tmp_path):
    run = finished_run(tmp_path / "run")
    write_json(run / "proof-failed.json", {**PROOF, "verdict": "failed"})
    with pytest.raises(ArtifactError) as error:
        push(run, "me/model")
    assert error.value.code == "proof-failed" and not hub.asked


def test_a_run_that_has_not_finished_sends_no_checkpoint_unasked(hub, tmp_path):
    run = finished_run(tmp_path / "run")
    for path in (run / "final").iterdir():
        path.unlink()
    (run / "final").rmdir()
    with pytest.raises(RequestError) as error:
        push(run, "me/model")
    assert error.value.code == "no-final" and "RUN@best" in error.value.remedy and not hub.asked


@pytest.mark.parametrize("make", [lambda folder: write_json(folder / "notes.json", {}), lambda folder: write_json(folder / "config.json", {"model_type": "llama"})])  # fmt: skip
def test_a_folder_without_weights_is_refused(hub, tmp_path, make):
    make(tmp_path / "folder")
    with pytest.raises((RequestError, ArtifactError)):
        push(tmp_path / "folder", "me/model")
    assert not hub.asked


def test_a_file_that_leads_out_of_the_folder_is_not_followed(hub, tmp_path):
    folder = make_adapter(tmp_path / "adapter")
    secret = write_json(tmp_path / "secret.json", {"password": 1})
    (folder / "extra.json").symlink_to(secret)
    with pytest.raises(ArtifactError) as error:
        push(folder, "me/model")
    assert error.value.code == "path-escape" and not hub.asked


def test_a_public_repository_is_refused_without_public(hub, tmp_path):
    hub.make("me/model", private=False)
    run = finished_run(tmp_path / "run")
    with pytest.raises(RequestError) as error:
        push(run, "me/model")
    assert error.value.code == "hub-public" and len(hub.repos["me/model"].commits) == 1
    assert not push(run, "me/model", private=False).private
    push(run, "me/open", private=False)
    assert not hub.repos["me/open"].private


def test_weights_of_another_upload_are_not_mixed_with_these(hub, tmp_path):
    folder = ours(make_shards(tmp_path / "model"), "model")
    hub.make("me/model", files={"model.safetensors": b"old", "notes.md": b"mine", "other.gguf": b"kept"})
    with pytest.raises(RequestError) as error:
        push(folder, "me/model")
    assert error.value.code == "hub-strangers" and "model.safetensors" in str(error.value)
    assert len(hub.repos["me/model"].commits) == 1
    push(folder, "me/model", replace=True)
    files = hub.repos["me/model"].files()
    assert "model.safetensors" not in files and {"notes.md", "other.gguf", "model-00001-of-00003.safetensors"} <= set(files)  # fmt: skip


def test_other_bytes_on_the_hub_than_were_sent_are_found(hub, tmp_path):
    run = finished_run(tmp_path / "run")
    hub.spoiled = "adapter_model.safetensors"
    with pytest.raises(ArtifactError) as error:
        push(run, "me/model")
    assert error.value.code == "hub-differs" and "adapter_model.safetensors" in str(error.value)


def test_the_client_s_pipeline_for_xet_is_used_where_it_is_installed(hub, tmp_path, monkeypatch):
    """Small files only: large ones would need xet's own storage service."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.large = ()
    made = push(finished_run(tmp_path / "run"), "me/model")
    assert made.checked == 5 and not hub.puts


def test_adapters_in_folders_of_their_own_go_with_them(hub, tmp_path):
    for name in ("first", "second"):
        make_adapter(tmp_path / "both" / name)
    push(tmp_path / "both", "me/model")
    assert {"first/adapter_model.safetensors", "second/adapter_config.json"} <= set(hub.repos["me/model"].files())


def test_a_folder_of_gguf_files_goes_with_its_modelfile_and_a_single_file_does_not(hub, tmp_path):
    folder = tmp_path / "gguf"
    for name in ("model-F16", "model-Q8_0"):
        gguf_file(folder / f"{name}.gguf", {"general.architecture": "llama", "general.name": name})
    (folder / "Modelfile").write_text("FROM ./model-F16.gguf")
    with pytest.raises(RequestError) as error:
        push(folder / "model-F16.gguf", "me/model")
    assert error.value.code == "not-pushable" and str(folder) in error.value.remedy
    push(folder, "me/model")
    assert {"model-F16.gguf", "model-Q8_0.gguf", "Modelfile", "README.md"} <= set(hub.repos["me/model"].files())


def test_of_a_run_with_stages_the_last_one_goes_when_all_are_finished(hub, tmp_path):
    chain = tmp_path / "chain"
    write_json(chain / "run.yaml", {"stages": [{"name": "a"}, {"name": "b"}]})
    finished_run(chain / "1-a")
    with pytest.raises(RequestError) as error:
        push(chain, "me/model")
    assert error.value.code == "no-final" and not hub.asked
    finished_run(chain / "2-b", r=8)
    push(chain, "me/model")
    assert json.loads(hub.repos["me/model"].files()["adapter_config.json"])["r"] == 8


def test_tokens_that_look_like_paths_stay_what_they_are(hub, tmp_path):
    folder = make_model(tmp_path / "model", config={"_name_or_path": "/data/someone/base"})
    told = {
        "added_tokens": [{"content": "/end/of/turn"}],
        "name_or_path": "/data/someone/base",
        "chat_template": "{{ x }}/a/b",
    }
    write_json(folder / "tokenizer_config.json", told)
    push(folder, "me/model")
    files = hub.repos["me/model"].files()
    assert json.loads(files["tokenizer_config.json"]) == {**told, "name_or_path": "base"}
    assert json.loads(files["config.json"])["_name_or_path"] == "base"
