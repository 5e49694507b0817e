"""A GGUF file as a source: its blocks dequantised a few rows at a time, under transformers' names and in its order.

llama.cpp's changes are taken back: rows of queries and keys in halves again, Gemma's norms less one. Every tensor of the
file must have a place in the model and every tensor of the model one in the file.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from luthier.artifacts import fingerprint
from luthier.artifacts.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from luthier.artifacts.tensorfile import TensorSpec
from luthier.errors import ArtifactError, RequestError
from luthier.export import exported_folder as folders
from luthier.export.gguf.names import heads_of, names_in_gguf
from luthier.export.gguf.proof import prove_gguf
from luthier.export.merged.lowrank import BLOCK
from luthier.export.proof.exports import ROUNDING
from luthier.export.read_back import check_written
from luthier.export.source import Source
from luthier.export.stream import Output, write_stream
from luthier.export.unfinished import unfinished
from luthier.models.gguf import DENSE, ROPE_FREQS, gguf_config
from luthier.models.gguf_tokenizer import open_gguf_tokenizer
from luthier.models.source import BaseSource

_COMPUTED = (ROPE_FREQS, "rope_factors_long.weight", "rope_factors_short.weight")  # they are in the config
_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


class GgufSource(Source):
    """The tensors of a GGUF file in fp32, by transformers' names."""

    def __init__(self, path: Path, header: GgufHeader, config: PreTrainedConfig) -> None:
        self._data = numpy.memmap(str(path), mode="r", dtype=numpy.uint8).view(numpy.ndarray)
        self._tensors: dict[str, GgufTensor] = {}
        self.changes: dict[str, tuple[str, int, float]] = {}
        architecture = header.architecture
        for name, target in names_in_gguf(architecture, config).items():
            if target in header.tensors:
                plus = 1.0 if architecture.startswith("gemma") and target.endswith("norm.weight") else 0.0
                self.changes[name] = (target, heads_of(architecture, target, config), plus)
                self._tensors[name] = header.tensors[target]
            elif not (config.tie_word_embeddings and name == "lm_head.weight"):
                raise _unfit(path, f"{name} ({target}) of the model is not in it")
        used = {target for target, _, _ in self.changes.values()}
        strange = next((name for name in header.tensors if name not in used and name not in _COMPUTED), None)
        if strange is not None:
            raise _unfit(path, f"{strange} has no place in a model of type {config.model_type}")
        specs = {name: TensorSpec(name, "F32", tensor.shape) for name, tensor in self._tensors.items()}
        super().__init__(path.parent, specs)

    def read(self, name: str, start: int, target: torch.Tensor) -> None:
        width = self._tensors[name].shape[-1]
        end = start + target.numel()
        step = max(1, BLOCK // width)
        for low in range(start // width, -(-end // width), step):
            high = min(low + step, -(-end // width))
            rows = self._rows(name, low, high).reshape(-1)
            at, until = max(low * width, start), min(high * width, end)
            target[at - start : until - start] = rows[at - low * width : until - low * width]

    def _rows(self, name: str, low: int, high: int) -> torch.Tensor:
        tensor, (_, heads, plus) = self._tensors[name], self.changes[name]
        count = math.prod(tensor.shape[:-1])
        if heads and len(tensor.shape) == 1:
            return self._unpacked(tensor, 0, 1).view(heads, -1, 2).transpose(1, 2).reshape(1, -1)
        if heads:
            group = count // heads
            first, last = low // group * group, -(-high // group) * group
            whole = self._unpacked(tensor, first, last).view(-1, group // 2, 2, tensor.shape[-1])
            return whole.transpose(1, 2).reshape(-1, tensor.shape[-1])[low - first : high - first]
        rows = self._unpacked(tensor, low, high)
        return rows - plus if plus else rows

    def _unpacked(self, tensor: GgufTensor, low: int, high: int) -> torch.Tensor:
        size = tensor.size // math.prod(tensor.shape[:-1])
        packed = self._data[tensor.offset + low * size : tensor.offset + high * size].reshape(high - low, size)
        values = gguf.dequantize(packed, tensor.kind).astype(numpy.float32, copy=True)
        return torch.from_numpy(values).view(high - low, tensor.shape[-1])


def export_from_gguf(
    path: Path, out: Path, *, dtype: str | None = None, shard_bytes: int, prove: bool = True
) -> list[str]:  # fmt: skip
    """Dequantise a GGUF file into a transformers folder and publish it as ``out``; returns what should be known.

    Args:
        dtype: bf16, fp16 or fp32; the file's own where that is one of them, else bf16.

    Raises:
        RequestError: the architecture has no way back, or ``out`` exists.
        ArtifactError: the file is damaged, a tensor is missing or has no place, or the proof failed.
    """
    folders.check_target(out, [])
    header = read_gguf_header(path)
    base = BaseSource("gguf", path, str(path))
    config = config_of(base, header)
    tokenizer, notes = open_gguf_tokenizer(base, header)
    word = folders.word_of(dtype) or _own_dtype(header)
    source = GgufSource(path, header, config)
    outputs = [Output(TensorSpec(name, word, spec.shape), source, name) for name, spec in source.specs.items()]
    config.dtype = folders.DTYPES[word]
    said: list[str] = []
    with unfinished(out, [path], ["from gguf", word, shard_bytes], said.append) as (partial, journal):
        small = _small(config, tokenizer)
        written = write_stream(partial, outputs, small, stem="model", kind="model", metadata={"format": "pt"}, shard_bytes=shard_bytes, journal=journal)  # fmt: skip
        late = {}
        if prove:
            said.append(check_written(partial, written.manifest))
            prover = prove_gguf(partial, config, tokenizer, source.changes, source.specs, coarse=ROUNDING[word])
            late["proof.json"] = prover(path)
        parent = {"kind": "gguf", "name": str(path.resolve()), "fingerprint": fingerprint.of_file(path)}
        told = {"parents": [parent], "notes": notes or None}
        folders.publish_folder(partial, out, written.manifest, told, config=config.to_diff_dict(), late=late)
    return said


def _small(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}


def _own_dtype(header: GgufHeader) -> str:
    sizes: dict[str, int] = {}
    for tensor in header.tensors.values():
        sizes[tensor.kind.name] = sizes.get(tensor.kind.name, 0) + tensor.size
    return _PLAIN.get(max(sizes, key=lambda kind: sizes[kind]), "BF16")


def config_of(base: BaseSource, header: GgufHeader) -> PreTrainedConfig:
    """The config that a GGUF's metadata amount to.

    Raises:
        RequestError: the architecture has no way back from GGUF here.
    """
    prefix = header.architecture
    if prefix in DENSE:
        return gguf_config(base, header)
    if prefix not in ("gemma2", "gemma3", "phi3"):
        raise RequestError(
            f"{base.name} is a GGUF of architecture {prefix!r}, which is not brought back to transformers' form.",
            code="gguf-architecture",
            where=base.name,
            remedy="Give the folder that it was converted from.",
        )
    data = {
        key.removeprefix(f"{prefix}."): value for key, value in header.metadata.items() if key.startswith(f"{prefix}.")
    }
    width = int(data.get("attention.key_length", data["embedding_length"] // data["attention.head_count"]))
    values: dict[str, Any] = {
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": data["context_length"],
        "hidden_size": data["embedding_length"],
        "num_hidden_layers": data["block_count"],
        "intermediate_size": data["feed_forward_length"],
        "num_attention_heads": data["attention.head_count"],
        "num_key_value_heads": data.get("attention.head_count_kv", data["attention.head_count"]),
        "rms_norm_eps": data["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    for name in ("bos", "eos", "padding"):
        values[f"{'pad' if name == 'padding' else name}_token_id"] = header.metadata.get(
            f"tokenizer.ggml.{name}_token_id"
        )
    theta = float(data.get("rope.freq_base", 10000.0))
    if prefix == "phi3":
        return AutoConfig.for_model("phi3", **values, **_phi3(header, data, width, theta))
    return AutoConfig.for_model(
        {"gemma3": "gemma3_text"}.get(prefix, prefix), **values, **_gemma(prefix, data, width, theta)
    )


def _gemma(prefix: str, data: dict[str, Any], width: int, theta: float) -> dict[str, Any]:
    usual, large = {"gemma2": (2, 46), "gemma3": (6, 62)}[prefix]
    period = data.get("attention.sliding_window_pattern", usual)
    scalar = data["embedding_length"] // data["attention.head_count"] if data["block_count"] == large else width
    told: dict[str, Any] = {
        "head_dim": width,
        "query_pre_attn_scalar": scalar,
        "sliding_window": data.get("attention.sliding_window", 4096),
        "layer_types": [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(data["block_count"])
        ],
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if data.get("rope.scaling.type") == "linear":
        rope |= {"rope_type": "linear", "factor": data["rope.scaling.factor"]}
    if prefix == "gemma2":
        soft = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        return told | {"rope_parameters": rope} | {key: data.get(key, value) for key, value in soft.items()}
    local = {"rope_type": "default", "rope_theta": float(data.get("rope.freq_base_swa", 10000.0))}
    return told | {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}


def _phi3(header: GgufHeader, data: dict[str, Any], width: int, theta: float) -> dict[str, Any]:
    share = data.get("rope.dimension_count", width) / width
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
    original = data.get("rope.scaling.original_context_length", data["context_length"])
    if "rope_factors_long.weight" in header.tensors:
        raise RequestError(
            "this Phi-3 scales its rotary positions for long texts, which is not brought back from GGUF.",
            code="gguf-rope",
            where=str(header.metadata.get("general.name", "phi3")),
            remedy="Give the folder that it was converted from.",
        )
    return {"rope_parameters": rope, "original_max_position_embeddings": original, "sliding_window": None}


def _unfit(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"this GGUF does not fit: {why}.", code="coverage", where=str(path), remedy="Get the file again, or give the folder it was converted from.")  # fmt: skip
