"""The bar on a real pseudo-terminal, the lines on a real pipe."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from luthier.training.progress import Progress, duration

RUN = """
import sys, time
from luthier.training.progress import Progress
progress = Progress(30, int(sys.argv[1]))
progress.say("saved 检查点 [bold]/a/very/long/path/" + "x" * 150)
for step in range(int(sys.argv[1]) + 1, 31):
    time.sleep(0.01)
    progress.step({"step": step, "loss": 1.2345, "lr": 2e-4, "tokens_per_second": 8123.4, "memory_gib": 1.93})
    if step == 25:
        progress.say("half way")
        print("from a callback")
progress.close()
progress.close()
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    }
    return kept | {"PYTHONIOENCODING": "utf-8"} | changes


def on_pipe(start: int = 0, **changes: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(start)], env=environment(**changes), capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def on_terminal(**changes: str) -> str:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "0"], env=environment(**changes), stdout=follower, stderr=follower
    )
    os.close(follower)
    output = b""
    while True:
        try:
            block = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        output += block
    os.close(leader)
    assert process.wait() == 0, output.decode()
    return output.decode()


def test_pipe_gets_plain_lines_with_the_first_and_the_last_step():
    lines = on_pipe().splitlines()
    assert lines[0].startswith("saved 检查点 [bold]/a/very/long/path/xxx") and lines[0].endswith("x" * 150)
    assert re.fullmatch(
        r"step 1/30  loss 1\.234  lr 2\.0e-4  8,123 tok/s  1\.9 GiB  0:0\d left", lines[1].replace("1.235", "1.234")
    )
    assert lines[2:4] == ["half way", "from a callback"]
    assert lines[4].startswith("step 30/30  loss 1.23") and lines[4].endswith("0:00 left")
    assert len(lines) == 5 and not re.search("[\x1b\r]", "".join(lines))


def test_resumed_run_goes_on_counting():
    lines = on_pipe(20).splitlines()
    assert lines[1].startswith("step 21/30") and lines[-1].startswith("step 30/30")


def test_text_that_the_encoding_lacks_never_stops_a_run():
    assert on_pipe(PYTHONIOENCODING="ascii").startswith("saved ??? [bold]")
    assert "saved ??? [bold]" in on_terminal(PYTHONIOENCODING="ascii", TERM="xterm", COLUMNS="100")


def test_reader_that_leaves_does_not_stop_a_run():
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -c "$1" 0 | head -1; exit ${PIPESTATUS[0]}', sys.executable, RUN.replace('print("from a callback")', "pass")],
        env=environment(),
        capture_output=True,
        timeout=100,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr and done.stdout.startswith(b"saved")


def test_terminal_gets_a_bar_and_messages_stand_on_lines_of_their_own():
    output = on_terminal(TERM="xterm-256color", COLUMNS="120")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    rows = [row.split("\r")[-1] for row in plain.split("\n")]
    whole = [row.rstrip() for row in plain.replace("\r\n", "\n").split("\n")]
    assert any(row.endswith("x" * 150) for row in whole), "paths are never broken by the terminal's width"
    assert any(row.endswith("half way") for row in whole) and any(row.endswith("from a callback") for row in whole)
    assert not any("half way" in row and "step" in row.split("half way")[-1] for row in rows)
    assert re.search(r"step 30/30 .*loss 1\.23\d lr 2\.0e-4 8,123 tok/s 1\.9 GiB 0:00 left", plain)
    assert output.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in output, "the cursor is shown again"


def test_narrow_terminal_keeps_the_bar_on_one_line():
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_terminal(TERM="xterm", COLUMNS="40"))
    last = [row for row in re.split("[\r\n]+", plain) if row.startswith("step 30/30")][-1]
    assert "loss" in last and "left" in last and len(last) <= 40


def test_dumb_terminal_gets_plain_lines():
    output = on_terminal(TERM="dumb")
    assert "\x1b" not in output and "step 1/30  loss" in output and "step 30/30  loss" in output


def lines_of(moments: list[float], total: int) -> list[str]:
    """Run steps at the given times and return the printed lines."""
    stream = io.StringIO()
    clock = iter([0.0] + [moment for moment in moments for _ in range(2)])
    progress = Progress(total, console=Console(file=stream), clock=lambda: next(clock))
    for step in range(1, len(moments) + 1):
        progress.step({"step": step, "loss": 1.0})
    progress.close()
    return stream.getvalue().splitlines()


def test_slow_steps_are_all_shown_and_fast_ones_every_ten_seconds():
    assert len(lines_of([11.0, 22.0, 33.0], 3)) == 3
    assert [line.split("/")[0] for line in lines_of([0.5 * step for step in range(1, 61)], 60)] == [
        "step 1", "step 21", "step 41", "step 60",
    ]  # fmt: skip


def test_last_step_is_shown_when_a_run_stops_early():
    assert [line.split("/")[0] for line in lines_of([0.1, 0.2, 0.3], 300)] == ["step 1", "step 3"]


def test_remaining_time_follows_the_recent_speed():
    moments = [60.0 + step for step in range(100)]  # a minute to the first step, then a second each
    assert lines_of(moments, 200)[-1].endswith("1:40 left")


def test_missing_and_skipped_values_are_left_out():
    stream = io.StringIO()
    progress = Progress(2, console=Console(file=stream))
    progress.step({"step": 1, "loss": None, "skipped": True, "lr": 1e-5, "grad_norm": None})
    progress.step({"step": 2})
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"step 1/2  skipped  lr 1\.0e-5  \d:\d\d left", first) and re.fullmatch(
        r"step 2/2  0:00 left", second
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (272, "4:32"), (3872, "1:04:32"), (180_000, "2 d 2 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_do_not_import_rich():
    code = "import sys; from luthier.training.progress import Progress; Progress(1).step({}); sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_what_came_before_the_first_step_is_not_taken_for_a_steps_time():
    stream = io.StringIO()
    times = iter([0.0, 100.0, 100.0, 100.0])  # an evaluation of 99 s, then a step of 1 s
    progress = Progress(11, console=Console(file=stream), clock=lambda: next(times, 100.0))
    progress.step({"step": 1, "loss": 1.0, "tokens": 50, "tokens_per_second": 50.0})
    progress.close()
    assert "0:10 left" in stream.getvalue()
