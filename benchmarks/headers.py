"""How long `luthier inspect` takes on a large model: headers only, shown on sparse files that take no room.

    python benchmarks/headers.py WORK [--shards 200] [--gigabytes 100] [--tensors 4] [--repeats 5]

Prints the model's size, the bytes that were really read, and processor and wall seconds of `identify` + `show`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import time
from pathlib import Path

from luthier.artifacts.identify import identify
from luthier.artifacts.show import show


def make(folder: Path, *, shards: int, gigabytes: float, tensors: int) -> int:
    """Write valid headers in front of holes; returns the model's size in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = int(gigabytes * 1e9 / shards / tensors / 8192 / 2)
    size = rows * 8192 * 2
    weight_map = {}
    for shard in range(1, shards + 1):
        name = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        entries = {
            f"model.layers.{shard}.part.{i}.weight": {
                "dtype": "BF16", "shape": [rows, 8192], "data_offsets": [i * size, (i + 1) * size],
            }
            for i in range(tensors)
        }  # fmt: skip
        weight_map |= dict.fromkeys(entries, name)
        header = json.dumps(entries).encode()
        with open(folder / name, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + tensors * size)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return shards * tensors * size


def measure(folder: Path) -> tuple[float, float]:
    """Processor and wall seconds of one inspection."""
    begin, wall = os.times(), time.perf_counter()
    found = identify(folder)
    show(found)
    end = os.times()
    assert found.whole, found.problems
    return end.user + end.system - begin.user - begin.system, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--gigabytes", type=float, default=100)
    parser.add_argument("--tensors", type=int, default=4, help="tensors a shard")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    folder = options.work / "sparse"
    size = make(folder, shards=options.shards, gigabytes=options.gigabytes, tensors=options.tensors)
    runs = [measure(folder) for _ in range(options.repeats)]
    print(f"{size / 1e9:.1f} GB in {options.shards} shards of {options.tensors} tensors, {options.repeats} runs")
    for name, values in zip(("processor", "wall"), zip(*runs)):
        print(f"{name:>9}: median {statistics.median(values):.3f} s, {min(values):.3f} to {max(values):.3f} s")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
