"""One GPU: tokens per second beside plain transformers + peft, the stall of a save, and a resume bit for bit.

    python benchmarks/gpu.py WORK_FOLDER [--layers 16] [--steps 24] [--only speed|resume] [--train LoRA|full]

Makes a Llama of Llama-3.2-1B's shape with random weights, and text whose rows are exactly full, so that both sides
compute the same numbers of tokens without padding or masks. Ours is the whole of ``luthier train`` in a process of its
own, read from its metrics.jsonl; the other side is what one writes by hand. Prints a table last.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROWS, LENGTH = 4, 2048


def make_inputs(work: Path, layers: int, hidden: int, vocab: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny import make_tokenizer

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=131072, rms_norm_eps=1e-5,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(work / "model")
    make_tokenizer(work / "model")
    draw = random.Random(0)
    words = [w for w in Path(__file__).read_text().split() if w.isalpha()]
    with open(work / "text.jsonl", "w") as file:  # long documents, split into full rows
        for _ in range(8):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=90_000))}) + "\n")


def run_file(work: Path, name: str, *, adapter: bool, deterministic: bool, steps: int) -> Path:
    values = {
        "model": {"path": str(work / "model"), "precision": "bf16"},
        "data": {"train": str(work / "text.jsonl"), "too_long": "split"},
        "method": "pretrain",
        "adapter": {"type": "lora", "r": 16, "alpha": 16} if adapter else "none",
        "optim": {"lr": 1e-4, "schedule": "constant", "warmup": 0},
        "train": {"steps": steps, "batch_tokens": ROWS * LENGTH, "micro_batch": ROWS, "max_length": LENGTH, "deterministic": deterministic},
        "checkpoint": {"every": steps // 2, "keep": 2},
        "output": str(work / name),
    }  # fmt: skip
    path = work / f"{name}.yaml"
    path.write_text(json.dumps(values))
    return path


def luthier(*arguments: str, stop_at: tuple[Path, int] | None = None) -> str:
    """Run a verb; with ``stop_at`` send SIGTERM once that run's metrics hold that step."""
    process = subprocess.Popen([sys.executable, "-m", "luthier", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    if stop_at:
        metrics, step = stop_at
        while process.poll() is None and not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    if process.returncode not in (0, 75):
        raise SystemExit(f"luthier {' '.join(arguments)} ended with {process.returncode}:\n{output[-4000:]}")
    return output


def ours(work: Path, name: str, *, adapter: bool, deterministic: bool, steps: int) -> dict:
    begun = time.perf_counter()
    output = luthier("train", str(run_file(work, name, adapter=adapter, deterministic=deterministic, steps=steps)))
    records = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    trained = [r for r in records if r["kind"] == "train"]
    saves = [r for r in records if r["kind"] == "checkpoint"]
    speed = statistics.median(r["tokens_per_second"] for r in trained[len(trained) // 2 + 1 :])
    proof = json.loads((work / name / "final" / "proof.json").read_text())
    return {
        "side": f"luthier, {name}", "tokens_per_second": round(speed), "memory_gib": round(trained[-1]["memory_gib"], 1),
        "loss": round(trained[-1]["loss"], 3), "checkpoint_gib": round(saves[-1]["bytes"] / 2**30, 2),
        "stall_s": [round(s["stall_seconds"], 3) for s in saves], "save_s": [round(s["seconds"], 2) for s in saves],
        "proof": f"{proof['verdict']} {proof['max_difference']:g} bound {proof['bound']:g} effect {proof['effect']}",
        "whole_s": round(time.perf_counter() - begun, 1), "first_line": output.splitlines()[0][:80],
    }  # fmt: skip


def plain(work: Path, *, adapter: bool, steps: int) -> dict:
    """transformers + peft by hand, in a process of its own: autocast to bf16, fused AdamW, the same rows."""
    code = f"""
import json, time, torch, statistics
from transformers import AutoModelForCausalLM
adapter = {adapter}
model = AutoModelForCausalLM.from_pretrained({str(work / "model")!r}, dtype=torch.bfloat16 if adapter else torch.float32).cuda()
if adapter:
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True, weight_decay=0.0)
times = []
for step in range({steps}):
    ids = torch.randint(0, 300, ({ROWS}, {LENGTH}), device="cuda")
    torch.cuda.synchronize(); begun = time.perf_counter()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step(); optimizer.zero_grad()
    torch.cuda.synchronize(); times.append(time.perf_counter() - begun)
half = times[len(times) // 2 + 1:]
print("RESULT " + json.dumps(dict(tokens_per_second=round({ROWS * LENGTH} / statistics.median(half)), memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1), loss=round(float(loss), 3))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    side = f"plain transformers{' + peft' if adapter else ''}, {'LoRA' if adapter else 'full'}"
    return {
        "side": side,
        **(json.loads(found[0][7:]) if found else {"error": done.stderr.strip().splitlines()[-1][:200]}),
    }


def resume_is_exact(work: Path, *, adapter: bool) -> dict:
    """Stop a run on request in its middle, resume it, and compare every byte of the last checkpoint."""
    steps, name = 12, "adapter" if adapter else "full"
    luthier("train", str(run_file(work, f"whole-{name}", adapter=adapter, deterministic=True, steps=steps)))
    file = run_file(work, f"parts-{name}", adapter=adapter, deterministic=True, steps=steps)
    luthier("train", str(file), stop_at=(work / f"parts-{name}" / "metrics.jsonl", 4))
    stopped = sorted(p.name for p in (work / f"parts-{name}" / "checkpoints").iterdir())[-1]
    luthier("resume", str(work / f"parts-{name}"))
    left, right = (work / f"{kind}-{name}" / "checkpoints" / f"step-{steps:08d}" for kind in ("whole", "parts"))
    files = [p.relative_to(left) for p in left.rglob("*.safetensors")]
    same = all((left / f).read_bytes() == (right / f).read_bytes() for f in files)
    for kind in ("whole", "parts"):
        shutil.rmtree(work / f"{kind}-{name}")
    return {"side": f"resume, {name}", "stopped_at": stopped, "files": len(files), "bits_equal": same}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    for key, value in {"layers": 16, "hidden": 2048, "vocab": 128256, "steps": 24}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--only", choices=["", "speed", "resume"], default="")
    parser.add_argument("--train", choices=["", "LoRA", "full"], default="")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=LENGTH)
    options = parser.parse_args()
    globals().update(ROWS=options.rows, LENGTH=options.length)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_inputs(work, options.layers, options.hidden, options.vocab)
    rows = []

    def add(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    wanted = [(kind == "LoRA", kind) for kind in ("LoRA", "full") if options.train in ("", kind)]
    for adapter, _ in wanted if options.only in ("", "resume") else ():
        add(resume_is_exact(work, adapter=adapter))
    for adapter, kind in wanted if options.only in ("", "speed") else ():
        for deterministic in (True, False):
            name = f"{kind}{', deterministic' if deterministic else ''}"
            add(ours(work, name, adapter=adapter, deterministic=deterministic, steps=options.steps))
            shutil.rmtree(work / name)
        add(plain(work, adapter=adapter, steps=options.steps))
    print("\nTABLE")
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items() if key != "first_line"))


if __name__ == "__main__":
    main()
