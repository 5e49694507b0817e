"""The whole process of ``luthier train`` beside transformers' Trainer: same model, tokens, steps and settings, on a CPU.

    python benchmarks/against_trainer.py WORK [--part whole start stall] [--base FOLDER_OR_GGUF] [--repeats 3]

Every figure is a median over repetitions in which the sides take turns, so that what else the machine does hits both.
``whole``: wall time, processor time and peak memory from start to end. ``start``: time from the start of the process to the
end of the first step of a tiny model with a warm token cache, beside the imports of torch, transformers and peft alone.
``stall``: how long a step waits for a save in full fine-tuning, beside copying as many bytes in the same process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
IMPORTS = "import torch, transformers, peft, time, sys; open(sys.argv[1], 'w').write(str(time.time()) + ' ' + str(time.process_time()))"


@dataclass(frozen=True)
class Job:
    """What both sides compute: ``rows`` rows of ``length`` tokens a step, ``micro_batch`` at once."""

    work: Path
    model: Path
    steps: int
    rows: int
    length: int
    micro_batch: int
    lora: bool = True
    save_every: int | None = None


@dataclass(frozen=True)
class Measured:
    """One process: seconds of wall time and of processor time (its own and its children's), and peak memory in MiB."""

    wall: float
    cpu: float
    memory: float
    begun: float
    output: str


def measure(command: Sequence[str], environment: dict[str, str]) -> Measured:
    """Run a command to its end."""
    begun = time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=HERE
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{output[-4000:]}")
    return Measured(time.time() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, begun, output)


def environment(work: Path, threads: int) -> dict[str, str]:
    return {
        **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "XDG_CACHE_HOME": str(work / "cache"), "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip


def make_llama(folder: Path, *, hidden: int, layers: int) -> Path:
    """A Llama with random weights and a small tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(HERE.parent / "tests"))
    from tiny import make_tokenizer

    if not (folder / "model.safetensors").exists():
        config = LlamaConfig(
            vocab_size=8192, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=2048,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        make_tokenizer(folder)
    return folder


def folder_of(base: Path, folder: Path) -> Path:
    """A transformers folder in fp32: the base's own, or written once from a GGUF file."""
    if base.is_dir():
        return base
    if not (folder / "model.safetensors").exists():
        from luthier.config.schema import ModelConfig
        from luthier.models.open import open_base

        opened = open_base(ModelConfig(path=str(base), precision="fp32"))
        opened.model.save_pretrained(folder)
        opened.tokenizer.save_pretrained(folder)
    return folder


def write_inputs(job: Job) -> None:
    """Texts longer than a row, our run file, and the same rows in the same order as an array for the Trainer."""
    import numpy as np

    from luthier.config.read import read_run
    from luthier.data import prepare
    from luthier.data.batches import Batches
    from luthier.models.open import open_tokenizer

    draw = random.Random(0)
    words = [word for word in Path(__file__).read_text().split() if word.isalpha()]
    with open(job.work / "text.jsonl", "w") as file:
        for _ in range(job.rows * job.steps):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=job.length))}) + "\n")
    run = {
        "model": {"path": str(job.model), "precision": "fp32"},
        "data": {"train": str(job.work / "text.jsonl"), "too_long": "truncate"},
        "method": "pretrain",
        "adapter": {"type": "lora", "r": 16, "alpha": 32} if job.lora else "none",
        "optim": {"lr": 2e-4, "schedule": "cosine", "warmup": 1},
        "train": {
            "steps": job.steps, "batch_samples": job.rows, "micro_batch": job.micro_batch, "max_length": job.length,
        },
        "checkpoint": {"every": job.save_every or job.steps},
        "callbacks": ["clock:copy" if job.save_every else "clock:note"],
        "output": str(job.work / "ours"),
    }  # fmt: skip
    (job.work / "run.yaml").write_text(json.dumps(run))
    config = read_run(job.work / "run.yaml")
    prepared = prepare(config, open_tokenizer(config.model), cache=job.work / "cache/luthier/tokens", say=lambda text: None)  # fmt: skip
    batches = Batches(prepared.train, config.train, pad_id=0)
    rows = [batch.input_ids for step in range(job.steps) for batch in batches.step(step).micro_batches]
    assert all(batch.shape == (job.micro_batch, job.length) for batch in rows), "rows are not full"
    np.save(job.work / "rows.npy", np.concatenate([batch.numpy() for batch in rows]))
    settings = {
        "model": str(job.model), "rows": str(job.work / "rows.npy"), "output": str(job.work / "theirs"), "lora": job.lora,
        "noted": str(job.work / "theirs.clock.json"), "steps": job.steps, "micro_batch": job.micro_batch,
        "accumulate": job.rows // job.micro_batch,
    }  # fmt: skip
    (job.work / "trainer.json").write_text(json.dumps(settings))


def run_ours(job: Job, environment: dict[str, str]) -> tuple[Measured, dict[str, Any]]:
    for path in (job.work / "ours", job.work / "ours.clock.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    measured = measure([sys.executable, "-m", "luthier", "train", str(job.work / "run.yaml")], environment)
    records = [json.loads(line) for line in (job.work / "ours/metrics.jsonl").read_text().splitlines()]
    noted = json.loads((job.work / "ours.clock.json").read_text())
    proof = next(line for line in measured.output.splitlines() if line.startswith("proof: "))
    noted["proof"] = float(proof.split(" in ")[1].split(" s;")[0])
    noted["losses"] = [record["loss"] for record in records if record["kind"] == "train"]
    noted["saves"] = [record for record in records if record["kind"] == "checkpoint"]
    return measured, noted


def run_trainer(job: Job, environment: dict[str, str]) -> tuple[Measured, dict[str, Any]]:
    shutil.rmtree(job.work / "theirs", ignore_errors=True)
    measured = measure([sys.executable, str(HERE / "trainer_side.py"), str(job.work / "trainer.json")], environment)
    return measured, json.loads((job.work / "theirs.clock.json").read_text())


def whole(job: Job, repeats: int, environment: dict[str, str]) -> list[str]:
    """Whole processes in turns; the first pair warms files and caches and is left out."""
    pairs = []
    for number in range(repeats + 1):
        pairs.append((run_ours(job, environment), run_trainer(job, environment)))
        (a, noted), (b, _) = pairs[-1]
        shown = f"{a.wall:.1f} s wall, {noted['proof']:.1f} s of it proof, {a.cpu:.1f} s processor; {b.wall:.1f} s, {b.cpu:.1f} s"
        print(f"pair {number}: {shown}", file=sys.stderr, flush=True)
    pairs = pairs[1:]
    (_, ours), (_, theirs) = pairs[0]
    assert abs(ours["losses"][0] - theirs["losses"][0]) < 1e-3, "the sides do not compute the same first step"
    lines = ["| | luthier | Trainer | ratio (median of pairs) |", "| --- | --- | --- | --- |"]

    def add(name: str, values: list[tuple[float, float]], unit: str) -> None:
        left, right = (statistics.median(side) for side in zip(*values, strict=True))
        ratios = sorted(a / b for a, b in values)
        lines.append(
            f"| {name} | {left:.1f} {unit} | {right:.1f} {unit} | {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) |"
        )

    add("wall, everything", [(a.wall, b.wall) for (a, _), (b, _) in pairs], "s")
    add(
        "wall, without final folder, proof and report", [(a.wall - n["proof"], b.wall) for (a, n), (b, _) in pairs], "s"
    )
    add("processor, everything", [(a.cpu, b.cpu) for (a, _), (b, _) in pairs], "s")
    add("processor, without the proving process", [(a.cpu - n["proof_cpu"], b.cpu) for (a, n), (b, _) in pairs], "s")
    add("peak memory", [(a.memory, b.memory) for (a, _), (b, _) in pairs], "MiB")
    lines.append(f"\nlosses of the last step: {ours['losses'][-1]:.4f}, {theirs['losses'][-1]:.4f}")
    return lines


def start(job: Job, repeats: int, environment: dict[str, str]) -> list[str]:
    """From the start of the process to the end of the first step, sides and bare imports in turns."""
    noted = job.work / "imports.txt"
    wall: dict[str, list[float]] = {"luthier": [], "Trainer": [], "imports": []}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    for _ in range(repeats + 1):
        bare = measure([sys.executable, "-c", IMPORTS, str(noted)], environment)
        at, used = map(float, noted.read_text().split())
        wall["imports"].append(at - bare.begun)
        cpu["imports"].append(used)
        for name, run in (("luthier", run_ours), ("Trainer", run_trainer)):
            measured, values = run(job, environment)
            wall[name].append(values["first_step_at"] - measured.begun)
            cpu[name].append(values["first_step_cpu"])
    lines = ["| to the end of the first step | luthier | Trainer | imports alone | luthier / Trainer | luthier - imports |", "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, values in (("wall", wall), ("processor", cpu)):
        ours, theirs, bare_ones = (values[side][1:] for side in ("luthier", "Trainer", "imports"))
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        beyond = statistics.median(a - b for a, b in zip(ours, bare_ones, strict=True))
        medians = " | ".join(f"{statistics.median(side):.2f} s" for side in (ours, theirs, bare_ones))
        lines.append(f"| {name} | {medians} | {ratio:.2f} | {beyond:.2f} s |")
    return lines


def stall(job: Job, repeats: int, environment: dict[str, str]) -> list[str]:
    """What a step waits for a save beside copying the same bytes; the first save, which allocates, apart."""
    first, later, copies = [], [], []
    for _ in range(repeats):
        _, noted = run_ours(job, environment)
        waits = [save["stall_seconds"] for save in noted["saves"]]
        first.append(waits[0])
        later += waits[1:]
        copies += [value for key, value in noted.items() if key.startswith("copy_")]
    size = noted["saves"][0]["bytes"] / 2**20
    medians = [statistics.median(values) for values in (first, later, copies)]
    return [
        "| checkpoint | first save waits | later saves wait | copying the same bytes | later / copy |",
        "| --- | --- | --- | --- | --- |",
        f"| {size:.0f} MiB | {medians[0]:.3f} s | {medians[1]:.3f} s | {medians[2]:.3f} s | {medians[1] / medians[2]:.2f} |",
    ]


def circumstances(threads: int) -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else [platform.processor()]  # fmt: skip
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "accelerate"))
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{datetime.date.today()}, {names[0]} × {os.cpu_count()}, {threads} thread(s) a side, load average {load}, Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--part", nargs="+", choices=["whole", "start", "stall"], default=["whole", "start", "stall"])
    parser.add_argument("--base", type=Path, help="train this instead of random weights in `whole`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(circumstances(options.threads), flush=True)
    for part in options.part:
        work = options.work.resolve() / part
        work.mkdir(parents=True, exist_ok=True)
        surroundings = environment(work, options.threads)
        if part == "start":
            job = Job(work, make_llama(work / "model", hidden=64, layers=2), 2, 2, 64, 1)
            runner = start
        elif part == "stall":
            job = Job(work, make_llama(work / "model", hidden=640, layers=10), 6, 1, 64, 1, lora=False, save_every=2)
            runner = stall
        else:
            model = folder_of(options.base, work / "base") if options.base else make_llama(work / "model", hidden=512, layers=10)  # fmt: skip
            job = Job(work, model, options.steps, options.rows, options.length, max(1, options.rows // 2))
            runner = whole
        write_inputs(job)
        print(
            f"\n{part}: {job.model.name}, {'LoRA' if job.lora else 'full'}, {job.steps} steps of {job.rows} x {job.length} tokens"
        )
        print("\n".join(runner(job, options.repeats, surroundings)), flush=True)


if __name__ == "__main__":
    main()
