"""``--to transformers`` from what torch.distributed.checkpoint and torch.save left, compared with torch's own readers."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import luthier
from luthier.cli import main
from luthier.export.sharded import source as source_module

SAVER = Path(__file__).with_name("save_sharded.py")


def save_sharded(work: Path, model: Path, world: int, *forms: str, **options: bool) -> dict[str, Path]:
    """Real saves of ``model`` by ``world`` processes, one a form."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outs = {form: work / ("fine-tuned-meta-llama/tiny" if form == "cookbook" else form) for form in forms}
    request = {"model": str(model), "world": world, "port": port, **options}
    request["saves"] = [{"form": form, "out": str(out)} for form, out in outs.items()]
    work.mkdir(parents=True, exist_ok=True)
    (work / "request.json").write_text(json.dumps(request))
    subprocess.run([sys.executable, str(SAVER), str(work / "request.json")], check=True, capture_output=True)
    if "cookbook" in outs:
        (outs["cookbook"] / "train_params.yaml").write_text("model_name: meta-llama/Llama-tiny-not-here\nlr: '0.0001'\n")  # fmt: skip
    return outs


def without_weights(model: Path, folder: Path) -> Path:
    """A base as people have it where the weights never were: config, tokenizer, processor."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("model") / "model", dtype=torch.bfloat16, tie=False, vocab=321)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory) -> Path:
    return without_weights(model, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("saved")
    return save_sharded(work, model, 3, "cookbook", "flat", "stateful", "hf", optimizer=True)


def by_torch(folder: Path, work: Path) -> dict[str, torch.Tensor]:
    """What torch's own converter reads from the folder."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, work / "by_torch.pt")
    content = torch.load(work / "by_torch.pt", weights_only=True)
    while "model" in content or "app" in content:
        content = content.get("model", content.get("app"))
    return content


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cookbook", "flat", "stateful", "hf"])
def test_sharded_checkpoint_becomes_the_folder_that_torch_would_read(form, saved, base, tmp_path, capsys):
    assert main(["export", str(saved[form]), str(tmp_path / "out"), "--to", "transformers", "--base", str(base), "--dtype", "fp32"]) == 0  # fmt: skip
    told = capsys.readouterr().out
    wanted, found = by_torch(saved["cookbook"], tmp_path), weights_of(tmp_path / "out")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    proof = json.loads((tmp_path / "out/proof.json").read_text())
    assert proof["passed"] and proof["compared"].startswith(f"{len(wanted)} tensors")
    assert ("entries left out" in told) == (form in ("cookbook", "stateful"))
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_dtype_is_the_bases_and_the_base_may_be_named_by_the_training(saved, base, model, tmp_path, capsys):
    copy = shutil.copytree(saved["cookbook"], tmp_path / "copy")
    assert main(["export", str(copy), str(tmp_path / "out"), "--to", "transformers"]) == 2
    assert "meta-llama/Llama-tiny-not-here, which is not on this machine" in capsys.readouterr().err
    (copy / "train_params.yaml").write_text(f"model_name: {base}\n")
    luthier.export(copy, tmp_path / "out", to="transformers", shard_size="40KB")
    wanted = {name: tensor.bfloat16() for name, tensor in by_torch(copy, tmp_path).items()}
    found = weights_of(tmp_path / "out")
    assert wanted.keys() == found.keys() and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.slow
def test_folder_that_is_not_what_torch_reads_is_not_published(saved, base, tmp_path, monkeypatch):
    """Two matrices of one shape under each other's names: whole, finite, and wrong."""

    def exchanged(weights):
        source, names, left = true_open(weights)
        one, other = (f"model.layers.0.mlp.{which}_proj.weight" for which in ("gate", "up"))
        blocks = source._blocks
        blocks[names[one]], blocks[names[other]] = blocks[names[other]], blocks[names[one]]
        return source, names, left

    true_open = source_module._open
    monkeypatch.setattr(source_module, "_open", exchanged)
    refused(saved["flat"], base, tmp_path / "out", "2 tensors differ from what torch reads", "gate_proj")


@pytest.fixture(scope="module")
def other(model, tmp_path_factory) -> dict[str, Path]:
    """The same model by another number of ranks."""
    return save_sharded(tmp_path_factory.mktemp("other"), model, 2, "flat", "hf")


def refused(folder: Path, base: Path, out: Path, *said: str) -> None:
    with pytest.raises(luthier.ArtifactError) as raised:
        luthier.export(folder, out, to="transformers", base=base)
    assert all(text in str(raised.value) for text in said), raised.value
    assert not out.exists() and not list(out.parent.glob(".partial*"))


def test_missing_shard_is_named_with_the_tensor_and_range_it_holds(saved, base, tmp_path):
    copy = shutil.copytree(saved["flat"], tmp_path / "copy")
    (copy / "__1_0.distcp").unlink()
    refused(copy, base, tmp_path / "out", "__1_0.distcp is missing", "model.", "[107:214, 0:32] of model.embed_tokens.weight")  # fmt: skip
    copy = shutil.copytree(saved["hf"], tmp_path / "copy_hf")
    next(copy.glob("shard-00002*")).unlink()
    refused(copy, base, tmp_path / "out", "file of rank 2 is missing", "lies in no file")


def test_cut_shard_is_named_with_the_tensor_and_range(saved, base, tmp_path):
    copy = shutil.copytree(saved["flat"], tmp_path / "copy")
    data = (copy / "__2_0.distcp").read_bytes()
    (copy / "__2_0.distcp").write_bytes(data[: len(data) // 2])
    refused(copy, base, tmp_path / "out", "__2_0.distcp ends at byte", "reaches to byte", "] of ")


@pytest.mark.slow
def test_missing_last_rank_of_files_without_metadata_shows_against_the_architecture(saved, base, tmp_path):
    copy = shutil.copytree(saved["hf"], tmp_path / "copy")
    next(copy.glob("shard-00003*")).unlink()
    refused(copy, base, tmp_path / "out", "[214:321, 0:32]", "lies in no file")


def test_files_of_two_saves_by_other_numbers_of_ranks_are_told_apart(saved, other, base, tmp_path):
    copy = shutil.copytree(other["flat"], tmp_path / "copy")
    shutil.copy(saved["flat"] / "__2_0.distcp", copy)
    refused(copy, base, tmp_path / "out", "__2_0.distcp is in no line of .metadata", "another number of ranks")
    (copy / "__2_0.distcp").unlink()
    shutil.copy(saved["flat"] / "__1_0.distcp", copy)  # under the name of one that belongs there
    refused(copy, base, tmp_path / "out", "__1_0.distcp")
    mixed = shutil.copytree(other["hf"], tmp_path / "mixed")
    for path in saved["hf"].glob("shard-00003*"):
        shutil.copy(path, mixed)
    refused(mixed, base, tmp_path / "out", "overlaps", "two saves", "shard-00003")


def test_block_of_another_shape_under_the_right_name_is_a_stranger(saved, base, tmp_path):
    copy = shutil.copytree(saved["flat"], tmp_path / "copy")
    a, b = copy / "__0_0.distcp", copy / "__2_0.distcp"  # the last rank has fewer rows
    size = max(a.stat().st_size, b.stat().st_size)
    a.write_bytes(b.read_bytes().ljust(size, b"\0"))
    refused(copy, base, tmp_path / "out", "__0_0.distcp", "another save")


def rewritten(folder: Path, change) -> None:
    """Change what .metadata says, with the classes it is of."""
    import pickle

    content = pickle.loads((folder / ".metadata").read_bytes())
    change(content)
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def test_hole_and_overlap_in_the_description_are_named(saved, base, tmp_path):
    from torch.distributed.checkpoint.metadata import MetadataIndex

    def hole(content):
        del content.state_dict_metadata["model.norm.weight"].chunks[1]
        content.storage_data.pop(MetadataIndex("model.norm.weight", (11,)))

    def overlap(content):
        chunk = content.state_dict_metadata["model.norm.weight"].chunks[1]
        info = content.storage_data.pop(MetadataIndex("model.norm.weight", chunk.offsets))
        chunk.offsets = torch.Size((9,))
        content.storage_data[MetadataIndex("model.norm.weight", chunk.offsets)] = info

    def unplaced(content):
        content.storage_data.pop(MetadataIndex("model.norm.weight", (11,)))

    for change, said in ((hole, "[11:22] of model.norm.weight"), (overlap, "overlaps [0:11]"), (unplaced, "[11:22] of model.norm.weight")):  # fmt: skip
        copy = shutil.copytree(saved["flat"], tmp_path / change.__name__)
        rewritten(copy, change)
        refused(copy, base, tmp_path / "out", said)


def test_metadata_that_wants_more_than_a_description_is_refused_and_nothing_runs(saved, base, tmp_path):
    class Evil:
        def __reduce__(self):
            import os

            return os.mkdir, (str(tmp_path / "owned"),)

    copy = shutil.copytree(saved["flat"], tmp_path / "copy")
    rewritten(copy, lambda content: setattr(content, "planner_data", Evil()))
    with pytest.raises(luthier.RequestError, match="mkdir"):
        luthier.export(copy, tmp_path / "out", to="transformers", base=base)
    assert not (tmp_path / "owned").exists()
    data = (saved["flat"] / ".metadata").read_bytes()
    for cut in (0, 1, 100, len(data) // 2, len(data) - 1):
        (copy / ".metadata").write_bytes(data[:cut])
        refused(copy, base, tmp_path / "out", "cannot be trusted")


@pytest.mark.slow
def test_columns_wrapped_names_and_a_tied_head_come_out_as_the_model_was(tmp_path):
    model = tiny.make_llama(tmp_path / "model", tie=True)
    out = save_sharded(tmp_path / "saved", model, 3, "flat", columns=True, wrapped=True)["flat"]
    made = luthier.export(out, tmp_path / "out", to="transformers", base=without_weights(model, tmp_path / "base"))
    wanted, found = weights_of(model), weights_of(tmp_path / "out")
    assert wanted.keys() == found.keys() and "lm_head.weight" not in found
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert any("written once" in note for note in made.notes)


@pytest.mark.slow
def test_llama_vision_comes_out_with_its_processor(tmp_path):
    model = tiny.make_mllama(tmp_path / "model")
    out = save_sharded(tmp_path / "saved", model, 2, "cookbook")["cookbook"]
    base = without_weights(model, tmp_path / "base")
    made = luthier.export(out.parent, tmp_path / "out", to="transformers", base=base)
    assert made.opens_with == "MllamaForConditionalGeneration.from_pretrained"
    assert json.loads((tmp_path / "out/proof.json").read_text())["passed"]
    from transformers import MllamaForConditionalGeneration

    wanted = MllamaForConditionalGeneration.from_pretrained(model).state_dict()
    found = MllamaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.pt", "consolidated.00.pth"])
def test_state_dict_becomes_a_folder(name, model, base, tmp_path):
    tensors = weights_of(model)
    source = tmp_path / "bare"
    source.mkdir()
    torch.save({"model": {f"module.{name}": t for name, t in tensors.items()}, "epoch": 3}, source / name)
    given = source if name == "model.pt" else source / name
    luthier.export(given, tmp_path / "out", to="transformers", base=base)
    assert json.loads((tmp_path / "out/proof.json").read_text())["passed"]
    found = weights_of(tmp_path / "out")
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n]) for n in tensors)


@pytest.mark.slow
def test_base_of_another_size_is_refused_and_nothing_is_left(saved, tmp_path):
    small = tiny.make_llama(tmp_path / "small", layers=1, tie=False, vocab=321)
    refused(saved["flat"], small, tmp_path / "out", "model.layers.")


def test_metas_own_names_and_adapters_are_refused_by_name(base, tmp_path):
    for name, said in (("layers.0.attention.wq.weight", "Meta's own names"), ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", "adapter")):  # fmt: skip
        torch.save({name: torch.ones(2, 2)}, tmp_path / "consolidated.00.pth")
        with pytest.raises(luthier.RequestError, match=said):
            luthier.export(tmp_path / "consolidated.00.pth", tmp_path / "out", to="transformers", base=base)
