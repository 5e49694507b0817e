"""Quantising while reading holds the packed model and about one layer, never the model in 16 bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_tokenizer
from transformers import LlamaConfig

LAYERS, HIDDEN, INNER, VOCABULARY = 12, 1024, 4096, 512
LOAD = """
import gc, json, sys, threading, time
import torch, luthier, luthier.loading, bitsandbytes, peft
from luthier.models.quantised.formats import quantise
quantise(torch.ones(64, 64), "nf4")
def anon():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon:"))
peak, stop = 0, False
def look():
    global peak
    while not stop:
        peak = max(peak, anon())
        time.sleep(0.001)
before = anon()
thread = threading.Thread(target=look)
thread.start()
model, _ = luthier.load(sys.argv[1], precision=sys.argv[2], device="cpu")
stop = True
thread.join()
held = sum(p.numel() * p.element_size() for p in model.parameters())
gc.collect()
print("RESULT " + json.dumps(dict(added=peak - before, held=held, after=anon() - before)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 200 million random weights in bf16, a shard a layer."""
    path = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=256, bos_token_id=None, eos_token_id=2,
        pad_token_id=0, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(path)
    make_tokenizer(path)
    wide, index = {"q": HIDDEN, "k": HIDDEN, "v": HIDDEN, "o": HIDDEN}, {}
    shards = [{"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}]
    for number in range(LAYERS):
        name = f"model.layers.{number}"
        shapes = {f"{name}.self_attn.{key}_proj.weight": (rows, HIDDEN) for key, rows in wide.items()}
        shapes |= {f"{name}.mlp.{key}_proj.weight": (INNER, HIDDEN) for key in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shards.append(shapes | {f"{name}.{key}_layernorm.weight": (HIDDEN,) for key in ("input", "post_attention")})
    for number, shapes in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: (torch.randn(*shape) * 0.02).bfloat16() for name, shape in shapes.items()}, path / file, {"format": "pt"})  # fmt: skip
        index |= dict.fromkeys(shapes, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
def test_quantising_holds_the_packed_model_and_one_layer(folder, form):
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder), form], capture_output=True, text=True, check=True)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))  # fmt: skip
    layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    in_fp32 = 4 * HIDDEN * INNER  # the matrix at work, as a CPU computes with it
    assert whole > 8 * layer
    assert found["held"] < 0.62 * whole
    assert found["added"] < found["held"] + layer + 4 * in_fp32, {name: size / 2**20 for name, size in found.items()}
    assert found["added"] < whole
