"""Workers: what several processes tokenise is what one does, errors included, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import chat, write_lines

from luthier.config.schema import SourceConfig
from luthier.data import tokenise as tokenise_module
from luthier.data import workers as workers_module
from luthier.data.tokenise import Options, tokenise
from luthier.errors import LuthierError, RequestError

OPTIONS = Options("sft", "assistant", "truncate", "error", 128)


@pytest.fixture
def helped(monkeypatch):
    """Lets workers help from the first sample on, in groups of 8 samples, and waits until they are ready."""
    ready = workers_module._Pool.ready

    def wait(pool):
        while not ready(pool):
            time.sleep(0.01)
        return True

    monkeypatch.setattr(workers_module, "ALONE", 0)
    monkeypatch.setattr(workers_module._Pool, "ready", wait)
    monkeypatch.setattr(tokenise_module, "TOGETHER", 8)
    monkeypatch.setattr(tokenise_module, "worker_count", lambda: 2)


def children() -> set[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    ).stdout
    return {int(line.split()[0]) for line in found.splitlines() if "luthier.data.worker" in line}


def files_of(shard) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in shard.folder.iterdir()}


def samples(count: int) -> list[dict]:
    return [chat(f"question {number} 你好", f"answer {number} " * (number % 40)) for number in range(count)]


def test_workers_write_the_same_bytes_as_one_process(tmp_path, tokenizer, request):
    broken = {"messages": [{"role": "bot", "content": "x"}]}
    path = write_lines(tmp_path / "a.jsonl", [*samples(50), broken, *samples(30), {"messages": []}, *samples(45)])
    with path.open("a") as file:
        file.write("{broken\n")
    options = Options("sft", "assistant", "truncate", "skip", 64)
    alone = tokenise(SourceConfig(path=str(path)), tokenizer, options, tmp_path / "one", "x")
    request.getfixturevalue("helped")
    together = tokenise(SourceConfig(path=str(path)), tokenizer, options, tmp_path / "two", "x")
    assert files_of(alone) == files_of(together) and len(alone) > 100
    assert together.facts["counts"]["skipped"] == 3
    assert not children()


def test_broken_sample_is_named_with_its_line_though_others_were_read_ahead(tmp_path, tokenizer, helped):
    wrong = {"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "x"}]}
    path = write_lines(tmp_path / "a.jsonl", [*samples(20), wrong, *samples(40)])
    with path.open("ab") as file:
        file.write(b'{"messages": "\xc4\xe3\xba\xc3"}\n')
    with pytest.raises(
        RequestError, match=r"a\.jsonl:21: message 2 has the role 'bot'.*a\.jsonl:62: is not valid UTF-8"
    ):
        tokenise(SourceConfig(path=str(path)), tokenizer, OPTIONS, tmp_path / "two", "x")
    assert not children()


def test_what_a_worker_raises_is_raised_here(tmp_path, tokenizer, helped):
    from tiny import make_tokenizer

    path = write_lines(tmp_path / "a.jsonl", samples(20))
    with pytest.raises(RequestError, match=r"model\.template: chatml") as caught:
        tokenise(SourceConfig(path=str(path)), make_tokenizer(template=None), OPTIONS, tmp_path / "two", "x")
    assert caught.value.code == "no-template" and not children()


def test_worker_that_is_killed_ends_the_call_with_a_clear_error(tmp_path, tokenizer, helped, monkeypatch):
    submit = workers_module._Pool.submit

    def kill_and_submit(pool, contents):
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        return submit(pool, contents)

    monkeypatch.setattr(workers_module._Pool, "submit", kill_and_submit)
    path = write_lines(tmp_path / "a.jsonl", samples(60))
    with pytest.raises(LuthierError, match=r"has ended \(signal 9\).*memory"):
        tokenise(SourceConfig(path=str(path)), tokenizer, OPTIONS, tmp_path / "two", "x")
    assert not (tmp_path / "two").exists() and not children()


SCRIPT = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from luthier.config.schema import SourceConfig
from luthier.data import tokenise as tokenise_module, workers
from luthier.data.tokenise import Options, tokenise

print("started", flush=True)
workers.ALONE, tokenise_module.TOGETHER = 0, 8
tokenise_module.worker_count = lambda: 2
folder = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
tokenise(SourceConfig(path=str(folder / "a.jsonl")), tokenizer, Options("sft", "assistant", "truncate", "error", 128), folder / "out", "x")
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_an_interrupted_or_killed_caller(tmp_path, tokenizer, how):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_lines(tmp_path / "a.jsonl", samples(100_000))
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)], start_new_session=True, stdout=subprocess.PIPE
    )
    workers: list[int] = []
    while len(workers) < 2:
        time.sleep(0.05)
        assert process.poll() is None
        listed = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-f", "luthier.data.worker"], capture_output=True, text=True
        )
        workers = [int(pid) for pid in listed.stdout.split()]
    assert (
        process.stdout is not None and process.stdout.read(8) == b"started\n"
    )  # once: no worker runs the script again
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.kill()
    assert process.wait(timeout=60) != 0
    deadline = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.05)
    assert not (tmp_path / "out").exists()
    assert process.stdout.read() == b""
