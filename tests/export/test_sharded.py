"""``--to transformers`` from what torch.distributed.checkpoint and torch.save left, compared with torch's own readers."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import luthier
from luthier.cli import main

SAVER = Path(__file__).with_name("save_sharded.py")


def save_sharded(work: Path, model: Path, world: int, *forms: str, **options: bool) -> dict[str, Path]:
    """Real saves of ``model`` by ``world`` processes, one a form."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outs = {form: work / ("fine-tuned-meta-llama/tiny" if form == "cookbook" else form) for form in forms}
    request = {"model": str(model), "world": world, "port": port, **options}
    request["saves"] = [{"form": form, "out": str(out)} for form, out in outs.items()]
    work.mkdir(parents=True, exist_ok=True)
    (work / "request.json").write_text(json.dumps(request))
    subprocess.run([sys.executable, str(SAVER), str(work / "request.json")], check=True, capture_output=True)
    if "cookbook" in outs:
        (outs["cookbook"] / "train_params.yaml").write_text("model_name: meta-llama/Llama-tiny-not-here\nlr: '0.0001'\n")  # fmt: skip
    return outs


def without_weights(model: Path, folder: Path) -> Path:
    """A base as people have it where the weights never were: config, tokenizer, processor."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("model") / "model", dtype=torch.bfloat16, tie=False, vocab=321)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory) -> Path:
    return without_weights(model, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("saved")
    return save_sharded(work, model, 3, "cookbook", "flat", "stateful", "hf", optimizer=True)


def by_torch(folder: Path, work: Path) -> dict[str, torch.Tensor]:
    """What torch's own converter reads from the folder."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, work / "by_torch.pt")
    content = torch.load(work / "by_torch.pt", weights_only=True)
    while "model" in content or "app" in content:
        content = content.get("model", content.get("app"))
    return content


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cookbook", "flat", "stateful", "hf"])
def test_sharded_checkpoint_becomes_the_folder_that_torch_would_read(form, saved, base, tmp_path, capsys):
    assert main(["export", str(saved[form]), str(tmp_path / "out"), "--to", "transformers", "--base", str(base), "--dtype", "fp32"]) == 0  # fmt: skip
    told = capsys.readouterr().out
    wanted, found = by_torch(saved["cookbook"], tmp_path), weights_of(tmp_path / "out")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert ("entries left out" in told) == (form in ("cookbook", "stateful"))
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_dtype_is_the_bases_and_the_base_may_be_named_by_the_training(saved, base, model, tmp_path, capsys):
    copy = shutil.copytree(saved["cookbook"], tmp_path / "copy")
    assert main(["export", str(copy), str(tmp_path / "out"), "--to", "transformers"]) == 2
    assert "meta-llama/Llama-tiny-not-here, which is not on this machine" in capsys.readouterr().err
    (copy / "train_params.yaml").write_text(f"model_name: {base}\n")
    luthier.export(copy, tmp_path / "out", to="transformers", shard_size="40KB")
    wanted = {name: tensor.bfloat16() for name, tensor in by_torch(copy, tmp_path).items()}
    found = weights_of(tmp_path / "out")
    assert wanted.keys() == found.keys() and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
