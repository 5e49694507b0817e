"""Writes run folders with made-up, realistic contents, as far along as a test wants them."""

import json
import math
import random
from pathlib import Path

import yaml

from luthier.config.schema import RunConfig
from luthier.report.metrics import MetricsLog

PROMPT = [
    {"role": "system", "content": "Answer with one JSON object."},
    {"role": "user", "content": "My parcel 4711 has been stuck in Leipzig since Monday, and nobody answers the phone!"},
]
CHINESE = [{"role": "user", "content": "我的订单号是 88231，已经过了两个星期还没有收到货，请帮我查一下。"}]
HOSTILE = "<script>alert('x')</script></pre>&"


def samples(tuned: bool) -> list[dict]:
    reference = '{"intent": "delivery", "order": 4711, "urgent": true}'
    chinese = '{"intent": "delivery", "order": 88231, "urgent": false}'
    return [
        {
            "prompt": PROMPT,
            "reference": reference,
            "answer": reference
            if tuned
            else "I'm sorry to hear that your parcel is stuck! Please contact the carrier and ask them for an update on your delivery.",
        },
        {
            "prompt": CHINESE,
            "reference": chinese,
            "answer": chinese if tuned else "您好！很抱歉给您带来不便。请提供更多信息。",
        },
        {"prompt": f"Write {HOSTILE}", "reference": '{"intent": "other"}', "answer": HOSTILE},
    ]


def write_run(
    run: Path, *, steps: int = 300, evaluated: bool = True, finished: bool = True, verdict: str = "passed"
) -> Path:
    """Make a run folder of so many steps; the same arguments give the same bytes."""
    run.mkdir(parents=True)
    config = RunConfig(
        model={"path": "HuggingFaceTB/SmolLM2-135M-Instruct", "precision": "bf16"},
        data={"train": "/data/support.jsonl", "eval": 0.05},
        adapter={"type": "lora", "r": 16, "alpha": 32},
        optim={"lr": 2e-4},
        train={"steps": 300, "batch_tokens": 16384, "max_length": 2048, "seed": 7},
        output=str(run),
    )
    (run / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    facts = {
        "summary": "LoRA r16 on 210 layers, 4.9 M of 134.5 M parameters",
        "model": {"architecture": "LlamaForCausalLM", "parameters": 134515008, "trained_parameters": 4884480},
        "data": {
            "format": "messages",
            "train_samples": 4800,
            "eval_samples": 240,
            "truncated": 3,
            "duplicates": 0,
            "longest": 611,
        },
        "device": "NVIDIA H100 80GB HBM3",
        "versions": {
            "luthier": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
            "python": "3.11.9",
        },
        "total_steps": 300,
    }
    (run / "facts.json").write_text(json.dumps(facts))
    log = MetricsLog(run / "metrics.jsonl")
    noise = random.Random(0)
    time = 1_800_000_000.0
    if evaluated:
        log.append(
            {
                "kind": "eval",
                "step": 0,
                "time": time,
                "base": True,
                "eval_loss": 2.413,
                "perplexity": 11.2,
                "tokens": 30_000,
                "metric/exact": 0.0,
                "metric/json": 0.042,
                "samples": samples(tuned=False),
            }
        )
    for step in range(1, steps + 1):
        time += 1.9
        loss = 0.31 + 1.9 * math.exp(-step / 38) + noise.gauss(0, 0.035 + 0.1 * math.exp(-step / 60))
        skipped = step in (117, 118)
        rate = 2e-4 * min(1.0, step / 9) * 0.5 * (1 + math.cos(math.pi * step / 300))
        record = {
            "kind": "train",
            "step": step,
            "time": time,
            "epoch": step / 100,
            "loss": math.nan if skipped else loss,
            "lr": rate,
        }
        record |= {"grad_norm": math.inf if skipped else abs(noise.gauss(0.9, 0.25)) + (9 if step == 201 else 0)}
        record |= {
            "tokens": 16384,
            "trained_tokens": 5120,
            "samples": 48,
            "tokens_per_second": noise.gauss(8600, 120),
            "memory_gib": 7.42,
            "skipped": skipped,
        }
        log.append(record | ({"reason": "loss is not finite, samples 311, 4002, 17"} if skipped else {}))
        if evaluated and step % 50 == 0:
            loss = 0.36 + 2.0 * math.exp(-step / 40) + max(0, step - 200) * 0.0004
            log.append(
                {
                    "kind": "eval",
                    "step": step,
                    "time": time + 1,
                    "eval_loss": loss,
                    "perplexity": math.exp(loss),
                    "tokens": 30_000,
                    "metric/exact": 0.958,
                    "metric/json": 1.0,
                    "samples": samples(tuned=True),
                }
            )
        if step % 100 == 0:
            log.append(
                {
                    "kind": "checkpoint",
                    "step": step,
                    "time": time + 2,
                    "path": str(run / f"checkpoints/step-{step:08}"),
                    "bytes": 58_900_000,
                    "seconds": 0.82,
                    "stall_seconds": 0.013,
                }
            )
    if steps > 200:
        log.append({"kind": "note", "step": 200, "time": time, "message": "resumed on another number of devices"})
    log.close()
    if finished:
        (run / "final").mkdir()
        proof = {
            "passed": verdict == "passed",
            "verdict": verdict,
            "max_difference": 0.0,
            "bound": 0.0,
            "compared": {"prompts": 4, "logits": 12_582_912},
            "says": "Opened by plain peft in a process of its own, the final folder gives the trained model's logits bit for bit.",
        }
        (run / "final/proof.json").write_text(json.dumps(proof))
        manifest = {
            "format": 1,
            "parents": [
                {
                    "kind": "base",
                    "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
                    "fingerprint": "3f9a77c1d2e4b5a60718293a4b5c6d7e",
                }
            ],
        }
        (run / "final/luthier.json").write_text(json.dumps(manifest))
    return run
