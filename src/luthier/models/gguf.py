"""A GGUF file as a trainable model: its blocks unpacked into a plain dense transformers model.

Transformers regards what it read from a GGUF as quantised, even after unpacking: it refuses to train and to save
it. The traces of that are removed here, so that the model is one like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from luthier.errors import ArtifactError, RequestError
from luthier.models.coverage import check_coverage
from luthier.models.gguf_header import GgufHeader
from luthier.models.source import BaseSource


def gguf_config(source: BaseSource, header: GgufHeader) -> PreTrainedConfig:
    """The config that the file's metadata amount to; RequestError for an architecture that cannot be opened."""
    assert source.path is not None
    try:
        config = AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise RequestError(
            f"{source.name} is a GGUF of architecture {header.architecture!r}, which transformers does not open ({error}).",
            code="gguf-architecture",
            where="model.path",
            remedy="Give the model's folder in transformers format instead.",
        ) from error
    config.name_or_path = ""
    return config


def open_gguf(
    source: BaseSource, header: GgufHeader, config: PreTrainedConfig, dtype: torch.dtype, options: dict[str, Any]
) -> PreTrainedModel:
    """Reads and unpacks the weights in `dtype`; raises ArtifactError where they do not cover the model."""
    assert source.path is not None
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.path.parent,
            config=config,
            gguf_file=source.path.name,
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ArtifactError(
            f"this GGUF file ({header.architecture}) could not be unpacked: {error}",
            code="broken-gguf",
            where=source.name,
            remedy="Get the file again, or give the model's folder in transformers format.",
        ) from error
    check_coverage(loading, source.name)
    _forget_quantisation(model)
    return model


def _forget_quantisation(model: PreTrainedModel) -> None:
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"):
        if name in model.__dict__:
            delattr(model, name)
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    model.config.name_or_path = ""
    model.name_or_path = ""
