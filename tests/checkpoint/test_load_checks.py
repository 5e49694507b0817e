"""`luthier.load` believes no byte of our own folders that their manifest doesn't vouch for."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import luthier
from luthier.checkpoint.checkpoints import Checkpoints
from luthier.errors import ArtifactError


def test_load_refuses_a_checkpoint_with_one_flipped_bit_and_names_the_tensor(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with Checkpoints(tmp_path / "run", tokenizer=tokenizer) as checkpoints:
        checkpoints.save(1, model)
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    luthier.load(folder, device="cpu")

    weights = folder / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"bytes .* are not those that were saved \(tensor "):
        luthier.load(folder, device="cpu")
