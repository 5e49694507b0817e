"""Opening a base: a folder, a hub id or a GGUF file in, a model with its tokenizer out, or an error; never random weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from luthier.artifacts.ahead import read_ahead
from luthier.artifacts.gguf_header import GgufHeader, read_gguf_header
from luthier.artifacts.templates import check_template
from luthier.config.schema import ModelConfig
from luthier.data.template import end_token
from luthier.errors import ArtifactError, RequestError
from luthier.models import hub
from luthier.models.base_files import own_state
from luthier.models.check_folder import check_config, check_folder, read_json, weight_files
from luthier.models.coverage import check_coverage
from luthier.models.gguf import gguf_config, open_gguf
from luthier.models.gguf_tokenizer import open_gguf_tokenizer
from luthier.models.precision import dtype_of, form_of, resolve_precision
from luthier.models.quantised import existing
from luthier.models.quantised.choose import Choice
from luthier.models.quantised.existing import is_existing
from luthier.models.quantised.layer import quantised_layers
from luthier.models.quantised.loading import on_the_fly, quantise_model
from luthier.models.quiet import quiet
from luthier.models.settings import check_attention, set_dropout
from luthier.models.source import BaseSource, find_source
from luthier.models.template import set_padding, set_template
from luthier.models.vocabulary import add_tokens, make_rows

__all__ = ["Base", "BaseSource", "Vocabulary", "open_base", "open_tokenizer", "open_vocabulary", "resolve_precision"]


@dataclass
class Base:
    """A base model in evaluation mode with its tokenizer.

    Attributes:
        model: in its precision, on its device; nothing about it tells what file format it came from.
        tokenizer: with the run's template and new tokens, padding on the right.
        source: where it came from; `source.name` and `source.revision` are what an adapter should name.
        new_token_ids: ids of the tokens that were added, whose embedding rows are to be trained.
        differs: plain libraries would not find this model at the source (a GGUF, a vocabulary that grew), so it has to be
            written once as a folder that an adapter can name.
        notes: what was decided on the way and the user should know, one sentence each.
        choice: which layers were quantised; None for a base in 16 or 32 bits, or one that was opened quantised.
    """

    model: PreTrainedModel
    tokenizer: Any
    source: BaseSource
    new_token_ids: tuple[int, ...] = ()
    differs: bool = False
    notes: list[str] = field(default_factory=list)
    choice: Choice | None = None


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with the run's template and new tokens.

    Attributes:
        tokenizer: None only where a folder truly has none and whoever opens it can do without.
        new_token_ids: ids of the tokens that were added.
        notes: what was decided on the way and the user should know.
    """

    tokenizer: Any
    new_token_ids: tuple[int, ...]
    notes: tuple[str, ...]


def open_base(
    model: ModelConfig,
    *,
    device: str | torch.device = "cpu",
    vocabulary: Vocabulary | None = None,
    own_layers: bool = False,
) -> Base:
    """Opens a base model on `device`, in its precision, with its tokenizer; the same in evaluation mode every time.

    Args:
        vocabulary: what `open_vocabulary` gave for the same `model`, where that was needed before the weights.
        own_layers: hold a model that bitsandbytes quantised in layers of ours, which LoRA trains on and which can be saved;
            else it is as transformers opens it.

    Raises:
        RequestError: there is no such model, it needs code of its own, is quantised in another way, or a setting does not fit it.
        ArtifactError: a file is missing, cut off or damaged, or the tensors found are not the ones expected.
    """
    if model.attention is not None:
        check_attention(model.attention)
    found = _find(model)
    config = _config(model, found)
    vocabulary = vocabulary or _vocabulary(model, found)
    tokenizer, ids = vocabulary.tokenizer, vocabulary.new_token_ids
    if model.dropout is not None:
        set_dropout(config, model.dropout)
    options: dict[str, Any] = {"device_map": {"": torch.device(device)}}
    if model.attention is not None:
        options["attn_implementation"] = model.attention
    packed = is_existing(config)
    dtype = _dtype_beside(config, model) if packed else dtype_of(model, device)
    form = form_of(model)
    folder = found.source.path if found.source.kind == "folder" else None
    state = own_state(folder) if folder is not None and not packed else None
    streams = form is not None and found.header is None
    if form is not None and streams:
        options["quantization_config"] = on_the_fly(form, model.keep_16bit)
    ahead = read_ahead(weight_files(folder)) if streams and folder is not None and state is None else nullcontext()
    with quiet(), ahead:
        if found.header is not None:
            loaded = open_gguf(found.source, found.header, config, dtype, options)
        elif state is not None:
            loaded = _from_state(found.source, state, config, dtype, options)
        else:
            loaded = _load(model, found.source, config, dtype, options)
    if packed and own_layers:
        existing.check_order(weight_files(folder) if folder is not None else ())
        existing.own_layers(loaded, found.source.name)
    loaded.config.dtype = dtype
    choice = options["quantization_config"].choice if streams else None
    if form is not None and not streams:
        choice = quantise_model(loaded, form, model.keep_16bit)
    if form == "fp8" and model.fp8 == "compute":
        for layer in quantised_layers(loaded):
            layer.multiplies = "fp8"
    grown = make_rows(loaded, ids)
    if tokenizer is not None:
        _set_generation(loaded, tokenizer)
    differs = grown or found.source.kind == "gguf" or state is not None
    notes = [*vocabulary.notes, *(choice.notes if choice else ())]
    return Base(loaded, tokenizer, found.source, ids, differs, notes, choice)


def _dtype_beside(config: PreTrainedConfig, model: ModelConfig) -> torch.dtype:
    """The dtype of what is not quantised in a quantised model: the folder's own."""
    if model.precision is not None:
        raise existing.own_precision(model.path)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def open_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Opens a base's tokenizer with the run's template and new tokens applied; no weights are read."""
    return open_vocabulary(model).tokenizer


def open_vocabulary(model: ModelConfig) -> Vocabulary:
    """Opens a base's tokenizer as `open_tokenizer` does, with what `open_base` needs to know of it."""
    return _vocabulary(model, _find(model, weights=False))


def locate_base(model: ModelConfig) -> BaseSource:
    """Says where a base lies: a folder's weights are checked to be there and whole, none is read.

    Raises:
        RequestError, ArtifactError: as `open_base`, where no weights have to be read to see it.
    """
    return _find(model).source


def open_config(model: ModelConfig) -> PreTrainedConfig:
    """Opens a base's config as transformers understands it; no weights are read."""
    return _config(model, _find(model, weights=False))


@dataclass(frozen=True)
class _Found:
    source: BaseSource
    header: GgufHeader | None


def _find(model: ModelConfig, *, weights: bool = True) -> _Found:
    source = find_source(model)
    if source.kind == "gguf":
        assert source.path is not None
        return _Found(source, read_gguf_header(source.path))
    if source.kind == "hub":
        source, config = hub.fetch_config(source)
    else:
        assert source.path is not None
        config = check_folder(source.path) if weights else _plain_config(source)
    check_config(config, source.name, trust_remote_code=model.trust_remote_code)
    return _Found(source, None)


def _plain_config(source: BaseSource) -> dict[str, Any]:
    assert source.path is not None
    return read_json(source.path / "config.json")


def _config(model: ModelConfig, found: _Found) -> PreTrainedConfig:
    if found.header is not None:
        return gguf_config(found.source, found.header)
    return AutoConfig.from_pretrained(
        _address(found.source), revision=_revision(found.source), trust_remote_code=model.trust_remote_code
    )


def _vocabulary(model: ModelConfig, found: _Found) -> Vocabulary:
    notes: list[str] = []
    if found.header is not None:
        tokenizer, notes = open_gguf_tokenizer(found.source, found.header)
    else:
        tokenizer = _load_tokenizer(model, found.source)
    ids = add_tokens(tokenizer, model.new_tokens)
    known = [token for token in model.new_tokens if tokenizer.convert_tokens_to_ids(token) not in ids]
    if known:
        notes.append(f"In the vocabulary already, so not added: {', '.join(known)}.")
    if model.template is not None:
        set_template(tokenizer, model.template)
    padding = set_padding(tokenizer)
    return Vocabulary(tokenizer, ids, (*notes, *([padding] if padding else [])))


def _load_tokenizer(model: ModelConfig, source: BaseSource) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _address(source), revision=_revision(source), trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        if source.kind == "hub" and isinstance(error, OSError):
            raise hub.explain(error, source) from error
        if "trust_remote_code" in str(error):
            raise RequestError(
                f"the tokenizer of {source.name} needs Python code of its own.",
                code="needs-remote-code",
                where="model.trust_remote_code",
                remedy="Read that code; if you trust it, set model.trust_remote_code: true.",
            ) from error
        raise ArtifactError(
            f"its tokenizer cannot be opened: {error}",
            code="no-tokenizer",
            where=source.name,
            remedy="Put the model's tokenizer files (tokenizer.json, tokenizer_config.json) into the folder.",
        ) from error
    check_template(tokenizer.chat_template, source.name)
    for name in ("is_local", "local_files_only"):  # how it was found would be saved with it
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _load(
    model: ModelConfig, source: BaseSource, config: PreTrainedConfig, dtype: torch.dtype, options: dict[str, Any]
) -> PreTrainedModel:
    try:
        # Mismatched sizes are let through here so that `check_coverage` reports them with the rest.
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            _address(source),
            revision=_revision(source),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise RequestError(
            f"{error}", code="missing-package", where="model.attention" if model.attention else "model.path"
        ) from error
    except OSError as error:
        if source.kind == "hub":
            raise hub.explain(error, source) from error
        raise ArtifactError(f"cannot be opened: {error}", code="unreadable", where=source.name) from error
    check_coverage(loading, source.name)
    return loaded


def _from_state(
    source: BaseSource,
    state: dict[str, torch.Tensor],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> PreTrainedModel:
    """Opens from tensors at hand, with transformers' own conversions, as if the files had held them so."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise RequestError(
            f"{source.name} needs code of its own, and its files can't be read as they are.",
            code="pickle-only",
            where="model.path",
            remedy="Convert it once in an environment you trust: load it with transformers and call save_pretrained.",
        )
    loaded, loading = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )  # fmt: skip
    check_coverage(loading, source.name)
    assert source.path is not None
    if (source.path / "generation_config.json").is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(source.path)
    loaded.name_or_path = loaded.config.name_or_path = str(source.path)
    return loaded


def _address(source: BaseSource) -> str:
    return source.name if source.kind == "hub" else str(source.path)


def _revision(source: BaseSource) -> str | None:
    return source.revision if source.kind == "hub" else None


def _set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets generation stop where a turn ends, and pad with the tokenizer's padding token."""
    generation = model.generation_config
    if generation is None:
        return
    ends = generation.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    for end in (tokenizer.eos_token_id, end_token(tokenizer)):
        if end is not None and end not in ends:
            ends.append(end)
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
