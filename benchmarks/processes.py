"""Timing a process from a cold page cache, with the peak of its anonymous memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], folder: Path, out: Path | None) -> tuple[float, float]:
    """Seconds, and the peak of RssAnon in MiB; ``out`` is removed before, and ``folder`` is not in the cache."""
    if out is not None:
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
    os.sync()
    forget(folder)
    begun, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} … ended with {process.returncode}")
    return time.perf_counter() - begun, peak / 1024
