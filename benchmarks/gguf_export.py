"""Writing a model as GGUF in a stream: seconds beside `cp` of its files, throughput, and the peak of anonymous memory.

    python benchmarks/gguf_export.py --size small [--quants F16,Q8_0,Q6_K,Q4_K_M] [--folder DIR]

Makes the model (Llama's shape, random bf16 weights, written in a stream) with the tests' small tokenizer, then `cp` and `sync` of its files,
then each quantisation in a process of its own and without the proof; the page cache is dropped of the files before each. Memory is
RssAnon, sampled; `idle` is a process that imports the same (torch, and transformers for config and tokenizer) and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from merge import SIZES, make, timed

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import make_tokenizer

EXPORT = "import sys;from pathlib import Path;from luthier.export.gguf.write import export_gguf as e;e(Path(sys.argv[1]),Path(sys.argv[2]),quant=sys.argv[3],prove=False)"
IDLE = "import sys;from pathlib import Path;from luthier.export.gguf import write as g;g.open_config(Path(sys.argv[1]));g.open_tokenizer(Path(sys.argv[1]))"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--quants", default="F16,Q8_0,Q6_K,Q4_K_M")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        make(folder, *SIZES[options.size])
        base, out = folder / "base", folder / "out"
        make_tokenizer(base)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        copied, _ = timed(["sh", "-c", f"cp -r {base} {out} && sync {out}/*"], folder, out)
        started, idle = timed([sys.executable, "-c", IDLE, str(base)], folder, out)
        told = {"size": options.size, "bytes": size, "cp_seconds": round(copied, 2), "idle_seconds": round(started, 2), "idle_mib": round(idle)}  # fmt: skip
        print(json.dumps(told), flush=True)
        for quant in options.quants.split(","):
            seconds, peak = timed([sys.executable, "-c", EXPORT, str(base), str(out), quant], folder, out)
            rate = size / 1e6 / max(seconds - started, 1e-9)
            print(json.dumps({"quant": quant, "seconds": round(seconds, 2), "mb_per_second": round(rate, 1), "peak_mib": round(peak), "above_idle_mib": round(peak - idle)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
