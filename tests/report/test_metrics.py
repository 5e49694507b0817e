"""metrics.jsonl survives kills, full disks and numbers that are none."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from luthier.errors import ArtifactError
from luthier.report.metrics import MetricsLog, read_metrics


def test_records_come_back_as_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    records = [{"kind": "train", "step": step, "loss": 1 / (step + 1), "note": "你好\n<script>"} for step in range(5)]
    for record in records:
        log.append(record)
    assert read_metrics(log.path) == records
    assert log.length() == log.path.stat().st_size
    log.close()
    log.close()


def test_numbers_json_cannot_say_become_null_and_are_listed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(
        {
            "loss": math.nan,
            "grad_norm": math.inf,
            "lr": 1e-4,
            "metric/x": np.float32(0.5),
            "samples": [{"score": -math.inf}],
        }
    )
    line = log.path.read_text()
    record = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert record["loss"] is None and record["grad_norm"] is None and record["samples"] == [{"score": None}]
    assert record["nonfinite"] == ["loss", "grad_norm", "samples"]
    assert record["lr"] == 1e-4 and record["metric/x"] == 0.5


def test_cut_goes_back_to_a_recorded_length_and_appends_from_there(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 0})
    length = log.length()
    log.append({"step": 1})
    log.cut(length)
    log.append({"step": 2})
    assert [record["step"] for record in read_metrics(log.path)] == [0, 2]
    log.cut(0)
    assert read_metrics(log.path) == []


def test_cut_beyond_the_end_or_inside_a_line_is_refused(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 0})
    before = log.path.read_bytes()
    with pytest.raises(ArtifactError, match=r"end at byte 12.*had 99 bytes"):
        log.cut(99)
    with pytest.raises(ArtifactError, match="not the end of a line"):
        log.cut(5)
    with pytest.raises(ArtifactError):
        log.cut(-1)
    assert log.path.read_bytes() == before


@pytest.mark.parametrize("torn", [b'{"step": 1, "lo', b"x" * 200_000])
def test_torn_last_line_is_ignored_and_dropped_when_writing_goes_on(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + torn)
    assert read_metrics(path) == [{"step": 0}]
    log = MetricsLog(path)
    log.append({"step": 1})
    assert read_metrics(path) == [{"step": 0}, {"step": 1}]


@pytest.mark.parametrize("line", [b'{"step": ', b"[1]", b"\x00\x00", b""])
def test_any_other_broken_line_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ArtifactError, match="line 2 of the metrics") as caught:
        read_metrics(path)
    assert caught.value.where.endswith("metrics.jsonl:2")


def test_threads_never_mix_their_lines(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    threads = [
        threading.Thread(target=lambda name=name: [log.append({"name": name, "pad": "x" * 3000}) for _ in range(50)])
        for name in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_metrics(log.path)) == 200


WRITER = """
import itertools, sys
from pathlib import Path
from luthier.report.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]))
for step in itertools.count():
    log.append({"step": step, "pad": "x" * 5000})
"""


def test_killed_writer_leaves_every_finished_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    steps = [record["step"] for record in read_metrics(path)]
    assert steps == list(range(len(steps))) and len(steps) > 30


FULL = """
import resource, signal, sys
from pathlib import Path
from luthier.report.metrics import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
log = MetricsLog(Path(sys.argv[1]))
log.append({"step": 0})
try:
    log.append({"step": 1, "pad": "x" * 5000})
except OSError:
    log.append({"step": 2})
"""


def test_record_the_disk_refuses_leaves_nothing_behind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    subprocess.run([sys.executable, "-c", FULL, str(path)], check=True)
    assert [record["step"] for record in read_metrics(path)] == [0, 2]


def test_reading_metrics_imports_neither_torch_nor_transformers():
    code = "import sys, luthier.report.metrics; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
