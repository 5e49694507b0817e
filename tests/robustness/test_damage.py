"""Damage to what was saved is named by `verify`, and resuming passes it over."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from harness import STEPS, Setup, assert_same_run, by_command, call, make_setup, resume, train
from safetensors.torch import load_file, save_file

from luthier.api import load
from luthier.artifacts import manifest as manifests
from luthier.artifacts.run_folder import folder_of, published
from luthier.artifacts.verify import Outcome, verify_all
from luthier.errors import ArtifactError


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Setup:
    """A proven run with its last three checkpoints."""
    setup = make_setup(tmp_path_factory.mktemp("damage"), changes={"checkpoint.keep": 3})
    done = train(setup, proof=True)
    assert done.code == 0, done.text
    stop = "import os, signal\n\ndef at_19(event):\n    if event.kind == 'step' and event.step == 19: os.kill(os.getpid(), signal.SIGTERM)\n"
    (setup.home / "leave.py").write_text(stop)
    return setup


@pytest.fixture
def copy(finished: Setup, tmp_path: Path) -> Path:
    """The run with every file copied, so that hard links don't carry damage from one folder to another."""
    return Path(shutil.copytree(finished.run, tmp_path / "run"))


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("part", ["checkpoint", "final"])
def test_one_flipped_bit_in_any_file_is_named(copy, part):
    folder = published(copy)[-1].path if part == "checkpoint" else copy / "final"
    assert verify_all(folder).whole
    names = files_of(folder)
    assert len(names) > 6
    for name in names:
        original = (folder / name).read_bytes()
        for position in {0, len(original) // 2, len(original) - 1}:
            flip(folder / name, position)
            outcome = verify_all(folder)
            if name == manifests.NAME and _says_the_same(original, (folder / name).read_bytes()):
                continue  # a newline for another blank: no content changed
            assert not outcome.whole, f"{name} at {position}"
            assert name in _text(outcome) or (name == manifests.NAME and "the manifest is damaged" in _text(outcome))
            (folder / name).write_bytes(original)
        (folder / name).write_bytes(original)


def _says_the_same(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def _text(outcome: Outcome) -> str:
    return str(outcome)


@pytest.mark.parametrize("part", ["checkpoint", "final"])
def test_any_file_cut_short_or_missing_is_named(copy, part):
    folder = published(copy)[-1].path if part == "checkpoint" else copy / "final"
    for name in files_of(folder):
        original = (folder / name).read_bytes()
        for damaged in (original[:-1], original[: len(original) // 2], b""):
            (folder / name).write_bytes(damaged)
            if name == manifests.NAME and damaged and _says_the_same(original, damaged):
                continue  # the last newline
            text = _text(outcome := verify_all(folder))
            assert not outcome.whole
            assert name in text or (name == manifests.NAME and "manifest is damaged" in text)
        (folder / name).unlink()
        text = _text(outcome := verify_all(folder))
        assert not outcome.whole
        assert f"{name} is missing" in text or (name == manifests.NAME and "no luthier.json" in text)
        (folder / name).write_bytes(original)
    assert verify_all(folder).whole


def test_flipped_bit_is_traced_to_its_tensor(copy):
    folder = published(copy)[-1].path
    place = next(p for p in manifests.read(folder).tensors if p.file.startswith("adapter/") and "lora_B" in p.spec.name)
    flip(folder / place.file, place.offset + 1)
    assert f"(tensor {place.spec.name})" in _text(verify_all(folder))


def test_extra_tensor_in_a_rewritten_file_is_named(copy):
    folder = published(copy)[-1].path
    path = folder / "adapter/adapter_model.safetensors"
    save_file({**load_file(path), "base_model.stranger": torch.zeros(2)}, path, metadata={"format": "pt"})
    text = _text(outcome := verify_all(folder))
    assert not outcome.whole
    assert "base_model.stranger" in text


def test_extra_weights_file_is_named(copy):
    for folder in (published(copy)[-1].path / "adapter", copy / "final"):
        path = folder / "more.safetensors"
        save_file({"x": torch.zeros(2)}, path)
        text = _text(outcome := verify_all(folder if folder.name == "final" else folder.parent))
        assert not outcome.whole
        assert "more.safetensors is not in the manifest" in text


def test_verify_command_names_the_damage_and_exits_3(copy, finished):
    assert call(finished, "verify", str(copy)).code == 0
    flip(copy / "final/adapter_model.safetensors", -1)
    (published(copy)[0].path / "trainer/state.json").unlink()
    done = by_command(finished, "verify", str(copy))
    assert done.code == 3
    assert "adapter_model.safetensors: bytes" in done.text
    assert "trainer/state.json is missing" in done.text
    assert done.text.count("BROKEN") == 2
    assert done.text.count(": whole") == 2
    assert "Traceback" not in done.text
    said = json.loads(call(finished, "verify", str(copy), "--json").text)
    assert said["whole"] is False


def test_unfinished_folder_without_manifest_is_broken_with_exit_code_3(copy, finished):
    folder = published(copy)[-1].path
    (folder / manifests.NAME).unlink()
    done = call(finished, "verify", str(folder))
    assert done.code == 3
    assert "never finished" in done.text


@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "manifest", "stranger"])
def test_resume_passes_over_a_damaged_newest_checkpoint_and_says_so(finished, copy, damage):
    shutil.rmtree(copy / "final")
    damaged = folder_of(copy, STEPS)
    weights = damaged / "adapter/adapter_model.safetensors"
    if damage == "bit":
        flip(weights, -3)
    elif damage == "cut":
        os.truncate(weights, weights.stat().st_size - 1)
    elif damage == "missing":
        next((damaged / "trainer").glob("optimizer*.safetensors")).unlink()
    elif damage == "manifest":
        flip(damaged / manifests.NAME, 100)
    else:
        save_file({"x": torch.zeros(2)}, damaged / "trainer/optimizer-00002-of-00002.safetensors")
    done = resume(finished, copy)
    assert done.code == 0, done.text
    assert f"passing over {damaged}" in done.text
    assert f"resuming from step {STEPS - 1}" in done.text
    assert_same_run(copy, finished.run)
    assert verify_all(copy).whole


def test_resume_with_no_whole_checkpoint_is_an_error(finished, copy):
    shutil.rmtree(copy / "final")
    for found in published(copy):
        (found.path / "trainer/state.json").unlink()
    done = resume(finished, copy)
    assert done.code == 3
    assert "none of this run's checkpoints is whole" in done.text
    assert "luthier verify" in done.text
    assert len(published(copy)) == 3


def test_damaged_checkpoint_and_final_do_not_load(copy):
    for folder in (published(copy)[-1].path, copy / "final"):
        weights = next(folder.rglob("adapter_model.safetensors"))
        os.truncate(weights, weights.stat().st_size - 4)
        with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors has"):
            load(folder)


def test_save_after_a_passed_over_checkpoint_is_not_what_retention_deletes(finished, copy):
    """With `keep: 1`, a damaged step 20 must not push out step 19, which was saved and verified after it."""
    shutil.rmtree(copy / "final")
    for step in (STEPS, STEPS - 1):
        (folder_of(copy, step) / "trainer/state.json").unlink()
    done = resume(finished, copy, "checkpoint.keep=1", "callbacks=[leave:at_19]")
    assert done.code == 75, done.text
    assert verify_all(folder_of(copy, STEPS - 1)).whole
    assert not folder_of(copy, STEPS - 2).exists()
    assert resume(finished, copy, "callbacks=[]").code == 0
    assert_same_run(copy, finished.run)
