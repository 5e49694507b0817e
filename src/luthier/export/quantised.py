"""``--to quantized``: 4-bit and 8-bit folders that plain transformers (bitsandbytes) or vLLM (compressed-tensors) opens.

Matrices are packed by rows where they are read, with the functions that a quantised base is trained with
(`luthier.models.quantised.formats`); what is written has the names and the settings that the libraries write themselves:

    nf4     weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4; blocks of 64, scales not quantised again
    int8    weight, SCB, weight_format; bitsandbytes' LLM.int8()
    fp8     weight, weight_scale; compressed-tensors, e4m3, a scale a row, activations quantised by token while serving

Which layers stay in 16 bits is decided as for training (head, routers, rows that nf4's blocks would cross) and named in the
config, so that whoever opens the folder makes the same choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier.artifacts.tensorfile import TensorSpec
from luthier.artifacts.weight_facts import main_float
from luthier.checkpoint.dtypes import FROM_FILE
from luthier.errors import ArtifactError, RequestError
from luthier.export import exported_folder as folders
from luthier.export.merged.plan import FLOATS
from luthier.export.naming import empty_model
from luthier.export.proof.exports import prove_quantised
from luthier.export.read_back import check_written
from luthier.export.source import Source, open_source
from luthier.export.stream import Output, write_stream
from luthier.export.unfinished import unfinished
from luthier.models.quantised.choose import choose
from luthier.models.quantised.formats import BLOCK, FORMS, Form, code_bytes, quantise, scale_bytes, scales_of
from luthier.models.targets import expert_parameters

AT_ONCE = 1 << 22  # elements read and packed at a time
_STATE = "weight.quant_state.bitsandbytes__nf4"


def form_of(text: str | None) -> Form:
    """The packing asked for.

    Raises:
        RequestError: there is none of that name.
    """
    found = next((form for form in FORMS if form == (text or "nf4")), None)
    if found is None:
        raise RequestError(f"there is no format {text!r}.", code="form", where="--format", remedy=f"Take one of {', '.join(FORMS)}.")  # fmt: skip
    return found


def export_quantised(
    folder: Path, out: Path, *, form: Form, dtype: str | None, shard_bytes: int, prove: bool
) -> list[str]:
    """Write a model's folder quantised; returns what should be known.

    Args:
        dtype: of what stays unquantised: bf16, fp16 or fp32; as it is if None.

    Raises:
        RequestError: the model is quantised already, or no layer of it can be; or ``out`` exists.
        ArtifactError: a file is broken, or the proof failed.
    """
    folders.check_target(out, [folder])
    config = folders.read_config(folder)
    if config.get("quantization_config"):
        raise RequestError(
            "its weights are quantised already, and packing them again would lose more.",
            code="quantised-base",
            where=str(folder),
            remedy="Give the original weights; `luthier export SRC DST --to transformers` writes the values as 16-bit ones, where that is meant.",
        )
    model = empty_model(folder)
    choice = choose(model, form, ())
    said = list(choice.notes)
    word = folders.word_of(dtype)
    with open_source(folder) as files:
        strange = sorted(name for name in choice.quantised if f"{name}.weight" not in files.specs)
        if strange:
            raise ArtifactError(
                f"{strange[0]} of the model has no tensor of its own in the files.",
                code="tensors-differ",
                where=str(folder),
                remedy="Export it to transformers form first, and that to quantized.",
            )
        packed = Packing(files, choice.quantised, form, word)
        outputs = [Output(spec, packed, name) for name, spec in packed.specs.items()]
        small = folders.companions([folder])
        changed = {**config, "dtype": folders.DTYPES.get(word or main_float(files.specs.values()), "float32")}
        changed.pop("torch_dtype", None)
        kept = sorted(choice.kept) + sorted(_unfit(model, choice.quantised, choice.kept))
        changed["quantization_config"] = settings(
            form, kept + (_experts(model) if form == "fp8" else []), changed["dtype"]
        )
        small["config.json"] = folders.as_json(changed)
        options = ["quantized", form, dtype, shard_bytes]
        with unfinished(out, [folder], options, said.append) as (partial, journal):
            written = write_stream(partial, outputs, small, stem="model", kind="model", metadata={"format": "pt"}, shard_bytes=shard_bytes, journal=journal)  # fmt: skip
            if prove:
                said.append(check_written(partial, written.manifest))
            late = {"proof.json": prove_quantised(folder, form, kept, changed["dtype"])(partial)} if prove else {}
            facts = {"parents": [{"kind": "model", "name": str(folder.resolve())}], "quantisation": {"format": form, "kept": kept}}  # fmt: skip
            folders.publish_folder(partial, out, written.manifest, facts, config=changed, late=late)
    return said


def settings(form: Form, kept: Sequence[str], dtype: str) -> dict[str, Any]:
    """``quantization_config`` as the library that opens the folder writes it."""
    if form == "fp8":
        numbers = {"num_bits": 8, "type": "float", "symmetric": True}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": list(kept),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**numbers, "strategy": "channel", "dynamic": False},
                    "input_activations": {**numbers, "strategy": "token", "dynamic": True},
                    "output_activations": None,
                }
            },
            "kv_cache_scheme": None,
        }
    four = form == "nf4"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if four else "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(kept),
        "llm_int8_threshold": 6.0,
    }


def _experts(model: Any) -> list[str]:
    """Modules of fused experts, and by a pattern the single ones that files name; vLLM would take them for linear layers."""
    modules = sorted({name.rpartition(".")[0] for name in expert_parameters(model)})
    return [*modules, *(rf"re:{re.escape(name)}\..*" for name in modules)]


def _unfit(model: Any, quantised: frozenset[str], kept: Sequence[str]) -> set[str]:
    """Layers with a matrix that are neither packed nor kept on purpose, routers among them: a server may take them for linear ones."""
    layers = {
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, torch.nn.Embedding)
    }
    return layers - set(quantised) - set(kept)


@dataclass(frozen=True)
class _Part:
    """One tensor of a packed layer: ``field`` of `Packed`, ``row`` bytes a row; or bytes that are known beforehand."""

    weight: str
    field: str = ""
    row: int = 0
    known: bytes = b""


class Packing(Source):
    """A folder's tensors with some layers packed; what is read is packed from the rows that it needs."""

    def __init__(self, source: Source, layers: frozenset[str], form: Form, word: str | None) -> None:
        self._source, self._form, self._word = source, form, word
        self._parts: dict[str, _Part] = {}
        specs: dict[str, TensorSpec] = {}
        for name, spec in source.specs.items():
            if name.removesuffix(".weight") in layers and name.endswith(".weight"):
                specs |= self._packed(name, spec)
            else:
                cast = word if word and spec.dtype in FLOATS else spec.dtype
                specs[name] = replace(spec, dtype=cast)
        super().__init__(source.folder, specs)

    def _packed(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = spec.shape
        form, layer = self._form, name.removesuffix("weight")
        codes = _Part(name, "codes", code_bytes(columns, form))
        scales = _Part(name, "scales", scale_bytes(columns, form))
        if form == "nf4":
            told = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": folders.DTYPES[self._word or spec.dtype], "shape": [rows, columns]}  # fmt: skip
            parts = {
                TensorSpec(name, "U8", (rows * columns // 2, 1)): codes,
                TensorSpec(f"{name}.absmax", "F32", (rows * columns // BLOCK,)): scales,
                TensorSpec(f"{name}.quant_map", "F32", (16,)): _Part(name, known=_nf4_table()),
                TensorSpec(f"{layer}{_STATE}", "U8", (len(json.dumps(told)),)): _Part(name, known=json.dumps(told).encode()),
            }  # fmt: skip
        elif form == "int8":
            parts = {
                TensorSpec(name, "I8", spec.shape): codes,
                TensorSpec(f"{layer}SCB", "F32", (rows,)): scales,
                TensorSpec(f"{layer}weight_format", "U8", ()): _Part(name, known=b"\0"),  # rows as they are
            }
        else:
            parts = {
                TensorSpec(name, "F8_E4M3", spec.shape): codes,
                TensorSpec(f"{layer}weight_scale", "F32", (rows, 1)): scales,
            }
        self._parts |= {made.name: part for made, part in parts.items()}
        return {made.name: made for made in parts}

    def read(self, name: str, start: int, target: torch.Tensor) -> None:
        part = self._parts.get(name)
        raw = target.view(torch.uint8)
        if part is None:
            self._plain(name, start, target)
        elif part.known:
            at = start * target.element_size()
            raw.copy_(torch.frombuffer(bytearray(part.known[at : at + raw.numel()]), dtype=torch.uint8))
        else:
            self._rows(part, start * target.element_size(), raw)

    def _plain(self, name: str, start: int, target: torch.Tensor) -> None:
        own = FROM_FILE[self._source.specs[name].dtype]
        if own is target.dtype:
            self._source.read(name, start, target)
            return
        held = torch.empty(target.numel(), dtype=own)
        self._source.read(name, start, held)
        target.copy_(held)

    def _rows(self, part: _Part, start: int, raw: torch.Tensor) -> None:
        """Fill ``raw`` with a layer's bytes from ``start`` on."""
        columns = self._source.specs[part.weight].shape[1]
        own = FROM_FILE[self._source.specs[part.weight].dtype]
        end, step = start + raw.numel(), max(1, AT_ONCE // columns)
        for low in range(start // part.row, -(-end // part.row), step):
            high = min(low + step, -(-end // part.row))
            held = torch.empty((high - low) * columns, dtype=own)
            self._source.read(part.weight, low * columns, held)
            if self._word:
                held = held.to(FROM_FILE[self._word])
            rows = held.view(-1, columns)
            # in a file scales come before codes, the widest numbers first
            made = scales_of(rows, self._form) if part.field == "scales" else quantise(rows, self._form).codes
            made = made.reshape(-1)
            at, until = max(low * part.row, start), min(high * part.row, end)
            raw[at - start : until - start] = made[at - low * part.row : until - low * part.row]


def _nf4_table() -> bytes:
    from bitsandbytes.functional import get_4bit_type

    table: torch.Tensor = get_4bit_type("nf4", device="cpu")
    return table.to(torch.float32).contiguous().numpy().tobytes()
