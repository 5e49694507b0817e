"""Each attack works on a loader that trusts, and is refused here: by its code, with nothing executed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jinja2 import Environment
from tiny import make_llama
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from luthier.api import export, load
from luthier.artifacts.identify import identify
from luthier.artifacts.show import show
from luthier.artifacts.verify import verify_all
from luthier.errors import ArtifactError, LuthierError, RequestError

ATTACKS = Path(__file__).parents[2] / "attacks"
sys.path.insert(0, str(ATTACKS))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(model, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


def attack(name: str, folder: Path, marker: Path) -> Path:
    return importlib.import_module(name).build(folder, marker)


def asked(folder: Path) -> list[str]:
    """The codes that inspect gives; verify is asked too, and must end."""
    found = identify(folder)
    show(found)
    json.dumps(found.as_dict())
    verify_all(folder)
    return [problem.code for problem in found.problems]


PICKLES = ["pickle_adapter", "pickle_optimizer", "pickle_training_args", "pickle_state_dict"]


@pytest.mark.parametrize("name", PICKLES)
def test_pickle_with_code_runs_for_a_loader_that_trusts(name, tmp_path, marker):
    file = attack(name, tmp_path / "x", marker)
    torch.load(file, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("name", ["pickle_optimizer", "pickle_training_args", "pickle_state_dict"])
def test_pickle_beside_a_model_is_never_opened(name, folder, marker):
    attack(name, folder, marker)
    asked(folder)
    load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_pickle_with_code_is_refused_where_it_is_all_there_is(name, model, tmp_path, marker):
    folder = tmp_path / "x"
    attack(name, folder, marker)
    if name == "pickle_adapter":
        assert "pickle-only" in asked(folder)
    asked(folder)
    with pytest.raises((RequestError, ArtifactError)):
        load(folder, base=model)
    assert not marker.exists()


def test_code_in_a_sharded_checkpoints_metadata_runs_for_torch_and_not_here(model, tmp_path, marker):
    folder = tmp_path / "x"
    attack("pickle_metadata", folder, marker)
    assert asked(folder) == ["pickle-code"]
    with pytest.raises(RequestError, match=r"io\.open"):
        export(folder, tmp_path / "out", to="transformers", base=model)
    assert not marker.exists()
    dcp_to_torch_save(folder, tmp_path / "x.pt")
    assert marker.exists()


def test_pickle_under_a_models_own_name_is_refused(folder, marker):
    (folder / "model.safetensors").unlink()
    attack("pickle_state_dict", folder, marker).rename(folder / "pytorch_model.bin")
    assert "pickle-only" in asked(folder)
    with pytest.raises((RequestError, ArtifactError)):
        load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["index_outside", "symlink_outside"])
def test_file_outside_the_folder_is_not_read(name, folder, marker):
    file = attack(name, folder, marker)
    if name == "index_outside":
        outside = folder / next(iter(json.loads(file.read_text())["weight_map"].values()))
        assert outside.read_bytes().endswith(b"secret")
    else:
        assert file.read_bytes().endswith(b"secret")
    assert "path-escape" in asked(folder)
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert caught.value.code == "path-escape"


def test_overlapping_ranges_multiply_for_a_reader_that_trusts_and_are_refused(folder, marker):
    file = attack("overlapping_ranges", folder, marker)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    body = data[8 + length :]
    read = [body[slice(*entry["data_offsets"])] for entry in json.loads(data[8 : 8 + length]).values()]
    assert sum(map(len, read)) > 20 * len(data)
    assert "broken-file" in asked(folder)
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert caught.value.code == "broken-file"


def test_range_larger_than_any_disk_is_refused_before_anything_is_allocated(folder, marker):
    file = attack("huge_range", folder, marker)
    entry = json.loads(file.read_bytes()[8:])["huge"]
    with pytest.raises((MemoryError, OverflowError)):
        bytearray(entry["data_offsets"][1] - entry["data_offsets"][0])
    assert "broken-file" in asked(folder)
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert caught.value.code == "broken-file"


def test_template_that_escapes_runs_in_plain_jinja_and_is_refused(folder, marker):
    file = attack("template_escape", folder, marker)
    climb = file.read_text().replace("self.", "cycler.").replace(".__builtins__", "['__builtins__']")
    Environment().from_string(climb.replace("].open(", "]['open'](")).render()
    assert marker.exists()
    marker.unlink()
    assert "template-escape" in asked(folder)
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert caught.value.code == "template-escape"
    assert not marker.exists()


def test_template_that_exhausts_passes_the_sandbox_and_is_refused(folder, marker):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    file = attack("template_exhaustion", folder, marker)
    assert int(ImmutableSandboxedEnvironment().from_string(file.read_text()).render()) == 10**8
    assert "template-exhausts" in asked(folder)
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    assert caught.value.code == "template-exhausts"


@pytest.mark.slow
def test_code_that_a_config_names_runs_for_a_loader_that_trusts(folder, marker, tmp_path):
    attack("auto_map", folder, marker)
    script = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
    assert marker.exists()


def test_code_that_a_config_names_is_not_run(folder, marker):
    attack("auto_map", folder, marker)
    assert "brings-code" in asked(folder)
    with pytest.raises(RequestError) as caught:
        load(folder)
    assert caught.value.code == "needs-remote-code"
    assert not marker.exists()


def test_code_that_a_tokenizer_names_is_not_run(folder, marker):
    attack("auto_map_tokenizer", folder, marker)
    assert "brings-code" in asked(folder)
    try:
        load(folder)
    except LuthierError as error:
        assert error.code in ("needs-remote-code", "no-tokenizer")
    assert not marker.exists()


def test_module_that_an_adapter_names_is_not_imported(model, tmp_path, marker, monkeypatch):
    from peft import AutoPeftModel, LoraConfig, get_peft_model

    adapter = tmp_path / "adapter"
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(adapter)
    attack("auto_mapping_adapter", adapter, marker)
    monkeypatch.syspath_prepend(str(adapter))
    with pytest.raises(ValueError, match="import_allowlist"):  # what peft says today; it imported it before
        AutoPeftModel.from_pretrained(adapter)
    importlib.import_module(json.loads((adapter / "adapter_config.json").read_text())["auto_mapping"]["parent_library"])
    assert marker.exists()
    marker.unlink()
    sys.modules.pop("luthier_attack")
    assert "brings-code" in asked(adapter)
    load(adapter, base=model)
    assert not marker.exists()
    assert "luthier_attack" not in sys.modules


def test_aliases_that_multiply_are_refused(tmp_path, marker):
    file = attack("alias_bomb", tmp_path / "run", marker)
    small = importlib.import_module("alias_bomb")
    value = yaml.safe_load(file.read_text().replace(f"*a{small.LEVELS - 1}", "*a3"))
    assert len(json.dumps(value["model"])) > 100 * 400
    assert "run-yaml" in asked_run(tmp_path / "run")
    with pytest.raises(LuthierError):
        load(tmp_path / "run")


def asked_run(folder: Path) -> list[str]:
    found = identify(folder)
    show(found)
    json.dumps(found.as_dict())
    return [problem.code for problem in found.problems]


def test_every_attack_is_listed_and_runs_as_a_script(tmp_path):
    names = sorted(path.stem for path in ATTACKS.glob("*.py") if path.stem != "common")
    assert len(names) >= 12
    readme = (ATTACKS / "README.md").read_text()
    assert [name for name in names if f"`{name}.py`" not in readme] == []
    done = subprocess.run([sys.executable, str(ATTACKS / "index_outside.py"), str(tmp_path / "x")], capture_output=True, text=True, check=True)  # fmt: skip
    assert "index_outside" not in done.stderr
    assert (tmp_path / "x" / "model.safetensors.index.json").is_file()
