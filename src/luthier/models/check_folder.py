"""Checking a transformers folder before anything of it is loaded: readable, whole, plain, and free of code to run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from luthier.artifacts.files import inside
from luthier.artifacts.tensorfile import check_length, read_header
from luthier.config.schema import three_words
from luthier.errors import ArtifactError, RequestError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES_INDEX = "pytorch_model.bin.index.json"
PICKLE = "pytorch_model.bin"
_LFS = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; raises ArtifactError with file, line and column."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}.", code="unreadable", where=str(path)) from error
    except ValueError as error:
        raise ArtifactError(
            f"is no valid JSON: {error}.", code="broken-json", where=str(path), remedy="Get the file again."
        ) from error
    if not isinstance(content, dict):
        raise ArtifactError("holds no JSON object.", code="broken-json", where=str(path), remedy="Get the file again.")
    return content


def check_config(config: dict[str, Any], name: str, *, trust_remote_code: bool) -> None:
    """Raises RequestError for a model that needs code of its own, is quantised by another tool than bitsandbytes, or is no causal language model.

    Code that a folder brings along is of no concern where transformers has the architecture itself: its own is used.
    """
    model_type = config.get("model_type")
    if not model_type:
        raise RequestError(
            f"{name} has a config.json without `model_type`, so it is not a model in transformers format.",
            code="not-a-model",
            where="model.path",
            remedy="Convert it to transformers format first (transformers brings convert_*_to_hf.py scripts).",
        )
    known = model_type in CONFIG_MAPPING_NAMES and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not known and not trust_remote_code:
        if config.get("auto_map"):
            code = ", ".join(sorted(str(value) for value in config["auto_map"].values()))
            raise RequestError(
                f"{name} needs Python code of its own ({code}): transformers has no causal language model {model_type!r}.",
                code="needs-remote-code",
                where="model.trust_remote_code",
                remedy="Read that code; if you trust it, set model.trust_remote_code: true. A newer transformers may need none.",
            )
        if model_type not in CONFIG_MAPPING_NAMES:
            raise RequestError(
                f"{name} is of type {model_type!r}, which this version of transformers does not know, and brings no code along.",
                code="needs-remote-code",
                where="model.path",
                remedy="Install a newer transformers.",
            )
        raise RequestError(
            f"{name} is of type {model_type!r}, which is no causal language model.",
            code="not-causal",
            where="model.path",
            remedy=f"Give a model that {AutoModelForCausalLM.__name__} opens.",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        if method == "bitsandbytes":
            if importlib.util.find_spec("bitsandbytes") is not None:
                return
            raise RequestError(
                f"{name} was quantised by bitsandbytes, which is not installed.",
                code="missing-package",
                where="model.path",
                remedy="pip install bitsandbytes",
            )
        raise RequestError(
            f"{name} holds quantised weights ({method}).",
            code="quantised-base",
            where="model.path",
            remedy="Give the unquantised model (bf16, fp16 or fp32), or a GGUF file, which is unpacked.",
        )


def check_folder(folder: Path) -> dict[str, Any]:
    """Checks that every weight file is there and whole, by header and length, and returns the config.

    Raises:
        ArtifactError: a file is missing, cut off, or disagrees with the index; it names the file.
        RequestError: the folder holds no safetensors files, or an adapter beside the model.
    """
    config = read_json(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise RequestError(
            f"{folder} holds both a model and an adapter; transformers would attach that adapter without a word.",
            code="adapter-in-base",
            where="model.path",
            remedy=f"Move adapter_config.json and adapter_model.safetensors into a folder of their own. {three_words(str(folder))}",
        )
    pickles = pickle_files(folder)
    for file, names in ({name: set[str]() for name in pickles} if pickles else _weight_files(folder)).items():
        _check_file(inside(folder, file), names)
    return config


def pickle_files(folder: Path) -> list[str]:
    """Names of torch's own weight files, where the folder has these and no safetensors; read as data only."""
    if any((folder / name).is_file() for name in (INDEX, SINGLE)) or any(folder.glob("model-*-of-*.safetensors")):
        return []
    if (folder / PICKLES_INDEX).is_file():
        files = read_json(folder / PICKLES_INDEX).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise ArtifactError(
                "has no weight_map.",
                code="broken-index",
                where=str(folder / PICKLES_INDEX),
                remedy="Get the file again.",
            )
        return sorted(set(files.values()))
    return [PICKLE] if (folder / PICKLE).is_file() else []


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`; raises as `check_folder` does."""
    return [folder / name for name in _weight_files(folder)]


def _weight_files(folder: Path) -> dict[str, set[str]]:
    """File name to the tensors that the index expects in it; an empty set where there is no index."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        expected: dict[str, set[str]] = {}
        for tensor, file in index.get("weight_map", {}).items():
            expected.setdefault(file, set()).add(tensor)
        if not expected:
            raise ArtifactError(
                "has no weight_map.", code="broken-index", where=str(folder / INDEX), remedy="Get the file again."
            )
        return dict(sorted(expected.items()))
    if (folder / SINGLE).is_file():
        return {SINGLE: set()}
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        raise ArtifactError(
            f"{INDEX} is missing, and {len(shards)} shards lie there ({shards[0].name}, …).",
            code="missing-index",
            where=str(folder),
            remedy=f"Get {INDEX} from where the shards came from.",
        )
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        raise RequestError(
            f"{folder} holds its weights as pickle files only ({pickles[0].name}); opening those can run code.",
            code="pickle-only",
            where="model.path",
            remedy="Convert it once in an environment you trust: load it with transformers and call save_pretrained.",
        )
    raise ArtifactError(
        f"there is no {SINGLE} and no {INDEX}.",
        code="no-weights",
        where=str(folder),
        remedy="Fetch the weights; a clone without Git LFS, or an interrupted download, leaves them out.",
    )


def _check_file(path: Path, expected: set[str]) -> None:
    if not path.is_file():
        raise ArtifactError(
            "is named in the index and is not there.",
            code="missing-shard",
            where=str(path),
            remedy="Fetch that file; the download was probably interrupted.",
        )
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ArtifactError(
                "is a Git LFS pointer, not the weights.",
                code="lfs-pointer",
                where=str(path),
                remedy="Run `git lfs pull` in that folder.",
            )
    if path.suffix != ".safetensors":
        return
    check_length(path)
    missing = expected - read_header(path)[0].keys()
    if missing:
        raise ArtifactError(
            f"lacks {len(missing)} tensors that the index places there, {min(missing)} first.",
            code="broken-index",
            where=str(path),
            remedy="Get the folder again; files of two versions were mixed.",
        )
