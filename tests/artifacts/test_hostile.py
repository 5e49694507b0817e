"""Files made to mislead: each is a problem or an error with its code, never a traceback, a wait or a wrong answer."""

import json
import os
import struct

import pytest
from folders import (
    CONFIG,
    make_adapter,
    make_model,
    make_shards,
    model_tensors,
    processor_seconds,
    raw_tensor_file,
    tensor_file,
    write_json,
)

from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import inside
from luthier.artifacts.gguf_header import read_gguf_header
from luthier.artifacts.identify import identify
from luthier.artifacts.manifest import Manifest
from luthier.artifacts.show import show
from luthier.artifacts.tensorfile import read_header
from luthier.artifacts.verify import verify_all
from luthier.errors import ArtifactError


def entry(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = {
    "overlap": {"a": entry(), "b": entry(8, 24)},
    "same range": {"a": entry(), "b": entry()},
    "hole": {"a": entry(), "b": entry(32, 48)},
    "hole at the start": {"a": entry(16, 32)},
    "negative range": {"a": entry(-16, 0)},
    "negative shape": {"a": entry(0, 16, (-2, -2))},
    "product overflows": {"a": entry(0, 0, (2**32, 2**32, 2**32, 0))},
    "extent overflows": {"a": entry(0, 0, (2**80, 0))},
    "too many dimensions": {"a": entry(0, 4, (1,) * 1000)},
    "true as an extent": {"a": entry(0, 4, (True,))},
    "true as an offset": {"a": entry(False, 16)},
    "fractions": {"a": entry(0.0, 16.0)},
    "text as a shape": {"a": entry(0, 4, ("4",))},
    "shape is a text": {"a": entry() | {"shape": "4"}},
    "three offsets": {"a": entry() | {"data_offsets": [0, 16, 32]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "unknown type": {"a": entry(dtype="F31")},
    "type is a number": {"a": entry(dtype=3)},
    "entry is a list": {"a": []},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry()},
    "metadata is a list": {"__metadata__": [1], "a": entry()},
    "a list": [entry()],
    "twice": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "half a surrogate pair": b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "a number of 5000 digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}',
    "NaN": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}',
    "blank first": b' {"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "no UTF-8": b'{"\xff":1}',
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_header_that_contradicts_itself_is_refused(case, tmp_path):
    path = raw_tensor_file(make_model(tmp_path / "m") / "model.safetensors", HEADERS[case], bytes(64))
    with pytest.raises(ArtifactError) as caught:
        read_header(path)
    assert caught.value.code == "broken-file"
    found = identify(tmp_path / "m")
    assert (found.whole, "broken-file" in [problem.code for problem in found.problems]) == (False, True)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 100_000_001])
def test_header_length_beyond_the_file_or_the_limit_is_refused(length, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    os.truncate(path, 200_000_000)
    with pytest.raises(ArtifactError, match="header"):
        read_header(path)


def test_range_beyond_the_file_is_named(tmp_path):
    raw_tensor_file(make_model(tmp_path) / "model.safetensors", {"a": entry(0, 2**50, (2**48,))}, bytes(16))
    assert "file-size" in [problem.code for problem in identify(tmp_path).problems]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "link", "inner/x", "a\0b"])
def test_name_that_leaves_the_folder_is_refused(name, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x").write_text("x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to("../secret/x")
    (folder / "inner").symlink_to("../secret")
    with pytest.raises(ArtifactError) as caught:
        inside(folder, name)
    assert caught.value.code == "path-escape"


def test_links_within_a_folder_and_into_the_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "hub" / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    tensor_file(repository / "blobs" / "123", model_tensors())
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    write_json(snapshot / "config.json", CONFIG)
    assert identify(snapshot).whole
    (tmp_path / "elsewhere").symlink_to(snapshot)
    assert identify(tmp_path / "elsewhere").whole
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "hub" / "models--c--d" / "blobs").mkdir(parents=True)
    tensor_file(tmp_path / "hub" / "models--c--d" / "blobs" / "123", model_tensors())
    (snapshot / "model.safetensors").symlink_to("../../../models--c--d/blobs/123")
    assert "path-escape" in [problem.code for problem in identify(snapshot).problems]


def test_link_out_of_a_folder_is_a_problem(tmp_path):
    tensor_file(tmp_path / "other.safetensors", model_tensors())
    (make_model(tmp_path / "m") / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "other.safetensors")
    found = identify(tmp_path / "m")
    assert (found.whole, found.problems[0].code) == (False, "path-escape")


@pytest.mark.parametrize("what", ["pipe", "folder", "device", "loop", "dangling"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "luthier.json", "run.yaml", "pytorch_model.bin"])  # fmt: skip
def test_what_is_no_regular_file_is_never_read(what, name, tmp_path):
    path = make_model(tmp_path / "m") / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": name, "dangling": "nowhere"}[what])
    show(identify(tmp_path / "m"))


JSON_FILES = ["config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json", "trainer_state.json", "model.safetensors.index.json", "luthier.json", "proof.json"]  # fmt: skip
VALUES = {
    "list": b"[]", "text": b'"x"', "number": b"3", "null": b"null", "empty": b"", "cut": b'{"a": ',
    "deep": b"[" * 200_000, "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "no UTF-8": b"\xff\xfe",
    "wrong inside": b'{"weight_map": [], "architectures": [3], "model_type": {}, "vocab_size": true, "text_config": [], "quantization_config": [],'
                    b' "peft_type": [], "r": {}, "target_modules": {"a": 1}, "base_model_name_or_path": {}, "global_step": [], "model": {"vocab": 3},'
                    b' "added_tokens": [3, {"id": "x"}], "chat_template": 3, "format": 1, "digest": 3, "kind": 3, "revision": 5}',
    "long path": b'{"base_model_name_or_path": "/' + b"a" * 100_000 + b'", "vocab_size": 16}',
    "null character": b'{"base_model_name_or_path": "/a\\u0000b", "peft_type": "LORA"}',
}  # fmt: skip


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("case", VALUES)
def test_json_of_another_shape_is_no_traceback(name, case, tmp_path):
    for make in (make_model, make_adapter):
        folder = make(tmp_path / make.__name__)
        (folder / name).write_bytes(VALUES[case])
        json.dumps(identify(folder).as_dict())
        show(identify(folder))


def test_json_file_beyond_every_need_is_not_read(tmp_path):
    make_model(tmp_path)
    os.truncate(tmp_path / "config.json", 2**40)
    begin = processor_seconds()
    assert "broken-json" in [problem.code for problem in identify(tmp_path).problems]
    assert processor_seconds() - begin < 1


def written(folder, change=None, **facts):
    """A folder of ours with a manifest that has a right digest of its wrong content."""
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("x")
    content = json.loads(Manifest("model", {"a.txt": 1}, (), (), facts).to_bytes())
    if change:
        change(content)
    content["digest"] = manifests._self_digest({k: v for k, v in content.items() if k != "digest"})
    (folder / manifests.NAME).write_text(json.dumps(content))
    return folder


MANIFESTS = {
    "files are a text": lambda c: c.update(files="x"),
    "size is a text": lambda c: c["files"][0].update(size="1"),
    "size is negative": lambda c: c["files"][0].update(size=-1),
    "size is true": lambda c: c["files"][0].update(size=True),
    "path is a number": lambda c: c["files"][0].update(path=3),
    "file twice": lambda c: c["files"].append(c["files"][0]),
    "tensors are numbers": lambda c: c.update(tensors=[1]),
    "tensor of unknown type": lambda c: c.update(tensors=[{"name": "a", "dtype": "X", "shape": [1], "file": "a.txt", "offset": 0}]),
    "tensor of negative shape": lambda c: c.update(tensors=[{"name": "a", "dtype": "F32", "shape": [-1], "file": "a.txt", "offset": 0}]),
    "digest beyond the file": lambda c: c.update(digests=[{"file": "a.txt", "offset": 0, "length": 10**15, "blake3": "x"}]),
    "digest of another file": lambda c: c.update(digests=[{"file": "/etc/passwd", "offset": 0, "length": 1, "blake3": "x"}]),
    "digest with more keys": lambda c: c.update(digests=[{"x": 1}]),
    "kind is a list": lambda c: c.update(kind=[]),
    "format is a text": lambda c: c.update(format="1"),
    "parents are a text": lambda c: c.update(parents="x"),
    "parents are numbers": lambda c: c.update(parents=[1]),
    "parent's name is a list": lambda c: c.update(parents=[{"name": []}]),
    "base is a list": lambda c: c.update(base=[1]),
    "fingerprint is a number": lambda c: c.update(fingerprint=1),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest_of_wrong_types_is_damaged(case, tmp_path):
    folder = written(tmp_path / "m", MANIFESTS[case])
    assert [problem.code for problem in identify(folder).problems][:1] == ["manifest-damaged"]
    assert not verify_all(folder).whole
    show(identify(folder))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_manifest_that_names_a_file_outside_is_a_problem(name, tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = written(tmp_path / "m", lambda c: c["files"][0].update(path=name))
    assert [problem.code for problem in identify(folder).problems][:1] == ["path-escape"]
    assert "path-escape" in str(verify_all(folder))


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 20))


@pytest.mark.parametrize(
    "text",
    [BOMB + "model: *a19\n", MERGES, "[" * 20_000, "[" * 3_000_000, "- " * 20_000, "a: " + "{" * 400, "a: &a [*a]\n", "model: !!python/object/apply:os.system ['false']", "- 1",
     "model: [1]", "\x00", "a: 2020-99-99", "a: !!int x", "? [a]\n: 1", "x" * 10_000_000, "a: !!timestamp x", "<<: 1"],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_run_file_made_to_explode_is_refused_quickly(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    begin = processor_seconds()
    found = identify(tmp_path)
    show(found)
    json.dumps(found.as_dict())
    assert found.kind == "run"
    assert processor_seconds() - begin < 2


def gguf_bytes(tensors=0, pairs=0, body=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body


def pair(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


ARCHITECTURE = pair(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama")
TENSOR = struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 8, 0, 0)
GGUFS = {
    "empty": b"GGUF",
    "countless pairs": gguf_bytes(pairs=2**63, body=b"\0" * 64),
    "countless tensors": gguf_bytes(2**63, 1, ARCHITECTURE),
    "countless values": gguf_bytes(pairs=1, body=pair(b"a", 9, struct.pack("<IQ", 0, 2**62))),
    "arrays without end": gguf_bytes(pairs=1, body=pair(b"a", 9, struct.pack("<IQ", 9, 1) * 5000)),
    "name of 2**60": gguf_bytes(pairs=1, body=struct.pack("<Q", 2**60)),
    "alignment of 0": gguf_bytes(1, 2, ARCHITECTURE + pair(b"general.alignment", 4, struct.pack("<I", 0)) + TENSOR),
    "alignment is a text": gguf_bytes(1, 2, ARCHITECTURE + pair(b"general.alignment", 8, struct.pack("<Q", 1) + b"x") + TENSOR),
    "architecture is a number": gguf_bytes(pairs=1, body=pair(b"general.architecture", 4, struct.pack("<I", 0))),
    "key twice": gguf_bytes(pairs=2, body=ARCHITECTURE * 2),
    "tensor twice": gguf_bytes(2, 1, ARCHITECTURE + TENSOR * 2 + bytes(200)),
    "overlap": gguf_bytes(2, 1, ARCHITECTURE + TENSOR + TENSOR.replace(b"a", b"b") + bytes(200)),
    "huge shape": gguf_bytes(1, 1, ARCHITECTURE + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 8) + struct.pack("<8Q", *[2**63] * 8) + struct.pack("<IQ", 0, 0)),
    "huge offset": gguf_bytes(1, 1, ARCHITECTURE + struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 8, 0, 2**64 - 1) + bytes(200)),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUFS)
def test_gguf_header_made_to_mislead_is_refused(case, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUFS[case])
    begin = processor_seconds()
    with pytest.raises(ArtifactError) as caught:
        read_gguf_header(path)
    assert caught.value.code == "broken-gguf"
    assert "broken-gguf" in [problem.code for problem in identify(tmp_path).problems]
    assert processor_seconds() - begin < 2


def test_array_as_large_as_a_sparse_file_is_not_read(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(pairs=1, body=pair(b"a", 9, struct.pack("<IQ", 0, 2**36))))
    os.truncate(path, 2**37)
    with pytest.raises(ArtifactError, match="an array of"):
        read_gguf_header(path)


def test_names_cannot_command_the_terminal(tmp_path):
    tensors = {f"_orig_mod.\x1b]0;owned\x07\x1b[2J{name}": spec for name, spec in model_tensors().items()}
    tensor_file(make_model(tmp_path) / "model.safetensors", tensors)
    shown = show(identify(tmp_path))
    assert "owned" in shown
    assert "\x1b" not in shown and "\x07" not in shown


def test_two_hundred_sparse_shards_of_100_gb_take_less_than_a_second(tmp_path):
    shards, size = 200, 500_000_000
    weight_map = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        tensors = {f"model.layers.{number}.{part}.weight": ("BF16", (size // 8 // 1000, 1000)) for part in "abcd"}
        tensor_file(tmp_path / name, tensors, sparse=True)
        weight_map |= dict.fromkeys(tensors, name)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(tmp_path / "config.json", CONFIG)
    begin = processor_seconds()
    found = identify(tmp_path)
    spent = processor_seconds() - begin
    assert (found.whole, found.parameters) == (True, 50_000_000_000)
    assert spent < 1


def test_each_header_is_read_once(tmp_path, monkeypatch):
    from luthier.artifacts import contents

    read = []
    monkeypatch.setattr(contents, "read_header", lambda path: (read.append(path.name), read_header(path))[1])
    identify(make_shards(tmp_path))
    assert sorted(read) == sorted(path.name for path in tmp_path.glob("*.safetensors"))
