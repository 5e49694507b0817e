"""A sharded checkpoint (4 ranks) to transformers form in a stream, against `cp` of the same files and torch's own converters.

    python benchmarks/sharded.py --size 3b [--turns 1] [--without-torch] [--folder DIR]
    python benchmarks/sharded.py --size small --make FOLDER      only makes the checkpoint, and FOLDER/base

Makes the model (Llama's shape, random bf16 weights) as four gloo processes save it through torch.distributed.checkpoint, in both
of its forms. Then in turns, each in a process of its own, the page cache dropped of the files before: `cp` and `sync` of the
files; the conversion (streaming alone: the read-back and the check against the architecture are timed apart); casting to fp32, re-sharding,
`verify`, hashing. Ratios of the medians, the peak of anonymous memory (RssAnon, sampled), and `dcp_to_torch_save` and
`consolidate_safetensors_files` beside it are printed as one JSON object. Needs about five times the model's size on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
from pathlib import Path

from processes import timed

SIZES = {"tiny": (1, 256, 512, 1000), "small": (4, 2048, 5632, 32000), "1b": (16, 2048, 8192, 32000), "3b": (28, 3072, 8192, 128256)}  # fmt: skip
RANKS = 4
PRELUDE = "import sys;from pathlib import Path;"
CONVERT = PRELUDE + (
    "from luthier.artifacts.ahead import read_for_export;read_for_export(Path(sys.argv[1]),None);"  # as the verb does
    "from luthier.export.sharded.bare import stream_bare as s;from luthier.export.sharded.source import bare_weights as w;"
    "s(w(Path(sys.argv[1])),Path(sys.argv[3]),base=Path(sys.argv[2]),dtype=sys.argv[4] or None,shard_bytes=int(sys.argv[5]));"
    "assert not {'transformers','peft'} & set(sys.modules)"
)
CHECK = (
    PRELUDE + "from luthier.export.architecture import check_architecture as c;c(Path(sys.argv[1]),Path(sys.argv[1]))"
)
VERIFY = PRELUDE + "from luthier.artifacts.verify import verify_all as v;sys.exit(not v(Path(sys.argv[1])).whole)"
B3SUM = PRELUDE + (
    "import blake3;[print(blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(str(p)).hexdigest())"
    " for p in sorted(Path(sys.argv[1]).glob('*.safetensors'))]"
)
FINGERPRINT = PRELUDE + "from luthier.artifacts.fingerprint import of_folder as f;print(f(Path(sys.argv[1])))"
DCP = (
    "import sys;from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as d;d(sys.argv[1],sys.argv[2])"
)
CONSOLIDATE = PRELUDE + (
    "from safetensors import safe_open;from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files as c;"
    "names={n for p in Path(sys.argv[1]).glob('*.safetensors') for n in safe_open(p,'pt').keys()};"
    "Path(sys.argv[2]).mkdir();c(sys.argv[1],sys.argv[2],dict.fromkeys(names,1))"
)


def shapes_of(layers: int, hidden: int, inner: int, vocab: int) -> dict[str, tuple[int, ...]]:
    heads, keys = hidden // 128, max(1, hidden // 384)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        own = {
            "self_attn.q_proj": (heads * 128, hidden), "self_attn.k_proj": (keys * 128, hidden),
            "self_attn.v_proj": (keys * 128, hidden), "self_attn.o_proj": (hidden, heads * 128),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def save(rank: int, folder: Path, size: tuple[int, int, int, int], port: int, form: str) -> None:
    """One rank: its rows of every tensor, at random, saved by torch.distributed.checkpoint."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,))
    tensors = {}
    for number, (name, shape) in enumerate(shapes_of(*size).items()):
        torch.manual_seed(number * RANKS + rank)
        rows = -(-shape[0] // RANKS)
        count = max(0, min(rows, shape[0] - rank * rows))
        local = torch.empty((count, *shape[1:]), dtype=torch.bfloat16).normal_(0, 0.02)
        stride = tuple(torch.empty(shape, device="meta").stride())
        tensors[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)  # fmt: skip
    if form == "distcp":
        dcp.save({"model": tensors}, storage_writer=dcp.FileSystemWriter(folder))
    else:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    dist.destroy_process_group()


def make(folder: Path, size: tuple[int, int, int, int], forms: tuple[str, ...]) -> None:
    import torch.multiprocessing as mp

    layers, hidden, inner, vocab = size
    base = folder / "base"
    base.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 128, "num_key_value_heads": max(1, hidden // 384),
        "head_dim": 128, "vocab_size": vocab, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    for form in forms:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(save, (folder / form, size, port, form), nprocs=RANKS)
    os.sync()


def measure(folder: Path, turns: int, with_torch: bool) -> dict[str, object]:
    python = [sys.executable, "-c"]
    distcp, hf, base = folder / "distcp", folder / "hf", folder / "base"
    out, cast, again = folder / "out", folder / "cast", folder / "again"
    whole = str(4 * 2**30)
    found: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, command: list[str], target: Path | None, *, keep: bool = False) -> None:
        found.setdefault(name, []).append(timed(command, folder, target))
        if target is not None and not keep:
            shutil.rmtree(target, ignore_errors=True)
            target.unlink(missing_ok=True)

    for _ in range(turns):
        note("cp", ["sh", "-c", f"cp -r {distcp} {out} && sync {out}/* {out}/.metadata"], out)
        note("hf_to_transformers", [*python, CONVERT, str(hf), str(base), str(out), "", whole], out)
        note("distcp_to_transformers", [*python, CONVERT, str(distcp), str(base), str(out), "", whole], out, keep=True)
        note("architecture_check", [*python, CHECK, str(out)], None)
        note("verify", [*python, VERIFY, str(out)], None)
        note("b3sum", [*python, B3SUM, str(out)], None)
        note("fingerprint", [*python, FINGERPRINT, str(out)], None)
        note("reshard", [sys.executable, "-m", "luthier", "export", str(out), str(again), "--to", "transformers", "--shard-size", "1GB", "--no-proof"], again)  # fmt: skip
        shutil.rmtree(out)
        note("cast_to_fp32", [*python, CONVERT, str(distcp), str(base), str(cast), "fp32", whole], cast)
    if with_torch:
        note("dcp_to_torch_save", [*python, DCP, str(distcp), str(out)], out)
        note("consolidate_safetensors_files", [*python, CONSOLIDATE, str(hf), str(out)], out)
    middle = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
    best = {name: min(seconds for seconds, _ in runs) for name, runs in found.items()}
    return {
        "seconds": {name: [round(seconds, 2) for seconds, _ in runs] for name, runs in found.items()},
        "ratio_to_cp": {name: round(seconds / middle["cp"], 3) for name, seconds in middle.items() if name != "cp"},
        "ratio_to_cp_of_the_shortest": {
            name: round(seconds / best["cp"], 3) for name, seconds in best.items() if name != "cp"
        },
        "ratio_to_b3sum": {name: round(middle[name] / middle["b3sum"], 3) for name in ("verify", "fingerprint")},
        "peak_anonymous_mib": {name: round(max(peak for _, peak in runs)) for name, runs in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--make", type=Path)
    options = parser.parse_args()
    if options.make:
        make(options.make, SIZES[options.size], ("distcp",))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        make(folder, SIZES[options.size], ("distcp", "hf"))
        size = sum(path.stat().st_size for path in (folder / "distcp").iterdir())
        print(json.dumps({"size": options.size, "bytes": size, **measure(folder, options.turns, not options.without_torch)}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
