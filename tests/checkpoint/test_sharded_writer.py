"""The writer with several processes: the same bytes as one process writes, readable by any other number."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import sharded_writer
import torch
from safetensors.torch import load_file
from tiny import make_llama, make_qwen3_moe
from transformers import AutoModelForCausalLM
from warm import forkserver

from luthier.artifacts.manifest import read, verify


def run_ranks(action: str, base: Path, run: Path, size: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        forkserver().Process(target=sharded_writer.main, args=(action, str(base), str(run), str(rank), str(size), port))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0, (
            f"one of {size} processes ended with {process.exitcode}; its error is printed above"
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("make", "readers"),
    [
        pytest.param(make_llama, 3, id="dense", marks=pytest.mark.slow),
        pytest.param(make_qwen3_moe, 2, id="mixture-of-experts"),
    ],
)
def test_four_processes_write_the_bytes_of_one_and_another_number_reads_them(
    make: Callable[..., Path], readers: int, tmp_path: Path
) -> None:
    base = make(tmp_path / "base")
    run_ranks("write", base, tmp_path / "one", 1)
    run_ranks("write", base, tmp_path / "four", 4)
    one, four = (tmp_path / name / "checkpoints" / "step-00000001" for name in ("one", "four"))
    manifest, problems = verify(four)
    assert manifest is not None and not problems
    assert contents(one) == contents(four)
    assert read(one).digests[: len(manifest.tensors)] == manifest.digests[: len(manifest.tensors)]

    opened = AutoModelForCausalLM.from_pretrained(four / "model")
    opened.save_pretrained(tmp_path / "reference")
    saved, reference = (
        load_file(four / "model" / "model.safetensors"),
        load_file(tmp_path / "reference" / "model.safetensors"),
    )
    assert saved.keys() == reference.keys()
    assert all(torch.equal(saved[name], reference[name]) for name in saved)

    run_ranks("read", base, tmp_path / "four", readers)
    assert contents(tmp_path / "four" / "checkpoints" / "step-00000002") == contents(four)
