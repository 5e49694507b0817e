"""Held-out loss of LoRA on a base in bf16, int8, nf4 and fp8, in a plain loop: the same batches and rates for every form.

    python benchmarks/quantised_loop.py WORK --model FOLDER_OR_GGUF [--forms bf16 int8 nf4 fp8] [--seeds 0 1 2] [--steps 60]
                                        [--batch 8] [--held-out 128] [--lr 5e-4] [--answers] [--jobs 1]

The demo's conversations, loss over all their tokens (`--answers`: the assistant's only). Writes WORK/loop.json and
WORK/loop.svg (curves), prints a table. `--jobs` runs several at a time, each in a process of its own. quantised_loss.py does the same through `luthier train`, with the task's score and
the proof of every run, which takes longer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from quantised_loss import FORMS, LIMITS, as_folder, curves

PLAIN = "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
STORED = "fp8-storage"  # fp8 codes as storage: dequantised, and multiplied in 16 bits


def encoded(tokenizer: Any, path: Path, limit: int | None, answers: bool) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each conversation."""
    if tokenizer.chat_template is None:  # a base model; one plain form serves for all
        tokenizer.chat_template = PLAIN
    samples = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            messages = json.loads(line)["messages"]
            ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)[
                "input_ids"
            ]
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            masked = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if answers else 0
            samples.append((ids, [-100] * masked + ids[masked:]))
            if limit and len(samples) == limit:
                break
    return samples


def batch_of(samples: list[tuple[list[int], list[int]]], pad: int, device: str) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in samples)
    rows = {
        "input_ids": [ids + [pad] * (longest - len(ids)) for ids, _ in samples],
        "attention_mask": [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in samples],
        "labels": [labels + [-100] * (longest - len(labels)) for _, labels in samples],
    }
    return {name: torch.tensor(values, device=device) for name, values in rows.items()}


@torch.no_grad()
def held_out_loss(model: Any, samples: list[tuple[list[int], list[int]]], pad: int, device: str) -> float:
    """Mean over the tokens that carry a label."""
    model.eval()
    total, count = 0.0, 0
    for at in range(0, len(samples), 16):
        batch = batch_of(samples[at : at + 16], pad, device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        total += float(
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum")
        )
        count += int((labels != -100).sum())
    return total / count


def train(args: argparse.Namespace, base: Path, form: str, seed: int, device: str) -> dict[str, Any]:
    import luthier
    from luthier.config.schema import AdapterConfig
    from luthier.demo.run import DATA
    from luthier.models.adapters import attach
    from luthier.models.quantised.layer import quantised_layers

    begun = time.perf_counter()
    model, tokenizer = luthier.load(base, precision="fp8" if form == STORED else form, device=device)
    if form == STORED:
        for layer in quantised_layers(model):
            layer.multiplies = "16 bits"
    source = SimpleNamespace(model=model, source=SimpleNamespace(name=str(base), revision=None))
    model = attach(source, AdapterConfig(type="lora", r=8, target="all-linear"), base_name=str(base), seed=seed)
    samples = encoded(tokenizer, DATA / "train.jsonl", None, args.answers)
    held_out = encoded(tokenizer, DATA / "heldout.jsonl", args.held_out, args.answers)
    pad = tokenizer.pad_token_id or 0
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    curve = [[0, held_out_loss(model, held_out, pad, device)]]
    for step in range(args.steps):
        chosen = [samples[order[(step * args.batch + i) % len(order)]] for i in range(args.batch)]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 6) * (1 - step / args.steps)
        model.train()
        model(**batch_of(chosen, pad, device)).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, args.steps // 6) == 0 or step + 1 == args.steps:
            curve.append([step + 1, held_out_loss(model, held_out, pad, device)])
    return {"form": form, "seed": seed, "curve": curve, "loss": curve[-1][1], "base_loss": curve[0][1], "seconds": round(time.perf_counter() - begun, 1)}  # fmt: skip


def train_one(run: tuple[Any, ...]) -> dict[str, Any]:
    return train(*run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=[*FORMS, STORED])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--answers", action="store_true", help="loss over the assistant's tokens only")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    base = as_folder(args.model, args.work)
    results = []
    runs = [(args, base, form, seed, device) for seed in args.seeds for form in args.forms]
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        for result in pool.imap(train_one, runs, chunksize=1):
            results.append(result)
            print(json.dumps({key: value for key, value in results[-1].items() if key != "curve"}), flush=True)
            (args.work / "loop.json").write_text(json.dumps(results, indent=1))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    (args.work / "loop.svg").write_text(curves(results, f"Held-out loss, LoRA r8, {name}"))
    plain = {one["seed"]: one["loss"] for one in results if one["form"] == "bf16"}
    print("| base | untrained | trained, each seed | against bf16, each seed | mean | allowed |\n| --- | --- | --- | --- | --- | --- |")  # fmt: skip
    for form in args.forms:
        mine = [one for one in results if one["form"] == form]
        changes = [100 * (one["loss"] / plain[one["seed"]] - 1) for one in mine if one["seed"] in plain]
        told = ", ".join(f"{change:+.2f} %" for change in changes)
        mean = f"{statistics.mean(changes):+.2f} %" if changes else ""
        losses = ", ".join(f"{one['loss']:.4f}" for one in mine)
        print(f"| {form} | {mine[0]['base_loss']:.4f} | {losses} | {told} | {mean} | {LIMITS.get(form, '')} |")


if __name__ == "__main__":
    main()
