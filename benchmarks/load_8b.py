"""Loading a model of Llama-3.1-8B's shape in nf4 and fp8: time against reading its bytes, device memory against arithmetic.

    python benchmarks/load_8b.py WORK [--layers 32] [--hidden 4096] [--precision nf4 fp8] [--toy]

Makes the folder in WORK on the local disk (16 GB of random numbers in bf16 for 32 layers; `--toy` makes a small one that
loads on a CPU), reads every byte of it once into one reused buffer as the yardstick, and loads it in a process of its own
for each precision. Host memory is anonymous memory (RssAnon, sampled), without what the imports and the device's context took before. Both times are with the files in the page cache where they fit; `--cold` asks the system to drop them first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {"q_proj": (1.0, 1.0), "k_proj": (0.25, 1.0), "v_proj": (0.25, 1.0), "o_proj": (1.0, 1.0)}
MLP = 3.5
VOCABULARY = 128256


def make(work: Path, layers: int, hidden: int, vocabulary: int) -> Path:
    """A folder as transformers writes it, a shard a layer, without ever holding the model."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder = work / f"llama-{layers}x{hidden}"
    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    inner, heads = int(MLP * hidden), hidden // 128 if hidden >= 1024 else 4
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 4, tie_word_embeddings=False, max_position_embeddings=131072, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=2, pad_token_id=0, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()

    def layer(index: int) -> dict[str, torch.Tensor]:
        name = f"model.layers.{index}"
        tensors = {f"{name}.self_attn.{key}.weight": drawn(int(rows * hidden), int(columns * hidden)) for key, (rows, columns) in SHAPES.items()}  # fmt: skip
        tensors |= {f"{name}.mlp.{key}.weight": drawn(inner, hidden) for key in ("gate_proj", "up_proj")}
        tensors[f"{name}.mlp.down_proj.weight"] = drawn(hidden, inner)
        norms = ("input_layernorm", "post_attention_layernorm")
        return tensors | {f"{name}.{key}.weight": torch.ones(hidden, dtype=torch.bfloat16) for key in norms}

    index: dict[str, str] = {}
    ends = {
        "model.embed_tokens.weight": drawn(vocabulary, hidden),
        "lm_head.weight": drawn(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for number, tensors in enumerate(_each(ends, layer, layers)):
        file = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    os.sync()
    return folder


def _each(ends, layer, layers):
    yield ends
    for number in range(layers):
        yield layer(number)


def read_bytes(folder: Path) -> tuple[int, float]:
    """Bytes of the weights, and the seconds to read them once into one reused buffer."""
    buffer, total, begun = bytearray(64 << 20), 0, time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as source:
            while count := source.readinto(buffer):
                total += count
    return total, time.perf_counter() - begun


def drop_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def arithmetic(folder: Path, precision: str) -> dict[str, float]:
    """GiB that the packed model must take: codes, fp32 scales, and what stays in bf16."""
    from luthier.artifacts.tensorfile import read_header

    codes = scales = rest = 0
    for file in folder.glob("*.safetensors"):
        for name, place in read_header(file)[0].items():
            shape = place.spec.shape
            if len(shape) == 2 and "embed" not in name and "lm_head" not in name:
                numbers = shape[0] * shape[1]
                codes += numbers // 2 if precision == "nf4" else numbers
                scales += 4 * (numbers // 64 if precision == "nf4" else shape[0])
            else:
                rest += place.spec.size
    return {"codes": codes / 2**30, "scales": scales / 2**30, "16 bits": rest / 2**30, "all": (codes + scales + rest) / 2**30}  # fmt: skip


LOAD = """
import json, sys, threading, time, logging
logging.disable(logging.WARNING)
import torch, luthier, luthier.loading, bitsandbytes, peft
folder, precision, device = sys.argv[1:4]
if device == "cuda":
    torch.zeros(1, device=device); torch.cuda.synchronize()
before = peak = 0
def anonymous():
    with open("/proc/self/status") as file:
        return int(next(line.split()[1] for line in file if line.startswith("RssAnon"))) * 1024
def look():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)
before = anonymous()
threading.Thread(target=look, daemon=True).start()
begun = time.perf_counter()
model, _ = luthier.load(folder, precision=precision, device=device)
if device == "cuda":
    torch.cuda.synchronize()
seconds = time.perf_counter() - begun
held = sum(p.numel() * p.element_size() for p in model.parameters())
result = dict(seconds=seconds, parameters_gib=held / 2**30, host_peak_gib=peak / 2**30, host_before_gib=before / 2**30)
if device == "cuda":
    result |= dict(device_gib=torch.cuda.memory_allocated() / 2**30, device_peak_gib=torch.cuda.max_memory_allocated() / 2**30, reserved_gib=torch.cuda.memory_reserved() / 2**30)
with torch.no_grad():
    result["finite"] = bool(torch.isfinite(model(torch.arange(3, 19, device=device)[None]).logits).all())
print("RESULT " + json.dumps(result))
"""


def load(folder: Path, precision: str, device: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder), precision, device], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise SystemExit(f"{precision} did not load:\n{done.stderr[-3000:]}")
    return json.loads(found[0].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--precision", nargs="+", default=["nf4", "fp8"])
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--toy", action="store_true", help="2 layers of 256, for a CPU")
    args = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers, hidden, vocabulary = (2, 256, 1024) if args.toy else (args.layers, args.hidden, VOCABULARY)
    begun = time.perf_counter()
    folder = make(args.work, layers, hidden, vocabulary)
    print(f"{folder}: made in {time.perf_counter() - begun:.0f} s", flush=True)
    print(
        "| precision | load s | reading the bytes s | ratio | GB/s | device GiB | arithmetic GiB | off by | device peak GiB | host peak GiB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for precision in args.precision:
        if args.cold:
            drop_cache(folder)
        size, reading = read_bytes(folder)
        if args.cold:
            drop_cache(folder)
        found, wanted = load(folder, precision, device), arithmetic(folder, precision)
        held = found.get("device_gib", found["parameters_gib"])
        print(
            f"| {precision} | {found['seconds']:.2f} | {reading:.2f} | {found['seconds'] / reading:.2f} | {size / found['seconds'] / 1e9:.2f} | "
            f"{held:.3f} | {wanted['all']:.3f} (scales {wanted['scales']:.3f}) | {100 * (held / wanted['all'] - 1):+.2f} % | {found.get('device_peak_gib', 0):.2f} | {found['host_peak_gib'] - found['host_before_gib']:.2f} |",
            flush=True,
        )
        print(
            json.dumps({"precision": precision, **found, "bytes": size, "reading": reading, "arithmetic": wanted}),
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
