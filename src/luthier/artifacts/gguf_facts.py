"""What a GGUF file's header says about it: a model or an adapter, how many parameters, how they are packed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.artifacts.gguf_header import GgufHeader, read_gguf_header

_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class GgufFacts:
    """`adapter` is None for a model; `base` is the name that an adapter gives its base."""

    architecture: str
    parameters: int | None
    precision: str | None
    adapter: dict[str, Any] | None = None
    base: str | None = None


def describe_gguf(path: Path) -> GgufFacts:
    """The facts of one file; raises ArtifactError if it is damaged."""
    header = read_gguf_header(path)
    sizes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        sizes[tensor.kind.name] += math.prod(tensor.shape)
    widest = sizes.most_common(1)[0][0] if sizes else None
    precision = _PRECISIONS.get(widest, widest.lower()) if widest else None
    known = GgufFacts(header.architecture, sum(sizes.values()) or None, precision)
    if header.metadata.get("general.type") != "adapter":
        return known
    base = header.metadata.get("general.base_model.0.name")
    return GgufFacts(known.architecture, known.parameters, precision, _adapter(header), base if isinstance(base, str) else None)  # fmt: skip


def _adapter(header: GgufHeader) -> dict[str, Any]:
    ranks = Counter(t.shape[0] for name, t in header.tensors.items() if name.endswith(".lora_a") and t.shape)
    return {
        "type": str(header.metadata.get("adapter.type", "unknown")).lower(),
        "r": ranks.most_common(1)[0][0] if ranks else None,
        "lora_alpha": header.metadata.get("adapter.lora.alpha"),
    }
