"""A model of 13 billion parameters quantised on a small machine, under a limit on its memory.

    python benchmarks/quantise_13b.py WORK [--form nf4] [--layers 40] [--hidden 5120] [--limit-gib 2.0] [--random]

Makes the 16-bit folder in WORK, a shard a layer (26 GB; sparse files of zeros, or random numbers with --random), then packs
it tensor by tensor into WORK/packed-FORM in a process of its own. That process watches its own anonymous memory (RssAnon: what
can't be dropped when memory is short, which the pages of mapped files can) and is killed by its data limit (RLIMIT_DATA) if it
needs more than the limit beyond what its imports took.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path


def shapes(layers: int, hidden: int, vocabulary: int) -> list[dict[str, list[int]]]:
    inner = int(hidden * 2.7)
    inner -= inner % 64
    ends = {"model.embed_tokens.weight": [vocabulary, hidden], "lm_head.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}  # fmt: skip

    def layer(number: int) -> dict[str, list[int]]:
        name = f"model.layers.{number}"
        found = {f"{name}.self_attn.{key}_proj.weight": [hidden, hidden] for key in "qkvo"}
        found |= {f"{name}.mlp.{key}_proj.weight": [inner, hidden] for key in ("gate", "up")}
        found[f"{name}.mlp.down_proj.weight"] = [hidden, inner]
        return found | {f"{name}.{key}_layernorm.weight": [hidden] for key in ("input", "post_attention")}

    return [ends, *(layer(number) for number in range(layers))]


def make(folder: Path, layers: int, hidden: int, vocabulary: int, *, random: bool) -> int:
    """A transformers folder of bf16 shards; returns its number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    total, index = 0, {}
    every = shapes(layers, hidden, vocabulary)
    for number, tensors in enumerate(every):
        header, offset = {}, 0
        for name, shape in tensors.items():
            size = 2
            for extent in shape:
                size *= extent
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        total += offset // 2
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = folder / f"model-{number + 1:05}-of-{len(every):05}.safetensors"
        index |= dict.fromkeys(tensors, file.name)
        if file.is_file() and file.stat().st_size == 8 + len(text) + offset:
            continue
        with open(file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            if random:
                import torch

                for name in tensors:
                    begin, end = header[name]["data_offsets"]
                    for at in range(begin, end, 1 << 27):
                        count = (min(end, at + (1 << 27)) - at) // 2
                        out.write(memoryview((torch.randn(count) * 0.02).bfloat16().view(torch.uint8).numpy()))
            else:
                out.truncate(8 + len(text) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


class Watch:
    """The largest RssAnon of this process, looked at every 10 ms."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.01)


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    return _status("RssAnon")


def data() -> int:
    """Bytes that RLIMIT_DATA counts."""
    return _status("VmData")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell {name}")


def pack(source: Path, target: Path, form: str, limit: float) -> None:
    """Quantise a folder into another, a tensor at a time; runs in the limited process."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from luthier.models.quantised.formats import fits, kernels, quantise

    kernels()
    watch, before = Watch(), anonymous()
    allowed = data() + int(limit * 2**30) - before  # RssAnon counts what was touched, RLIMIT_DATA what was asked for
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    target.mkdir(parents=True, exist_ok=True)
    begun, read, written = time.perf_counter(), 0, 0
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for number, name in enumerate(opened.keys()):
                weight = opened.get_tensor(name)
                read += weight.nbytes
                keep = weight.ndim != 2 or "embed" in name or "head" in name or not fits(weight.shape[1], form)
                if keep:
                    tensors = {name: weight}
                else:
                    packed = quantise(weight, form)
                    layer = name.removesuffix(".weight")
                    tensors = {f"{layer}.codes": packed.codes, f"{layer}.scales": packed.scales}
                save_file(tensors, target / f"{file.stem}-{number}.safetensors")
                written += sum(tensor.nbytes for tensor in tensors.values())
                del weight, tensors
    seconds = time.perf_counter() - begun
    result = {
        "form": form, "read_gib": read / 2**30, "written_gib": written / 2**30, "seconds": seconds, "gib_per_second": read / 2**30 / seconds,
        "anon_before_gib": before / 2**30, "anon_peak_gib": watch.peak / 2**30, "limit_gib": limit, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print("RESULT " + json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--form", default="nf4", choices=["nf4", "int8", "fp8"])
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--limit-gib", type=float, default=2.0)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--pack", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, target = args.work / f"16bit-{args.layers}x{args.hidden}", args.work / f"packed-{args.form}"
    if args.pack:
        pack(source, target, args.form, args.limit_gib)
        return
    total = make(source, args.layers, args.hidden, args.vocabulary, random=args.random)
    print(f"{source}: {total / 1e9:.2f} billion parameters", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    done = subprocess.run([sys.executable, *sys.argv, "--pack"], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"it did not stay under {args.limit_gib} GiB:\n{done.stderr[-2000:]}")
    print(done.stdout.strip())


if __name__ == "__main__":
    main()
