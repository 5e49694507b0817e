"""How long `luthier.load` takes beside `from_pretrained` for the same folder.

    python benchmarks/opening.py WORK [--hidden 1024] [--layers 16] [--repeats 7]

Makes a Llama with random weights (bf16) and an adapter on it, as transformers and peft save them. In one process, in turns,
the files in the page cache: plain transformers (+ peft) and ours, with the tokenizer on both sides. The ratio is the median
of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import luthier


def make(work: Path, hidden: int, layers: int) -> dict[str, Path]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny import make_tokenizer

    if not (work / "base").exists():
        config = LlamaConfig(
            vocab_size=32000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(work / "base")
        make_tokenizer(work / "base")
        get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
            work / "adapter"
        )
        made = work / "adapter" / "adapter_config.json"
        made.write_text(made.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{work / "base"}"'))  # fmt: skip
        make_tokenizer(work / "adapter")
    return {"model": work / "base", "adapter": work / "adapter"}


def plain(folder: Path) -> Any:
    opener = AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else AutoModelForCausalLM
    return opener.from_pretrained(folder, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(folder)


def ours(folder: Path) -> Any:
    return luthier.load(folder, precision="bf16", device="cpu")


def seconds(call: Callable[[Path], Any], folder: Path) -> float:
    gc.collect()
    begun = time.perf_counter()
    call(folder)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    for key, value in {"hidden": 1024, "layers": 16, "repeats": 7}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(
        "| folder | luthier.load | from_pretrained | ratio (median of neighbours, range) |\n| --- | --- | --- | --- |"
    )
    for kind, folder in make(options.work.resolve(), options.hidden, options.layers).items():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
        pairs = [(seconds(ours, folder), seconds(plain, folder)) for _ in range(options.repeats + 1)][1:]
        left, right = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(a / b for a, b in pairs)
        print(
            f"| {kind} ({size:.0f} MiB) | {left:.3f} s | {right:.3f} s | {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |"
        )


if __name__ == "__main__":
    main()
