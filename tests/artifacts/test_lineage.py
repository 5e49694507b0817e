"""The lineage is a tree of manifests' parents; circles end, and what is gone is named by its fingerprint."""

from folders import make_model

from luthier.artifacts import manifest as manifests
from luthier.artifacts.identify import identify
from luthier.artifacts.manifest import Manifest
from luthier.artifacts.show import show


def ours(folder, parents, fingerprint):
    make_model(folder, tokenizer=False)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    from luthier.artifacts.tensorfile import read_header

    places = tuple(read_header(folder / "model.safetensors")[0].values())
    manifests.write(folder, Manifest("model", files, (), places, {"parents": parents, "fingerprint": fingerprint}))
    return folder


def test_parents_are_followed_through_folders_of_ours(tmp_path):
    ours(tmp_path / "old", [{"kind": "base", "name": "a/b", "fingerprint": "0" * 64}], "1" * 64)
    ours(tmp_path / "new", [{"kind": "base", "name": str(tmp_path / "old"), "fingerprint": "1" * 64}, {"kind": "adapter", "name": "gone", "fingerprint": "2" * 64}], "3" * 64)  # fmt: skip
    found = identify(tmp_path / "new")
    assert found.kind == "merged"
    tree = found.lineage()
    assert [ancestor.name for ancestor in tree] == [str(tmp_path / "old"), "gone"]
    assert [ancestor.name for ancestor in tree[0].parents] == ["a/b"]
    lines = show(found).splitlines()
    assert any("├─ base: " in line and "1" * 16 in line for line in lines)
    assert any("│  └─ base: a/b" in line for line in lines)
    assert any("└─ adapter: gone (2222222222222222)" in line for line in lines)


def test_circle_of_parents_ends(tmp_path):
    ours(tmp_path / "a", [{"kind": "base", "name": str(tmp_path / "b")}], "1" * 64)
    ours(tmp_path / "b", [{"kind": "base", "name": str(tmp_path / "a")}], "2" * 64)
    assert identify(tmp_path / "a").lineage()[0].parents[0].note == "itself again"


def test_many_parents_of_many_parents_are_bounded(tmp_path):
    for number in range(12):
        parents = [{"kind": "base", "name": str(tmp_path / str(number + 1))}] * 10
        ours(tmp_path / str(number), parents, f"{number}")
    assert len(show(identify(tmp_path / "0")).splitlines()) < 250


def test_another_artefact_at_a_parents_path_is_not_followed(tmp_path):
    ours(tmp_path / "old", [{"kind": "base", "name": "wrong"}], "9" * 64)
    ours(tmp_path / "new", [{"kind": "base", "name": str(tmp_path / "old"), "fingerprint": "1" * 64}], "3" * 64)
    ancestor = identify(tmp_path / "new").lineage()[0]
    assert (ancestor.parents, ancestor.note) == ([], "something else lies there now")
