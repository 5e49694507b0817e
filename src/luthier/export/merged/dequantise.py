"""bitsandbytes' quantised tensors as the values they stand for, stretch by stretch.

4 bits (nf4, fp4): two codes a byte, the first in the high half; a value is ``table[code] · absmax`` of its block of 64 or so,
rounded to the dtype that the file names. The table lies beside the weight; the blocks' lengths may be quantised once more (256 codes, blocks
of their own, and an offset). int8: a value is ``code · SCB / 127`` with one SCB a row, in fp32. These are bit for bit the
values that bitsandbytes computes with, hence those that an adapter on such a base saw.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from luthier.artifacts.tensorfile import Place, TensorSpec
from luthier.errors import ArtifactError, RequestError
from luthier.export.source import Source

BLOCK = 1 << 20  # elements at a time
_STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_WORDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_PER_127 = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it


@dataclass
class _FourBits:
    """How one 4-bit weight is packed."""

    block: int
    table: torch.Tensor
    lengths: torch.Tensor  # of the blocks, fp32


def dequantised(source: Source, config: Mapping[str, Any]) -> Source:
    """The source as it is where the config says of no quantisation, else one of the values its codes stand for.

    Raises:
        RequestError: the quantisation is not bitsandbytes'.
    """
    told = config.get("quantization_config")
    if not told:
        return source
    if told.get("quant_method") != "bitsandbytes":
        raise RequestError(
            f"its weights are quantised by {told.get('quant_method') or 'an unnamed method'}, and this version reads bitsandbytes' only.",
            code="quantised-base",
            where=str(source.folder),
            remedy="Give the folder of the original weights with --base.",
        )
    return Dequantised(source)


class Dequantised(Source):
    """A quantised folder's tensors as floating point.

    Attributes:
        inner: the source of the codes.

    Raises:
        ArtifactError: parts of a quantised tensor are missing or contradict each other.
    """

    def __init__(self, inner: Source) -> None:
        self.inner = inner
        self._states: dict[str, dict[str, Any]] = {}
        self._scales: dict[str, str] = {}
        specs: dict[str, TensorSpec] = {}
        beside = {part for name in inner.specs if (part := _beside(name, inner.specs))}
        for name, spec in inner.specs.items():
            if name in beside:
                continue
            state = next((key for key in inner.specs if key.startswith(f"{name}{_STATE}")), None)
            scale = f"{name.removesuffix('.weight')}.SCB"
            if state is not None:
                specs[name] = self._four_bits(name, state)
            elif spec.dtype == "I8" and scale in inner.specs:
                specs[name] = TensorSpec(name, "F32", spec.shape)
                self._scales[name] = scale
            elif spec.dtype in ("I8", "U8") and name.endswith(".weight"):
                raise self._broken(name, "has no scales beside it")
            else:
                specs[name] = spec
        super().__init__(inner.folder, specs)
        self.file_of = {name: inner.file_of[name] for name in specs if name in inner.file_of}
        self._held: dict[str, _FourBits] = {}
        self._lock = threading.Lock()

    def place(self, name: str) -> Place | None:
        return None if name in self._states or name in self._scales else self.inner.place(name)

    def read(self, name: str, start: int, target: torch.Tensor) -> None:
        fill = self._fill_four_bits if name in self._states else self._fill_int8 if name in self._scales else None
        if fill is None:
            self.inner.read(name, start, target)
            return
        for at in range(0, target.numel(), BLOCK):
            fill(name, start + at, target[at : at + BLOCK])

    def close(self) -> None:
        self.inner.close()

    def _four_bits(self, name: str, state: str) -> TensorSpec:
        try:
            told = json.loads(bytes(self.inner.tensor(state).tolist()).decode())
            shape, word = tuple(int(extent) for extent in told["shape"]), _WORDS[told["dtype"]]
            told["blocksize"] = int(told["blocksize"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._broken(state, f"cannot be read ({type(error).__name__})") from error
        count = 1
        for extent in shape:
            count *= extent
        blocks = -(-count // max(1, told["blocksize"]))
        held = self.inner.specs[name]
        wanted = [(f"{name}.absmax", blocks), (f"{name}.quant_map", 16)]
        if "nested_offset" in told:
            wanted += [(f"{name}.nested_quant_map", 256), (f"{name}.nested_absmax", -(-blocks // int(told["nested_blocksize"])))]  # fmt: skip
        for part, length in wanted:
            if part not in self.inner.specs or _count(self.inner.specs[part].shape) != length:
                raise self._broken(part, f"is missing or not {length} long")
        if held.dtype != "U8" or held.size != -(-count // 2):
            raise self._broken(name, f"does not hold the {count} values that its state speaks of")
        self._states[name] = told
        return TensorSpec(name, word, shape)

    def _packing(self, name: str) -> _FourBits:
        with self._lock:
            if name not in self._held:
                told = self._states[name]
                lengths = self.inner.tensor(f"{name}.absmax")
                if "nested_offset" in told:
                    table = self.inner.tensor(f"{name}.nested_quant_map")
                    outer = self.inner.tensor(f"{name}.nested_absmax").float()
                    outer = outer.repeat_interleave(int(told["nested_blocksize"]))[: lengths.numel()]
                    lengths = table[lengths.reshape(-1).int()] * outer + float(told["nested_offset"])
                while len(self._held) >= 4:
                    del self._held[next(iter(self._held))]
                table = self.inner.tensor(f"{name}.quant_map").float()
                self._held[name] = _FourBits(told["blocksize"], table, lengths.float().reshape(-1))
            return self._held[name]

    def _fill_four_bits(self, name: str, start: int, target: torch.Tensor) -> None:
        packing = self._packing(name)
        end = start + target.numel()
        packed = torch.empty(-(-end // 2) - start // 2, dtype=torch.uint8)
        self.inner.read(name, start // 2, packed)
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[start % 2 :][: target.numel()]
        first, last = start // packing.block, -(-end // packing.block)
        lengths = packing.lengths[first:last].repeat_interleave(packing.block)
        skip = start - first * packing.block
        target.copy_(packing.table[codes.int()] * lengths[skip : skip + target.numel()])

    def _fill_int8(self, name: str, start: int, target: torch.Tensor) -> None:
        codes = torch.empty(target.numel(), dtype=torch.int8)
        self.inner.read(name, start, codes)
        width = self.specs[name].shape[-1]
        rows = torch.arange(start, start + target.numel()) // width
        scales = self.inner.tensor(self._scales[name]).reshape(-1)[rows]
        target.copy_(codes * scales * _PER_127)

    def _broken(self, name: str, what: str) -> ArtifactError:
        return ArtifactError(
            f"{name} {what}, so the quantised weight cannot be read.",
            code="quantised-parts",
            where=str(self.inner.folder),
            remedy="Get the folder again, or give the original weights with --base.",
        )


def _beside(name: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """The name itself if the tensor only says how another one is quantised."""
    if _STATE in name or any(name.endswith(part) and name.removesuffix(part) in specs for part in _PARTS):
        return name
    owner, _, leaf = name.rpartition(".")
    return name if leaf in ("SCB", "weight_format") and f"{owner}.weight" in specs else None


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
