"""A disk that fills up in mid-run: a clear error, whole checkpoints, and the same bits once there is room again."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import STEPS, Setup, assert_same_run, make_setup, newest, resume, train

from luthier.artifacts import manifest as manifests
from luthier.artifacts.run_folder import published

FILL = '''
import os, resource
from pathlib import Path

def fill(event):
    """Leave {left} bytes on the disk at step 8; without a disk of its own, let no file grow beyond them."""
    if event.kind != "step" or event.step != 8:
        return
    if {mounted}:
        room = os.statvfs(event.run).f_bavail * os.statvfs(event.run).f_frsize
        with open(Path(event.run).parent / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, room - {left})
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max({left}, 2**16), resource.RLIM_INFINITY))
'''


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Setup:
    setup = make_setup(tmp_path_factory.mktemp("full"), lora=False, changes={"checkpoint.keep": 2})
    done = train(setup)
    assert done.code == 0, done.text
    return setup


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """A folder on a disk of 8 MiB, and whether it is one; where mounting is not permitted, an ordinary folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield folder, mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("left", [0, 60 * 1024, 300 * 1024], ids=["nothing", "a little", "half a checkpoint"])
def test_full_disk_ends_the_run_clearly_and_room_lets_it_go_on(reference, small_disk, left):
    disk, mounted = small_disk
    (reference.home / "fill.py").write_text(FILL.format(left=left, mounted=mounted))
    setup = Setup(reference.home, disk / "run", reference.run_file)
    done = train(setup, f"output={setup.run}", "callbacks=[fill:fill]")
    _assert_clear(done.code, done.text)
    assert 0 < newest(setup.run) < STEPS
    for found in published(setup.run):
        assert manifests.verify(found.path)[1] == []
    if mounted:
        still_full = resume(setup, None, "callbacks=[]")
        _assert_clear(still_full.code, still_full.text)
        (disk / "filler").unlink()
    done = resume(setup, None, "callbacks=[]")
    assert done.code == 0, done.text
    assert_same_run(setup.run, reference.run)


def _assert_clear(code: int, text: str) -> None:
    assert code == 1, text
    said = [line for line in text.splitlines() if line.startswith("luthier: ")]
    assert len(said) == 1, text
    assert "disk is full" in said[0] or "are free and the run needs" in said[0]
    assert "Make room" in said[0]
    assert "Traceback" not in text
    assert "not an error Luthier expects" not in text


def test_too_little_room_shows_before_the_first_step(reference, small_disk):
    disk, mounted = small_disk
    if not mounted:
        pytest.skip("no disk of its own can be mounted here, and the size of one file says nothing of the room")
    room = 500 * 1024
    (disk / "filler").write_bytes(bytes(8 * 2**20 - room))
    setup = Setup(reference.home, disk / "run", reference.run_file)
    done = train(setup, f"output={setup.run}")
    assert done.code == 1
    assert "are free and the run needs" in done.text
    assert "checkpoint.keep" in done.text
    assert newest(setup.run) == 0
    (disk / "filler").unlink()
    done = resume(setup)
    assert done.code == 0, done.text
    assert_same_run(setup.run, reference.run)
