"""The tensors a model expects against those its files held; any difference is an error, never random weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from luthier.errors import ArtifactError

_SHOWN = 6


def check_coverage(loading: Mapping[str, Any], where: str) -> None:
    """Raises ArtifactError unless every expected tensor was found with its shape, and no other.

    `loading` is what transformers' `output_loading_info` gives; names that the architecture itself declares
    ignorable are not in it any more.
    """
    missing = sorted(loading.get("missing_keys", ()))
    unexpected = sorted(loading.get("unexpected_keys", ()))
    mismatched = sorted(loading.get("mismatched_keys", ()))
    errors = list(loading.get("error_msgs", ()))
    if not (missing or unexpected or mismatched or errors):
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors of the model are not in its files: {grouped(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} tensors in the files have no place in the model: {grouped(unexpected)}")
    if mismatched:
        name, found, expected = mismatched[0]
        parts.append(
            f"{len(mismatched)} tensors have another shape than config.json says: {name} is {_shape(found)}, not {_shape(expected)}"
        )
    if errors:
        parts.append(f"{errors[0]}")
    cause, remedy = _likely(missing, unexpected, mismatched)
    raise ArtifactError(
        "; ".join(parts) + f". {cause}",
        code="tensors-differ",
        where=where,
        remedy=remedy,
    )


def _likely(missing: list[str], unexpected: list[str], mismatched: list[Any]) -> tuple[str, str]:
    every = [*missing, *unexpected]
    if any("lora_" in name or ".base_layer." in name for name in unexpected):
        return (
            "The files hold an adapter's tensors.",
            "Merge the adapter, or train on its base and give the adapter apart.",
        )
    if any(name.startswith("_orig_mod.") or "._orig_mod." in name for name in unexpected):
        return "The model was saved while wrapped by torch.compile.", "Save it again from the unwrapped module."
    if any(name.startswith(("module.", "_fsdp_wrapped_module.")) for name in unexpected):
        return "The model was saved while wrapped for several devices.", "Save it again from the unwrapped module."
    if mismatched and all("embed" in name or "head" in name for name, *_ in mismatched):
        return (
            "The vocabulary was resized, and config.json is of another version.",
            "Set vocab_size in config.json to the number of rows.",
        )
    if missing and all("lm_head" in name for name in missing):
        return (
            "The head is not in the files.",
            "If the model ties it to the embeddings, set tie_word_embeddings: true in its config.json.",
        )
    if any(re.search(r"layers?\.\d+\.|\.h\.\d+\.", name) for name in every):
        return (
            "Files and config.json are of different models, or a download is incomplete.",
            "Get the folder again; compare num_hidden_layers and the architecture in config.json.",
        )
    return "Files and config.json are of different models.", "Get the folder again."


def grouped(names: Iterable[str]) -> str:
    """Names with their layer numbers folded: `model.layers.*.mlp.up_proj.weight (30)`."""
    groups = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    shown = [f"{name} ({count})" if count > 1 else name for name, count in groups.most_common(_SHOWN)]
    return ", ".join(shown) + (", …" if len(groups) > _SHOWN else "")


def _shape(shape: Iterable[int]) -> str:
    return " × ".join(str(size) for size in shape)
