"""A model of 13 billion parameters quantised on a small machine, under a limit on its memory.

    python benchmarks/quantise_13b.py WORK [--form nf4] [--part export] [--layers 40] [--hidden 5120] [--limit-gib 2.0] [--random]

Makes the 16-bit folder in WORK, a shard a layer (26 GB; sparse files of zeros, or random numbers with --random), then, each in a
process of its own:

    export      `luthier export SRC DST --to quantized --format FORM --no-proof`: the folder that plain libraries open. The proof would
                open the whole model in plain transformers, and is left out.
    load        `luthier.load(SRC, precision=FORM)`: the peak is compared with what the quantised model itself takes.

That process watches its own anonymous memory (RssAnon: what can't be dropped when memory is short, which the pages of mapped
files can) and is refused memory by its data limit (RLIMIT_DATA) beyond `--limit-gib` in all (8 for load), imports included.
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


def inner_size(hidden: int) -> int:
    return int(hidden * 2.7) // 64 * 64


def shapes(layers: int, hidden: int, vocabulary: int) -> list[dict[str, list[int]]]:
    inner = inner_size(hidden)
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
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": inner_size(hidden), "num_hidden_layers": layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
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


def limited(part: str, source: Path, target: Path, form: str, limit: float) -> None:
    """Run one part under its limit, and print what it took."""
    import torch
    from peft import PeftModel  # noqa: F401  # imports come before the limit is set, and are counted in it

    import luthier
    from luthier import cli, loading  # noqa: F401
    from luthier.export import quantised  # noqa: F401
    from luthier.models.quantised.formats import kernels

    kernels()
    watch, before = Watch(), anonymous()
    allowed = data() + int(limit * 2**30) - before  # RssAnon counts what was touched, RLIMIT_DATA what was asked for
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    begun, held = time.perf_counter(), 0
    if part == "export":
        code = cli.main(["export", str(source), str(target), "--to", "quantized", "--format", form, "--no-proof"])
        if code:
            raise SystemExit(code)
    else:
        model, _ = luthier.load(source, precision=form, device="cpu")
        held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    seconds = time.perf_counter() - begun
    read = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    written = sum(file.stat().st_size for file in target.glob("*.safetensors")) if part == "export" else 0
    result = {
        "part": part, "form": form, "read_gib": read / 2**30, "written_gib": written / 2**30, "held_gib": held / 2**30, "seconds": seconds,
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
    parser.add_argument("--limit-gib", type=float, help="2 for export, 8 for load")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--part", choices=["export", "load"], help="both, if left out")
    parser.add_argument("--inside", choices=["export", "load"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, target = args.work / f"16bit-{args.layers}x{args.hidden}", args.work / f"packed-{args.form}"
    if args.inside:
        limited(args.inside, source, target, args.form, args.limit_gib or {"export": 2.0, "load": 8.0}[args.inside])
        return
    total = make(source, args.layers, args.hidden, args.vocabulary, random=args.random)
    print(f"{source}: {total / 1e9:.2f} billion parameters", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    for part in [args.part] if args.part else ["export", "load"]:
        done = subprocess.run([sys.executable, *sys.argv, "--inside", part], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{part} did not stay under its limit, or failed:\n{done.stderr[-2000:]}")
        print(done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
