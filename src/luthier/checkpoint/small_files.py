"""The small files beside the weights: configs, tokenizer, template. Rendered once, before the first step."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from luthier.checkpoint.layout import active_adapter, is_adapter
from luthier.models.adapter_names import is_stacked


def small_files(model: nn.Module, tokenizer: Any | None) -> dict[str, bytes]:
    """Render config, generation config, tokenizer and template as a transformers or peft folder holds them.

    The model is not changed: its config is copied before it is given what a saved one needs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if is_adapter(model):
            _adapter_config(model, folder)
            base = model.get_base_model()  # type: ignore[operator]
        else:
            _model_config(model, folder)
            base = model
        generation = getattr(base, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        return _content(folder) | (tokenizer_files(tokenizer) if tokenizer is not None else {})


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Render a tokenizer with its template."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return _content(Path(scratch))


def _content(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _adapter_config(model: Any, folder: Path) -> None:
    stacked = is_stacked(model)
    if stacked:
        from luthier.models.stack import joined_config

        config: Any = joined_config(model)
    else:
        config = copy.deepcopy(model.peft_config[active_adapter(model)])
    config.inference_mode = True
    for name, value in list(vars(config).items()):
        if isinstance(value, set):  # its order differs from process to process, and a resumed run's bytes must not
            setattr(config, name, sorted(value))
    config.save_pretrained(folder)


def _model_config(model: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if getattr(config, "auto_map", None):
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=config)
