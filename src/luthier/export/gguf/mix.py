"""Which tensor of a GGUF is packed how: llama.cpp's own mixes, by what it calls them.

In Q4_K_M and Q5_K_M half of the layers hold their values and down projections in Q6_K, and the head, or the embedding that
serves as one, is Q6_K: what these lose costs most. Facts of llama.cpp: src/llama-quant.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gguf import GGMLQuantizationType, LlamaFileType

from luthier.errors import RequestError
from luthier.export.gguf.file import GgufTensor, fills_blocks

Kind = GGMLQuantizationType
QUANTS = {
    "F32": (Kind.F32, LlamaFileType.ALL_F32),
    "F16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_K_M": (Kind.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
    "Q5_K_M": (Kind.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "Q6_K": (Kind.Q6_K, LlamaFileType.MOSTLY_Q6_K),
}


def quant_of(text: str) -> str:
    """The quantisation's name as llama.cpp writes it.

    Raises:
        RequestError: there is none of that name here.
    """
    name = text.upper().replace("-", "_")
    if name not in QUANTS:
        raise RequestError(f"there is no quantisation {text!r} here.", code="gguf-quant", where="--quant", remedy=f"Take one of {', '.join(QUANTS)}.")  # fmt: skip
    return name


def mix(tensors: Sequence[GgufTensor], quant: str, layers: int) -> tuple[list[GgufTensor], dict[str, str]]:
    """The tensors with their kinds, and those that could not have the kind meant for them (`name: kind`).

    Norms, biases and other vectors stay F32.
    """
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    found, fallen = [], {}
    for tensor in tensors:
        if len(tensor.shape) < 2 or tensor.values is not None or not tensor.name.endswith(".weight"):
            found.append(tensor)
            continue
        wanted = _kind(tensor.name, quant, layers, tied)
        kind = next(each for each in (wanted, Kind.Q8_0, Kind.F16) if fills_blocks(each, tensor.shape[-1]))
        if kind != wanted:
            fallen[tensor.name] = kind.name
        found.append(replace(tensor, kind=kind))
    return found, fallen


def _kind(name: str, quant: str, layers: int, tied: bool) -> Kind:
    kind = QUANTS[quant][0]
    if quant not in ("Q4_K_M", "Q5_K_M"):
        return kind
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return Kind.Q6_K
    if ".attn_qkv." in name:
        return Kind.Q5_K if quant == "Q4_K_M" else Kind.Q6_K
    if ".attn_v." in name or ".ffn_down." in name:
        return Kind.Q6_K if _more_bits(int(name.split(".")[1]), layers) else kind
    return kind


def _more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is among the first and last eighth, or the third of every three between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
