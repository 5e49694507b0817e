"""How far dequantise(quantise(w)) is from w, by format, beside bitsandbytes and torchao on the same weights, as a table.

    python benchmarks/quantised_error.py FOLDER_OR_GGUF [--layers 4] [--device cpu]
    python benchmarks/quantised_error.py --random

Relative error: root mean square of the difference over that of the weights, over the linear layers of the first and the last
few decoder layers (and of `--random`: one normal matrix, and one with a few rows and columns of outliers). torchao is
measured where it is installed; what it has no form for is left out.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bitsandbytes
import torch

from luthier.models.quantised.formats import FORMS, code_bytes, dequantise, quantise, scale_bytes

Round = Callable[[torch.Tensor], torch.Tensor]


def ours(form: str) -> Round:
    return lambda weight: dequantise(*quantise(weight, form), form, torch.float32)


def bnb_nf4(double: bool) -> Round:
    def rounded(weight: torch.Tensor) -> torch.Tensor:
        codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
        return bitsandbytes.dequantize_4bit(codes, state).float()

    return rounded


def bnb_int8(weight: torch.Tensor) -> torch.Tensor:
    codes, scales, _ = bitsandbytes.int8_vectorwise_quant(weight.to(torch.float16))
    return bitsandbytes.int8_vectorwise_dequant(codes, scales)


def torchao_forms() -> dict[str, tuple[Round, float]]:
    """torchao's weight-only forms, through its own `quantize_` of a linear layer."""
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        return {}

    def through(config: object) -> Round:
        def rounded(weight: torch.Tensor) -> torch.Tensor:
            layer = torch.nn.Linear(
                weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=torch.float32
            )  # it dequantises to the dtype it was given, and 16 bits would round once more
            layer.weight.data.copy_(weight)
            quantize_(layer, config)
            return layer.weight.dequantize().float()

        return rounded

    forms = {"torchao int8 weight-only, a scale a row": (through(Int8WeightOnlyConfig()), 8 + 32 / 1024)}
    forms["torchao fp8 weight-only, a scale a row"] = (through(Float8WeightOnlyConfig()), 8 + 32 / 1024)
    if (to_nf4 := torchao_nf4()) is not None:

        def nf4(weight: torch.Tensor) -> torch.Tensor:
            scales = weight.numel() // 64
            together = next(block for block in (256, 64, 1) if scales % block == 0)  # 256 is its default
            return to_nf4(weight.float(), 64, together).get_original_weight()

        forms["torchao nf4, double quantisation"] = (nf4, 4 + 8 / 64 + 32 / (64 * 256))
    return forms


def torchao_nf4() -> Callable[[torch.Tensor], Any] | None:
    """torchao's `to_nf4` (blocks of 64, scales in int8 by 256), where this version of it has one."""
    for place in ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor"):
        try:
            return importlib.import_module(place).to_nf4
        except ImportError:
            continue
    return None


def rows() -> dict[str, tuple[Round, float]]:
    """Name to what it makes of a matrix, and its bits a weight (rows of 1024)."""
    found = {f"luthier {form}": (ours(form), 8 * (code_bytes(1024, form) + scale_bytes(1024, form)) / 1024) for form in FORMS}  # fmt: skip
    found["bitsandbytes nf4"] = (bnb_nf4(False), 4.5)
    found["bitsandbytes nf4, double quantisation"] = (bnb_nf4(True), 4 + 8 / 64 + 32 / (64 * 256))
    found["bitsandbytes int8"] = (bnb_int8, 8 + 32 / 1024)
    return found | torchao_forms()


def random_matrices() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1024, 1024, generator=generator)
    outliers = normal.clone()
    outliers[::128] *= 20
    outliers[:, ::200] *= 20
    return {"normal": [normal.bfloat16()], "with outliers": [outliers.bfloat16()]}


def of_model(path: Path, layers: int) -> dict[str, list[torch.Tensor]]:
    import luthier

    model, _ = luthier.load(path, precision="bf16", device="cpu")
    count = model.config.num_hidden_layers
    chosen = {*range(min(layers, count)), *range(max(0, count - layers), count)}
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if isinstance(module, torch.nn.Linear) and any(part.isdigit() and int(part) in chosen for part in parts):
            kinds.setdefault(parts[-1], []).append(module.weight.data)
    return kinds


def error(round_: Round, weights: Iterable[torch.Tensor], device: str) -> float | None:
    wrong = whole = 0.0
    for weight in weights:
        there = weight.to(device)
        try:
            wrong += float((round_(there) - there.float()).square().sum())
        except (RuntimeError, NotImplementedError, ValueError, AttributeError, TypeError):
            return None
        whole += float(there.float().square().sum())
    return math.sqrt(wrong / whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    kinds = random_matrices() if args.random or args.model is None else of_model(args.model, args.layers)
    print("| format | bits a weight | " + " | ".join(kinds) + " |")
    print("| --- | --- |" + " --- |" * len(kinds))
    for name, (round_, bits) in rows().items():
        errors = [error(round_, weights, args.device) for weights in kinds.values()]
        print(f"| {name} | {bits:.2f} | " + " | ".join("–" if e is None else f"{100 * e:.3f} %" for e in errors) + " |")


if __name__ == "__main__":
    main()
