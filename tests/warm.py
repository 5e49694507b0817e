"""Processes that have the heavy imports behind them: forked from a server, which imports once what takes eight seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

PRELOADED = (
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "torch.distributed.fsdp",
    "luthier.api",
    "luthier.cli",
)


def forkserver() -> Any:
    """The context whose ``Process`` starts warm; each is a process of its own that shares nothing with the tests'."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def run_python(code: str, folder: Path) -> str:
    """Run a script in a warm process inside a folder; returns what it printed, and fails with it."""
    log = folder / "output.txt"
    process = forkserver().Process(target=_run, args=(code, str(folder), str(log)))
    process.start()
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def _run(code: str, folder: str, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(folder)
    exec(compile(code, "<example>", "exec"), {"__name__": "__main__"})
