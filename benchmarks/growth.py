"""Merging models of half a billion to eight billion parameters: seconds beside `cp` of the same files, and memory.

    python benchmarks/growth.py WORK [--sizes 0.5 1 2 4 8] [--turns 1]

Makes each model in turn (Llama's shape, random bf16 weights) with an adapter (r 16, all linear layers), copies it with `cp` and
`sync`, merges it with `luthier export … --no-proof` in a process of its own, and removes it. Writes WORK/growth.json and
WORK/growth.svg. Needs twice the largest model's size on disk (32 GB for 8 billion).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from merge import make
from processes import timed

SHAPES = {  # billions of parameters: layers, hidden size, inner size, vocabulary
    "0.5": (8, 2048, 8192, 32000),
    "1": (16, 2048, 8192, 32000),
    "2": (19, 3072, 8192, 32000),
    "4": (39, 3072, 8192, 32000),
    "8": (36, 4096, 14336, 32000),
}
WIDTH, HEIGHT, LEFT, TOP = 340, 240, 52, 34


def measure(folder: Path, size: str, turns: int) -> dict[str, Any]:
    make(folder, *SHAPES[size])
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    merge = [sys.executable, "-m", "luthier", "export", str(adapter), str(out), "--to", "merged", "--base", str(base), "--no-proof"]  # fmt: skip
    copies, merges = [], []
    for _ in range(turns):
        copies.append(timed(["sh", "-c", f"cp -r {base} {out} && sync {out}/*"], folder, out)[0])
        merges.append(timed(merge, folder, out))
    count = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 2
    shutil.rmtree(folder)
    return {
        "billions": round(count / 1e9, 2),
        "cp_seconds": round(statistics.median(copies), 2),
        "merge_seconds": round(statistics.median(seconds for seconds, _ in merges), 2),
        "merge_mib": round(max(peak for _, peak in merges)),
    }


def panel(x: int, title: str, lines: dict[str, list[tuple[float, float]]], most: float) -> list[str]:
    """One plot: what is drawn over billions of parameters, from zero on both axes."""
    widest = max(at for points in lines.values() for at, _ in points)

    def place(at: float, value: float) -> str:
        return f"{x + LEFT + at / widest * (WIDTH - LEFT - 20):.1f},{TOP + HEIGHT - value / most * HEIGHT:.1f}"

    parts = [f'<text x="{x + LEFT}" y="20" font-size="13">{title}</text>']
    for share in (0, 0.5, 1):
        y = TOP + HEIGHT - share * HEIGHT
        parts += [f'<path d="M{x + LEFT} {y}H{x + WIDTH - 20}" stroke="#dddddd"/>', f'<text x="{x + LEFT - 6}" y="{y + 4}" text-anchor="end">{share * most:g}</text>']  # fmt: skip
    for at in (0, widest / 2, widest):
        parts.append(
            f'<text x="{place(at, 0).split(",")[0]}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{at:.1f} B</text>'
        )
    for (name, points), colour in zip(lines.items(), ("#1f77b4", "#999999"), strict=False):
        parts.append(f'<polyline points="{" ".join(place(*point) for point in points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')  # fmt: skip
        parts += [f'<circle cx="{place(*p).split(",")[0]}" cy="{place(*p).split(",")[1]}" r="3" fill="{colour}"/>' for p in points]  # fmt: skip
        left, top = place(*points[-1]).split(",")
        parts.append(
            f'<text x="{float(left) - 8}" y="{float(top) - 8}" text-anchor="end" fill="{colour}">{name}</text>'
        )
    return parts


def drawn(found: list[dict[str, Any]]) -> str:
    """Seconds and memory over the number of parameters, as one SVG."""

    def over(key: str) -> list[tuple[float, float]]:
        return [(one["billions"], one[key]) for one in found]

    slowest = max(max(one["merge_seconds"], one["cp_seconds"]) for one in found)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {TOP + HEIGHT + 30}" font-family="sans-serif" font-size="11">',
        f'<rect width="{2 * WIDTH}" height="{TOP + HEIGHT + 30}" fill="white"/>',
        *panel(
            0, "seconds", {"merge": over("merge_seconds"), "cp and sync": over("cp_seconds")}, 10 * (slowest // 10 + 1)
        ),
        *panel(WIDTH, "anonymous memory while merging, MiB", {"merge": over("merge_mib")}, 1024),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    found = []
    for size in options.sizes:
        found.append(measure(options.work / size, size, options.turns))
        print(json.dumps(found[-1]), flush=True)
        (options.work / "growth.json").write_text(json.dumps(found, indent=1))
        (options.work / "growth.svg").write_text(drawn(found))


if __name__ == "__main__":
    main()
