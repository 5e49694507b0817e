"""A run is resumed with the tokenizer that it wrote itself, which must be known for the one that it began with."""

from __future__ import annotations

import json
import shutil

import pytest
from harness import assert_same_run, make_setup, resume, train
from tiny import make_gguf

from luthier.artifacts.run_folder import folder_of

STEPS = 4
SHORT = {"train.steps": STEPS, "train.max_length": 96, "checkpoint.every": 1}


@pytest.mark.parametrize("kind", ["lora on a gguf", "lora on a grown vocabulary", "full on a hub-style tokenizer"])
def test_run_goes_on_with_the_tokenizer_it_wrote(tmp_path, kind):
    changes = dict(SHORT)
    if kind == "lora on a gguf":
        changes["model.path"] = str(make_gguf(tmp_path / "tiny.gguf"))
    elif kind == "lora on a grown vocabulary":
        changes["model.new_tokens"] = ["<|new|>", "violin"]
    setup = make_setup(tmp_path / "home", lora=kind.startswith("lora"), changes=changes)
    file = setup.home / "base" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["merges"] = [" ".join(merge) for merge in values["model"]["merges"]]
    file.write_text(json.dumps(values, separators=(",", ":")))
    done = train(setup)
    assert done.code == 0, done.text
    reference = shutil.copytree(setup.run, tmp_path / "reference")
    for step in range(3, STEPS + 1):
        shutil.rmtree(folder_of(setup.run, step))
    done = resume(setup)
    assert done.code == 0, done.text
    assert "resuming from step 2" in done.text
    assert_same_run(setup.run, reference, step=STEPS)
