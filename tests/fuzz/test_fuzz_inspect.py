"""Whatever is damaged, `inspect` and `verify` answer or give one of Luthier's errors: no traceback, no hang."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from damage import damages
from folders import make_adapter, make_distcp, make_model, make_shards, make_trainer_checkpoint, write_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.artifacts import manifest as manifests
from luthier.artifacts.gguf_header import read_gguf_header
from luthier.artifacts.identify import identify
from luthier.artifacts.manifest import Manifest, digest_file, stretches
from luthier.artifacts.show import show
from luthier.artifacts.tensorfile import read_header
from luthier.artifacts.verify import verify_all
from luthier.errors import LuthierError

QUICK = settings(max_examples=80, deadline=5000, derandomize=True, database=None, suppress_health_check=list(HealthCheck))  # fmt: skip
LONG = settings(QUICK, max_examples=5000)


def sealed(folder: Path, **facts: object) -> Path:
    """The folder with a manifest of ours."""
    places, digests, files = [], [], {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = path.stat().st_size
        own = read_header(path)[0].values() if path.suffix == ".safetensors" else ()
        places += [type(place)(place.spec, name, place.offset) for place in own]
        digests += digest_file(path, name, stretches(files[name], list(own) or None))
    manifests.write(folder, Manifest("adapter", files, tuple(digests), tuple(places), dict(facts)))
    return folder


def make_run(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.yaml").write_text("format: 1\nmodel: {path: a/b}\noutput: runs/x\n")
    parents = [{"kind": "base", "name": str(folder / "final"), "fingerprint": "0" * 64}]
    for step in (10, 20):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        make_adapter(checkpoint / "adapter")
        write_json(checkpoint / "trainer" / "state.json", {"step": step})
        sealed(checkpoint, step=step, parents=parents)
    sealed(make_adapter(folder / "final"), parents=parents, base={"name": "a/b"}, fingerprint="1" * 64)
    write_json(folder / "final" / "proof.json", {"verdict": "passed", "says": "equal"})
    return folder


MAKERS = {"model": make_model, "shards": make_shards, "adapter": make_adapter, "trainer": make_trainer_checkpoint, "distcp": make_distcp, "run": make_run}  # fmt: skip


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    home = tmp_path_factory.mktemp("fuzz")
    return {name: make(home / name) for name, make in MAKERS.items()}, home / "copy"


def survives(folder: Path) -> None:
    for ask in (identify, verify_all):
        try:
            answer = ask(folder)
        except LuthierError as error:
            assert error.code and str(error)
            continue
        json.dumps(answer.as_dict())
        str(show(answer) if ask is identify else answer).encode()


@pytest.mark.parametrize("kind", MAKERS)
@QUICK
@given(data=st.data())
def test_damaged_folder_is_answered_or_refused(kind, homes, data):
    folders, copy = homes
    data.draw(damages(folders[kind], copy))
    survives(copy)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
@LONG
@given(data=st.data())
def test_damaged_folder_is_answered_or_refused_at_length(kind, homes, data):
    folders, copy = homes
    data.draw(damages(folders[kind], copy, most=6))
    survives(copy)


@QUICK
@given(data=st.data())
def test_damage_to_a_folder_of_ours_is_never_missed(homes, data):
    """Every byte below a manifest is covered: what verify calls whole is what was saved."""
    folders, copy = homes
    original = folders["run"] / "final"
    data.draw(damages(original, copy, only=lambda name: name != "proof.json"))
    try:
        whole = verify_all(copy).whole
    except LuthierError:
        return
    if whole:
        for path in (path for path in original.rglob("*") if path.is_file() and path.name not in ("proof.json", manifests.NAME)):  # fmt: skip
            assert (copy / path.relative_to(original)).read_bytes() == path.read_bytes()


@QUICK
@given(body=st.binary(max_size=200), length=st.integers(0, 2**64 - 1) | st.integers(0, 300))
def test_any_bytes_are_a_header_or_are_refused(tmp_path_factory, body, length):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{" + body)
    try:
        read_header(path)
    except LuthierError as error:
        assert error.code == "broken-file"


@QUICK
@given(body=st.binary(max_size=300), tensors=st.integers(0, 3), pairs=st.integers(0, 3) | st.just(2**64 - 1))
def test_any_bytes_are_a_gguf_header_or_are_refused(tmp_path_factory, body, tensors, pairs):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + tensors.to_bytes(8, "little") + pairs.to_bytes(8, "little") + body)  # fmt: skip
    try:
        read_gguf_header(path)
    except LuthierError as error:
        assert error.code == "broken-gguf"
