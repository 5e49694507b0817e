"""Exports that are killed: nothing under DST's name, and a second call goes on and leaves the same bytes. And their memory."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from adapters import make_adapter

import luthier
from luthier.artifacts.manifest import digest_of
from luthier.cli import main
from luthier.export.merged.merge import merge_folders

ROOT = Path(__file__).parents[2]
PRELUDE = "import sys\nfrom pathlib import Path\n"
MERGE = (
    PRELUDE
    + """
from luthier.export.merged.merge import merge_folders
merge_folders(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), report=print)
"""
)
CONVERT = (
    PRELUDE
    + """
from luthier.export.sharded.bare import stream_bare
from luthier.export.sharded.source import bare_weights
from luthier.export.read_back import check_written
for line in stream_bare(bare_weights(Path(sys.argv[1])), Path(sys.argv[3]), base=Path(sys.argv[2]), dtype=None, shard_bytes=1 << 28, check=check_written):
    print(line)
"""
)
MEASURE = """
assert not {"transformers", "peft"} & set(sys.modules), "the stream imported what it must not"
"""


def digests(folder: Path) -> dict[str, str]:
    return {path.name: digest_of(path.read_bytes()) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of 496 MB, saved by four ranks through torch.distributed.checkpoint, and the config of its base."""
    folder = tmp_path_factory.mktemp("large") / "saved"
    command = [sys.executable, str(ROOT / "benchmarks/sharded.py"), "--size", "small", "--make", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def whole(large, tmp_path_factory) -> Path:
    """The same as a transformers folder, by an export that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run([sys.executable, "-c", CONVERT, str(large / "distcp"), str(large / "base"), str(out)], check=True, capture_output=True)  # fmt: skip
    return out


def kill_in_the_middle(command: list[str], out: Path, sign: int, lines: int) -> bool:
    """Start an export and stop it when its journal has that many lines; whether it was stopped before it was done."""
    journal = out.parent / f".partial-{out.name}" / ".journal"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if journal.is_file() and journal.read_bytes().count(b"\n") >= lines:
            process.send_signal(sign)
            break
        time.sleep(0.002)
    process.wait()
    return not out.exists()


@pytest.mark.slow
def test_export_killed_thirty_times_goes_on_and_leaves_the_same_bytes(large, whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", CONVERT, str(large / "distcp"), str(large / "base"), str(out)]
    journal = tmp_path / f".partial-{out.name}" / ".journal"
    moments, stopped, finished = random.Random(4), 0, 0
    while stopped < 30:
        lines = journal.read_bytes().count(b"\n") if journal.is_file() else 0
        if kill_in_the_middle(command, out, signal.SIGKILL if stopped % 5 else signal.SIGINT, lines + 1 + moments.randrange(8)):  # fmt: skip
            stopped += 1
            assert [path.name for path in tmp_path.iterdir()] in ([], [journal.parent.name])
        else:
            finished += 1
            assert digests(out) == digests(whole)
            shutil.rmtree(out)
    assert finished, "no call came to its end between the kills"
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "went on where an earlier call stopped" in done.stdout
    assert digests(out) == digests(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("base") / "base", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter", target_modules=["q_proj", "v_proj"], r=4)


def interrupted(base: Path, adapter: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: str) -> Path:
    """The hidden folder that a merge leaves when Ctrl-C comes after ten stretches."""
    from luthier.export import unfinished

    add = unfinished.Journal.add
    count = [0]

    def stops(self, digest, before) -> None:
        count[0] += 1
        if count[0] > 10:
            raise KeyboardInterrupt
        add(self, digest, before)

    with monkeypatch.context() as patched:
        patched.setattr(unfinished.Journal, "add", stops)
        with pytest.raises(KeyboardInterrupt):
            merge_folders(base, adapter, out, **options)
    partial = out.parent / f".partial-{out.name}"
    assert partial.is_dir() and not out.exists()
    return partial


def test_what_survives_is_taken_over_only_where_its_bytes_are_as_noted(base, adapter, tmp_path, monkeypatch):
    merge_folders(base, adapter, tmp_path / "plain")
    partial = interrupted(base, adapter, tmp_path / "out", monkeypatch)
    file, offset, length, *_ = json.loads((partial / ".journal").read_text().splitlines()[3])
    with open(partial / file, "r+b") as damaged:
        damaged.seek(offset + length // 2)
        byte = damaged.read(1)
        damaged.seek(offset + length // 2)
        damaged.write(bytes([byte[0] ^ 1]))
    with open(partial / ".journal", "a") as torn:
        torn.write('["model.safetensors", 12')
    said: list[str] = []
    merge_folders(base, adapter, tmp_path / "out", report=said.append)
    assert any("9 of 10 stretches" in line for line in said), said
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


@pytest.mark.parametrize("change", ["options", "sources"])
def test_another_export_for_the_same_name_starts_again_and_says_so(change, base, adapter, tmp_path, monkeypatch):
    interrupted(base, adapter, tmp_path / "out", monkeypatch, **({"dtype": "fp32"} if change == "options" else {}))
    if change == "sources":
        adapter = make_adapter(base, tmp_path / "second", target_modules=["q_proj", "v_proj"], r=4, seed=7)
    said: list[str] = []
    merge_folders(base, adapter, tmp_path / "out", report=said.append)
    merge_folders(base, adapter, tmp_path / "plain")
    assert any("started again" in line for line in said), said
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")


def test_failed_export_leaves_nothing_to_go_on_with(base, adapter, tmp_path):
    def fails(folder: Path) -> bytes:
        raise luthier.ArtifactError("no.", code="proof-failed")

    with pytest.raises(luthier.ArtifactError):
        merge_folders(base, adapter, tmp_path / "out", prove=fails)
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_did_not_arrive_are_found_before_the_folder_gets_its_name(base, adapter, tmp_path, monkeypatch):
    from luthier.artifacts.direct import DirectFile

    write = DirectFile.write

    def loses_a_bit(self, data, offset) -> None:
        write(self, data, offset)
        if offset > 10_000 and len(data) > 100:
            with open(f"/proc/self/fd/{self.descriptor}", "r+b") as file:
                file.seek(offset + 50)
                file.write(bytes([data[50] ^ 4]))

    monkeypatch.setattr(DirectFile, "write", loses_a_bit)
    with pytest.raises(luthier.ArtifactError, match=r"bytes \d+ to \d+ are not those that were saved .tensor model"):
        merge_folders(base, adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_name_do_not_mix(base, adapter, tmp_path):
    from luthier.export.unfinished import unfinished

    with unfinished(tmp_path / "out", [base], []), pytest.raises(luthier.RequestError, match="in use"):
        merge_folders(base, adapter, tmp_path / "out")


def peak(command: list[str], out: Path) -> int:
    """The highest RssAnon of a process in MiB, sampled; its end is checked."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    highest = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        highest = max([highest, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.005)
    assert process.returncode == 0, process.communicate()[1]
    assert out.is_dir()
    return highest // 1024


@pytest.mark.slow
def test_memory_is_a_few_stretches_and_the_stream_imports_neither_library(large, whole, tmp_path):
    """What the interpreter and torch take is measured beside; buffers are 64 MiB a thread at most, and one more where sums are made."""
    adapter = tmp_path / "adapter"
    make_large_adapter(whole, adapter)
    idle = peak([sys.executable, "-c", CONVERT.partition("for line")[0] + "Path(sys.argv[1]).mkdir()", str(tmp_path / "idle")], tmp_path / "idle")  # fmt: skip
    converted = peak([sys.executable, "-c", CONVERT + MEASURE, str(large / "distcp"), str(large / "base"), str(tmp_path / "a")], tmp_path / "a")  # fmt: skip
    merged = peak([sys.executable, "-c", MERGE + MEASURE, str(whole), str(adapter), str(tmp_path / "b")], tmp_path / "b")  # fmt: skip
    assert converted - idle < 5 * 64, (idle, converted)
    assert merged - idle < 5 * 64, (idle, merged)
    assert sum(path.stat().st_size for path in whole.iterdir()) > 450e6
    assert main(["verify", str(tmp_path / "b")]) == 0


def make_large_adapter(base: Path, folder: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                if name.endswith("proj.weight"):
                    rows, columns = opened.get_slice(name).get_shape()
                    module = f"base_model.model.{name.removesuffix('.weight')}"
                    tensors[f"{module}.lora_A.weight"] = torch.randn(16, columns) * 0.01
                    tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 16) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "base_model_name_or_path": str(base)}  # fmt: skip
    told |= {"target_modules": sorted({name.split(".")[-3] for name in tensors})}
    (folder / "adapter_config.json").write_text(json.dumps(told))
