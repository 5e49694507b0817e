"""``--to transformers`` from weights without a model's folder around them: sharded checkpoints and bare state dicts.

The weights come from there, everything else (config, tokenizer, processor, dtype) from the base's folder, which needs no
weights. Neither the environment that trained nor its libraries are needed: names are read off the save itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts import names
from luthier.artifacts.identify import identify
from luthier.artifacts.sharded import METADATA, read_sharded
from luthier.artifacts.sharded_model import model_tensors
from luthier.artifacts.tensorfile import TensorSpec
from luthier.checkpoint.dtypes import FROM_FILE
from luthier.config.yaml_text import load as load_yaml
from luthier.errors import ArtifactError, RequestError
from luthier.export import exported_folder as folders
from luthier.export.find_weights import find_weights
from luthier.export.merged.plan import FLOATS
from luthier.export.sharded.distcp import ShardedSource
from luthier.export.source import Source
from luthier.export.stream import Output
from luthier.models.coverage import grouped

KINDS = ("distcp", "state_dict")
PARAMS = "train_params.yaml"  # llama-cookbook's, beside what it saves
_CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_METAS = re.compile(r"layers\.\d+\.(attention\.wq|feed_forward\.w1)\.weight$")
_STEP = 2**24  # elements compared at a time


@dataclass(frozen=True)
class Weights:
    """Where bare weights lie: ``path`` of the kind that `identify` calls it; ``home`` may hold a config and a tokenizer."""

    path: Path
    kind: str
    home: Path


def bare_weights(path: Path) -> Weights | None:
    """The weights that a path means, if they are bare: a sharded folder, one in a Trainer's checkpoint, a state dict.

    Raises:
        ArtifactError: the folder is damaged, as far as names show it.
    """
    found = identify(path)
    if found.kind == "trainer_checkpoint":
        home = Path(str(found.facts.get("weights", path)))
        inner = sorted(child for child in home.iterdir() if (child / METADATA).is_file() and not child.name.startswith("optimizer"))  # fmt: skip
        return Weights(inner[0], "distcp", home) if inner and found.parameters is None else None
    if found.kind == "unknown" and path.is_dir():  # llama-cookbook nests: fine-tuned-meta-llama/Llama-3.2-…
        inner = [child for child in sorted(path.iterdir()) if child.is_dir() and (child / METADATA).is_file()]
        return Weights(inner[0], "distcp", inner[0]) if len(inner) == 1 else None
    if found.kind not in KINDS:
        return None
    return Weights(path, found.kind, path if path.is_dir() else path.parent)


@dataclass
class Plan:
    """What to write: tensors, small files, config, and what was left out and changed."""

    outputs: list[Output]
    small: dict[str, bytes]
    config: dict[str, Any]
    base: Path
    notes: list[str]


@contextmanager
def open_bare(weights: Weights, base: Path | None, dtype: str | None) -> Iterator[Plan]:
    """Open bare weights and plan a transformers folder of them.

    Args:
        base: a folder with the config and the tokenizer; where None, the one that lies there or that is named there.
        dtype: bf16, fp16 or fp32; the base's if None.

    Raises:
        RequestError: no base is known, or these are an adapter's weights.
        ArtifactError: the weights are damaged or not whole.
    """
    base = base_folder(weights, base)
    config = folders.read_config(base)
    config.pop("quantization_config", None)  # the base's codes are not what was trained
    word = folders.word_of(dtype) or _dtype_of(config)
    source, renamed, left = _open(weights)
    try:
        plain = names.renamed(renamed, adapter=False, where=str(weights.path))
        _refuse_adapters(plain, weights)
        _refuse_metas(plain, weights)
        items = {plain[given]: own for given, own in renamed.items()}
        notes = [f"{len(left)} entries left out, as no part of the model: {grouped(left)}"] if left else []
        untied = _drop_tied(items, source, config, notes)
        outputs = [_output(source, own, name, word) for name, own in items.items()]
        config = folders.changed_config(config, outputs, untied=untied)
        small = folders.companions(list(dict.fromkeys([base, weights.home])))
        small = {name: data for name, data in small.items() if name not in ("trainer_state.json",)}
        yield Plan(outputs, small | {"config.json": folders.as_json(config)}, config, base, notes)
    finally:
        source.close()


def base_folder(weights: Weights, given: Path | None) -> Path:
    """The folder with the config and the tokenizer: the one given, the weights' own, or what their training names.

    Raises:
        RequestError: none of these is on this machine.
    """
    if given is not None:
        return given
    if (weights.home / "config.json").is_file():
        return weights.home
    name = _named(weights)
    if name and (Path(name) / "config.json").is_file():
        return Path(name)
    if name and name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent
    why = f"{PARAMS} names {name}, which is not on this machine" if name else "nothing here says which model they are of"  # fmt: skip
    raise RequestError(
        f"these are weights without a config, and {why}.",
        code="base-missing",
        where=str(weights.path),
        remedy="Give a folder with the model's config.json, tokenizer and, of a vision model, processor files: --base FOLDER. It needs no weights.",
    )


def _named(weights: Weights) -> str | None:
    path = weights.home / PARAMS
    if not path.is_file():
        return None
    value = load_yaml(path.read_text(encoding="utf-8"), PARAMS).value
    name = value.get("model_name") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None


def _open(weights: Weights) -> tuple[Source, dict[str, str], list[str]]:
    """The source, its names by the names within the model, and what is no part of the model."""
    if weights.kind == "distcp":
        found = read_sharded(weights.path)
        tensors, left = model_tensors(found)
        return ShardedSource(found, tensors.values()), {inner: t.name for inner, t in tensors.items()}, left
    source = find_weights(weights.path).source
    if not source.specs:
        raise ArtifactError("there are no weights here.", code="no-weights", where=str(weights.path))
    return source, {name: name for name in source.specs}, []


def _refuse_adapters(plain: dict[str, str], weights: Weights) -> None:
    own = next((name for name in plain.values() if names.is_adapters(name)), None)
    if own is not None:
        raise RequestError(f"these are an adapter's weights, or a model's with an adapter in it ({own}), not a whole model's.", code="adapter-in-weights", where=str(weights.path), remedy="Merge the adapter where it was trained, or save it with save_pretrained.")  # fmt: skip


def _refuse_metas(plain: dict[str, str], weights: Weights) -> None:
    own = next((name for name in plain.values() if _METAS.search(name)), None)
    if own is not None:
        raise RequestError(f"these tensors have Meta's own names ({own}), whose rows lie in another order than transformers'.", code="meta-names", where=str(weights.path), remedy="Convert them first with transformers' convert_llama_weights_to_hf, or get the model in transformers form.")  # fmt: skip


def _dtype_of(config: dict[str, Any]) -> str | None:
    inner = config.get("text_config")
    for told in (config, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if told.get(key) in _CONFIG_DTYPES:
                return _CONFIG_DTYPES[told[key]]
    return None


def _output(source: Source, own: str, name: str, word: str | None) -> Output:
    spec = source.specs[own]
    cast = word if word and spec.dtype in FLOATS else spec.dtype
    return Output(TensorSpec(name, cast, spec.shape), source, own)


def _drop_tied(items: dict[str, str], source: Source, config: dict[str, Any], notes: list[str]) -> bool:
    """A head tied to the embeddings goes into files once; where the two differ, both go, and the config must untie them."""
    inner = config.get("text_config")
    tied = bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False) if isinstance(inner, dict) else False))  # fmt: skip
    head = next((name for name in items if name.rpartition("lm_head.weight")[1:] == ("lm_head.weight", "")), None)
    embedded = [name for name in items if name.endswith("embed_tokens.weight")]
    if not tied or head is None or len(embedded) != 1:
        return False
    if not _equal(source, items[head], items[embedded[0]]):
        notes.append(f"{head} and {embedded[0]} differ, so the config does not tie them any more")
        return True
    del items[head]
    notes.append(f"{head} is {embedded[0]}, to which the config ties it; written once")
    return False


def _equal(source: Source, one: str, other: str) -> bool:
    spec = source.specs[one]
    if (spec.dtype, spec.shape) != (source.specs[other].dtype, source.specs[other].shape):
        return False
    if source.same(one, other):
        return True
    count = 1
    for extent in spec.shape:
        count *= extent
    left, right = (torch.empty(min(_STEP, count), dtype=FROM_FILE[spec.dtype]) for _ in range(2))
    for start in range(0, count, _STEP):
        size = min(_STEP, count - start)
        source.read(one, start, left[:size])
        source.read(other, start, right[:size])
        if not torch.equal(left[:size].view(torch.uint8), right[:size].view(torch.uint8)):
            return False
    return True
