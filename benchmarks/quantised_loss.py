"""What a base in int8, nf4 or fp8 costs in held-out loss and score, and how its products compare in speed.

    python benchmarks/quantised_loss.py WORK --model FOLDER_OR_GGUF [--forms bf16 int8 nf4 fp8] [--seeds 0 1 2] [--steps 80]
                                        [--held-out 200] [--generate 40] [--batch 2] [--products-only]

Fine-tunes one model on the demo's data (support messages to JSON) with LoRA, the same batches and rates for every form, and
writes WORK/results.json, WORK/table.md and WORK/curves.svg. First it times one forward and backward pass of each way to
multiply, and measures the untrained base's held-out loss with it: that is what decides between weight-only int8 and LLM.int8().
Runs that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

FORMS = ("bf16", "int8", "nf4", "fp8")
COLOURS = {"bf16": "#444444", "int8": "#1f77b4", "nf4": "#d62728", "fp8": "#2ca02c", "fp8-storage": "#9467bd"}
LIMITS = {"int8": 0.5, "nf4": 2.5, "fp8": 0.5}
"""Per cent of bf16's held-out loss that each form may cost."""
PRODUCTS = {  # name: precision, and how its layers multiply
    "bf16": ("bf16", None),
    "int8, weights only": ("int8", "16 bits"),
    "int8, LLM.int8()": ("int8", "llm.int8"),
    "nf4": ("nf4", "16 bits"),
    "fp8 as storage": ("fp8", "16 bits"),
    "fp8 products": ("fp8", "fp8"),
}


def as_folder(model: Path, work: Path) -> Path:
    """A GGUF is unpacked once, so that every run starts from the same 16-bit folder."""
    if model.is_dir():
        return model
    folder = work / "base"
    if not (folder / "config.json").is_file():
        import luthier

        opened, tokenizer = luthier.load(model, precision="bf16", device="cpu")
        opened.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def run_config(args: argparse.Namespace, base: Path, form: str, seed: int) -> dict[str, Any]:
    from luthier.demo.run import DATA, LONGEST_ANSWER

    return {
        "model": {"path": str(base), "precision": form},
        "data": {
            "train": str(DATA / "train.jsonl"),
            "eval": {"path": str(DATA / "heldout.jsonl"), "limit": args.held_out},
        },
        "adapter": {"type": "lora", "r": 8, "target": "all-linear"},
        "optim": {"lr": args.lr, "warmup": 0.1},
        "train": {"steps": args.steps, "batch_samples": args.batch, "max_length": 512, "seed": seed},
        "evaluate": {"every": max(1, args.steps // 8), "generate": args.generate, "max_new_tokens": LONGEST_ANSWER, "metrics": ["json"] if args.generate else []},
        "checkpoint": {"every": args.steps, "keep": 1},
        "output": str(args.work / f"{form}-{seed}"),
    }  # fmt: skip


def fine_tune(args: argparse.Namespace, base: Path, form: str, seed: int) -> dict[str, Any]:
    from luthier.config.read import parse_run
    from luthier.training.run import train

    begun = time.perf_counter()
    run = train(parse_run(run_config(args, base, form, seed)), say=lambda line: None)
    evaluations = [record for record in run.metrics if record["kind"] == "eval"]
    return {
        "form": form,
        "seed": seed,
        "curve": [[record["step"], record["eval_loss"]] for record in evaluations],
        "loss": evaluations[-1]["eval_loss"],
        "base_loss": evaluations[0]["eval_loss"],
        "score": evaluations[-1].get("metric/json"),
        "memory_gib": max(record["memory_gib"] for record in run.metrics if record["kind"] == "train"),
        "proof": run.proof["says"],
        "seconds": round(time.perf_counter() - begun, 1),
    }


def products(base: Path, device: str, held_out: int, tokens: int) -> list[dict[str, Any]]:
    """The untrained base's held-out loss, and the time of one pass forward and back to the embeddings, by way to multiply."""
    import torch

    import luthier
    from luthier.demo.run import DATA
    from luthier.models.quantised.layer import quantised_layers

    rows = []
    opened, model = None, None
    for name, (precision, multiplies) in PRODUCTS.items():
        if precision != opened:
            model, tokenizer = luthier.load(base, precision=precision, device=device)
            opened = precision
        for layer in quantised_layers(model):
            layer.multiplies = multiplies
        total, count = 0.0, 0
        with torch.no_grad(), open(DATA / "heldout.jsonl", encoding="utf-8") as file:
            for _, line in zip(range(held_out), file, strict=False):
                messages = json.loads(line)["messages"]
                text = tokenizer.apply_chat_template(messages, tokenize=False)
                ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], device=device)
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
        ids = torch.randint(0, 1000, (4, tokens // 4), device=device)
        times = []
        for _ in range(8 if device != "cpu" else 3):
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            begun = time.perf_counter()
            model(inputs_embeds=embedded, use_cache=False).logits.float().square().mean().backward()
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        rows.append({"name": name, "base_loss": total / count, "seconds": statistics.median(times[1:])})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(results: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    lines = [
        "| base | held-out loss (each seed) | mean | against bf16 | allowed | score | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    means = {form: statistics.mean(one["loss"] for one in results if one["form"] == form) for form in {one["form"] for one in results}}  # fmt: skip
    for form in FORMS:
        mine = [one for one in results if one["form"] == form]
        if not mine:
            continue
        change = f"{100 * (means[form] / means['bf16'] - 1):+.2f} %" if "bf16" in means else ""
        scores = [one["score"] for one in mine if one["score"] is not None]
        score = f"{100 * statistics.mean(scores):.1f} %" if scores else ""
        limit = f"{LIMITS[form]} %" if form in LIMITS else ""
        losses = ", ".join(f"{one['loss']:.4f}" for one in mine)
        memory = max(one["memory_gib"] for one in mine)
        lines.append(f"| {form} | {losses} | {means[form]:.4f} | {change} | {limit} | {score} | {memory:.2f} |")
    if rows:
        lines += ["", "| product | untrained base's loss on whole conversations | forward and backward, s |", "| --- | --- | --- |"]  # fmt: skip
        lines += [f"| {row['name']} | {row['base_loss']:.4f} | {row['seconds']:.4f} |" for row in rows]
    return "\n".join(lines) + "\n"


def curves(results: list[dict[str, Any]], title: str) -> str:
    """Held-out loss over steps, one thin line a seed, as one SVG; the loss is drawn on a logarithmic scale."""
    import math

    width, height, left, top, bottom = 760, 420, 60, 40, 40
    points = [point for one in results for point in one["curve"] if point[1]]
    last = max(step for step, _ in points) or 1
    low, high = (bound(math.log(loss) for _, loss in points) for bound in (min, max))
    span = (high - low) or 1.0

    def place(step: float, loss: float) -> str:
        x = left + (width - left - 90) * step / last
        y = top + (height - top - bottom) * (1 - (math.log(loss) - low) / span)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="22" font-size="14">{title}</text>',
    ]
    for share in range(5):
        loss = math.exp(low + span * share / 4)
        y = float(place(0, loss).split(",")[1])
        parts.append(f'<path d="M{left} {y:.1f}H{width - 90}" stroke="#dddddd"/><text x="8" y="{y + 4:.1f}">{loss:.3f}</text>')  # fmt: skip
    for share in range(5):
        step = last * share / 4
        x = float(place(step, math.exp(low)).split(",")[0])
        parts.append(f'<text x="{x - 8:.1f}" y="{height - 18}">{step:g}</text>')
    parts.append(f'<text x="{width / 2 - 40}" y="{height - 2}">optimiser step</text>')
    for place_in_list, form in enumerate(dict.fromkeys(one["form"] for one in results)):
        mine = [one for one in results if one["form"] == form]
        for one in mine:
            line = " ".join(place(step, loss) for step, loss in one["curve"])
            parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[form]}" stroke-opacity="0.8"/>')
        if mine:
            y = top + 18 * place_in_list
            parts.append(f'<text x="{width - 78}" y="{y + 10}" fill="{COLOURS[form]}">{form}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=2, help="samples an optimiser step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument(
        "--generate", type=int, default=40, help="held-out samples to score at each evaluation; 0 for none"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of the timed pass")
    parser.add_argument("--products-only", action="store_true")
    parser.add_argument("--no-products", action="store_true")
    args = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    base = as_folder(args.model, args.work)
    store = args.work / "results.json"
    results = json.loads(store.read_text()) if store.is_file() else []
    rows = [] if args.no_products else products(base, device, min(args.held_out, 40), args.tokens)
    for seed in args.seeds if not args.products_only else ():
        for form in args.forms:
            if any((one["form"], one["seed"]) == (form, seed) for one in results):
                continue
            results.append(fine_tune(args, base, form, seed))
            store.write_text(json.dumps(results, indent=1))
            print(json.dumps({key: value for key, value in results[-1].items() if key != "curve"}), flush=True)
    text = table(results, rows)
    (args.work / "table.md").write_text(text)
    if results:
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        (args.work / "curves.svg").write_text(curves(results, f"Held-out loss, LoRA r8 on {args.model.name}, {name}"))
    print(text)


if __name__ == "__main__":
    main()
