"""Opening a saved adapter on its base, with nothing missing and nothing left over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from luthier.artifacts.names import PEFT, copies, renamed
from luthier.artifacts.tensorfile import Place, read_header
from luthier.errors import ArtifactError
from luthier.models import expert_adapter
from luthier.models.adapter_names import check_name
from luthier.models.coverage import grouped
from luthier.models.open import Base
from luthier.models.pickles import read_pickle
from luthier.models.quantised.adapter import is_quantised, register
from luthier.models.quiet import no_deprecations

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
CONFIG = "adapter_config.json"
_NEEDS_WEIGHTS = ("SHADOW",)  # copies layers of the base when it is put on, so it cannot be put on empty
_FROZEN_PROMPTS = {"CARTRIDGE": "frozen_", "CPT": "embedding."}  # what these keep as it was while the rest trains


def open_adapter(base: Base, folder: Path, *, trainable: bool, name: str = "default") -> tuple[PeftModel, Any]:
    """Put the adapter in a folder on an opened base, or onto one that carries adapters already.

    Args:
        trainable: exactly what was trained trains again; else nothing does.
        name: what the adapter is called in memory.

    Returns:
        The peft model, in training mode if trainable, and the tokenizer: the adapter's own, else the base's.

    Raises:
        RequestError: its file wants more than tensors, or peft cannot hold such a name.
        ArtifactError: the adapter's tensors are not the ones its config asks for on this base, or nothing would train.
    """
    check_name(name, str(folder))
    tokenizer = tokenizer_of(base, folder)
    config = _config(folder)
    with _plain_folder(folder, prompts=config.is_prompt_learning, model=base.model) as plain:
        config = _config(plain)
        places = read_header(plain / WEIGHTS)[0]
        _check_whole_modules(config, places, folder)
        alone = not isinstance(base.model, PeftModel)
        if alone:
            _fit(base, plain / WEIGHTS, config, tokenizer)
        model = _attach(base, plain, folder, config, trainable=trainable, name=name)
        _check_coverage(model, plain / WEIGHTS, folder, name)
    _set_training(model, config, name, trainable=trainable, alone=alone)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if trainable and count == 0:
        raise ArtifactError("no parameter of this adapter would train.", code="nothing-trains", where=str(folder))
    return model.train(trainable), tokenizer


def _set_training(model: PeftModel, config: PeftConfig, name: str, *, trainable: bool, alone: bool) -> None:
    """What peft leaves as it pleases: it opens prompts for use only, and yet with gradients, and some layers too."""
    if config.is_prompt_learning:
        config.inference_mode = not trainable
        frozen = _FROZEN_PROMPTS.get(str(getattr(config.peft_type, "value", config.peft_type)), "\0")
        for key, parameter in model.prompt_encoder[name].named_parameters():
            parameter.requires_grad_(trainable and not key.startswith(frozen))
    if alone and not trainable:
        model.requires_grad_(False)


def _config(folder: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ArtifactError(
            f"its {CONFIG} cannot be read: {' '.join(str(error).split())[:200]}",
            code="adapter-config",
            where=str(folder / CONFIG),
            remedy="Get the file again, or install a newer peft if its method is a newer one.",
        ) from error


def fit_vocabulary(base: Base, folder: Path) -> None:
    """Give a base the rows that an adapter was trained with, before it is put on; ``base.differs`` then says so.

    peft writes a resized embedding and head beside the adapter, and plain libraries can't put such an adapter on the base
    as it was.

    Raises: as `open_adapter`.
    """
    config = _config(folder)
    with _plain_folder(folder, prompts=config.is_prompt_learning, model=base.model) as plain:
        _fit(base, plain / WEIGHTS, config, tokenizer_of(base, folder))


def _fit(base: Base, path: Path, config: PeftConfig, tokenizer: Any) -> None:
    model: Any = base.model
    held = model.get_input_embeddings().weight.shape[0]
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    with safe_open(path, "pt") as file:
        there = set(file.keys())
        own = [name for name in names if f"{PEFT}{name}.weight" in there]
        rows = max(held, len(tokenizer) if tokenizer is not None else 0)
        if own:
            rows = file.get_slice(f"{PEFT}{own[0]}.weight").get_shape()[0]
        if rows == held:
            return
        model.resize_token_embeddings(rows, mean_resizing=False)
        base.differs = True
        whole = set(getattr(config, "modules_to_save", None) or ())
        for name in own:
            frozen = f"{PEFT}{name}.original_module.weight"
            if frozen in there or name.rpartition(".")[2] not in whole:
                weight = file.get_tensor(frozen if frozen in there else f"{PEFT}{name}.weight")
                with torch.no_grad():
                    model.get_submodule(name).weight.copy_(weight)


def _check_whole_modules(config: PeftConfig, places: Mapping[str, Place], folder: Path) -> None:
    """peft fails in its own code where a module that was trained whole is not in the file."""
    lost = [
        module
        for module in getattr(config, "modules_to_save", None) or ()
        if not any(f".{module}." in name for name in places)
    ]
    if lost:
        raise ArtifactError(
            f"modules_to_save in {CONFIG} names {', '.join(lost)}, and the weights hold none of it.",
            code="coverage",
            where=str(folder),
            remedy="Use another checkpoint, or save the adapter again from the run; without it the base's own would be used.",
        )


def _attach(base: Base, plain: Path, folder: Path, config: PeftConfig, *, trainable: bool, name: str) -> PeftModel:
    trains = trainable and not config.is_prompt_learning
    empty_first = config.peft_type not in _NEEDS_WEIGHTS
    register(config, base.model)
    try:
        with no_deprecations():
            if isinstance(base.model, PeftModel):
                if is_quantised(base.model):  # peft would read the config again, without what is registered in it
                    config.inference_mode = not trains
                    base.model.add_adapter(name, config, low_cpu_mem_usage=True)
                    if trains:
                        base.model.set_requires_grad(name)
                base.model.load_adapter(str(plain), name, is_trainable=trains, low_cpu_mem_usage=empty_first)
                return base.model
            return PeftModel.from_pretrained(
                base.model,
                str(plain),
                adapter_name=name,
                is_trainable=trains,
                low_cpu_mem_usage=empty_first,
                config=config,
            )
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise ArtifactError(
            f"peft cannot put this adapter on {base.source.name}: {' '.join(str(error).split())[:300]}",
            code="adapter-does-not-fit",
            where=str(folder),
            remedy="Give the base it was trained on: luthier.load(path, base=…).",
        ) from error


@contextmanager
def _plain_folder(folder: Path, *, prompts: bool, model: Any) -> Iterator[Path]:
    """A folder that peft reads rightly: the adapter's own, or a passing copy with canonical names as safetensors."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    path = folder / WEIGHTS
    if path.is_file():
        plain = {} if prompts else renamed(read_header(path)[0], adapter=True, where=str(path))
        if all(old == new for old, new in plain.items()) and not expert_adapter.are_single(plain.values(), inner):
            yield folder
            return
        tensors = load_file(path)
    elif (folder / PICKLE).is_file():
        tensors = read_pickle(folder / PICKLE)
    else:
        raise ArtifactError(
            f"the adapter's weights, {WEIGHTS} or {PICKLE}, are not there.",
            code="file-missing",
            where=str(folder),
            remedy="Get the file.",
        )
    if not prompts:
        plain = renamed(tensors, adapter=True, where=str(folder))
        tensors = {plain[name]: tensor for name, tensor in tensors.items() if name in plain}
    with TemporaryDirectory(prefix="luthier-") as passing:
        if not prompts and expert_adapter.are_single(tensors, inner):
            tensors, changed = expert_adapter.fuse(tensors, folder / CONFIG, inner)
            (Path(passing) / CONFIG).write_text(json.dumps(changed))
        else:
            shutil.copyfile(folder / CONFIG, Path(passing) / CONFIG)
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, Path(passing) / WEIGHTS)
        yield Path(passing)


def tokenizer_of(base: Base, folder: Path) -> Any:
    """The tokenizer that lies with an adapter, which has the template it was trained with; else the base's."""
    from transformers import AutoTokenizer

    has_own = (folder / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_own else base.tokenizer


def _check_coverage(model: PeftModel, path: Path, folder: Path, name: str) -> None:
    """peft only warns when names don't match, and says nothing of a tensor it did not take over; here both are errors."""
    live = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    found = load_file(path)
    second = copies(found)
    frozen = model.state_dict()  # peft writes a resized vocabulary's embedding and head beside the adapter
    live |= {key: frozen[key] for key in found.keys() - live.keys() - second if key in frozen}
    missing, strange = sorted(live.keys() - found.keys()), sorted(found.keys() - live.keys() - second)
    lost = sorted(
        key
        for key in live.keys() & found.keys()
        if not torch.equal(live[key].detach().cpu(), found[key].to(live[key].dtype))
    )
    lost += sorted(key for key in second if (whole := key.replace(".modules_to_save.", ".")) in found and not torch.equal(found[whole], found[key]))  # fmt: skip
    groups = ((missing, "missing"), (strange, "not expected"), (lost, "not taken over"))
    said = [f"{len(keys)} {what}: {grouped(keys)}" for keys, what in groups if keys]
    if said:
        raise ArtifactError(
            f"the adapter's tensors are not the ones its config asks for on this base: {'; '.join(said)}.",
            code="coverage",
            where=str(folder),
            remedy="Give the base it was trained on, or save the adapter again from the run.",
        )
