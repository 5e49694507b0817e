"""Merging an adapter (r 16, all linear layers) in a stream, against `cp` of the same files and against peft in memory.

    python benchmarks/merge.py --size 3b [--turns 1] [--without-peft] [--mergekit PROGRAM] [--folder DIR]

Makes the model (Llama's shape, random bf16 weights, written in a stream), then in turns: `cp` and `sync` of its files, and the
merge in a process of its own; the page cache is dropped of the files before each. The ratio, the peak of anonymous memory
(RssAnon, sampled) and peft's merge_and_unload + save_pretrained beside it are printed as one JSON object; with `--mergekit`
the `mergekit-yaml` of another environment too (`models: [{model: BASE+ADAPTER}]`, passthrough).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from processes import timed

SIZES = {"tiny": (1, 256, 512, 1000), "small": (4, 2048, 5632, 32000), "1b": (16, 2048, 8192, 32000), "3b": (28, 3072, 8192, 128256)}  # fmt: skip
PEFT = (
    "import sys;from transformers import AutoModelForCausalLM as A;from peft import PeftModel as P;"
    "P.from_pretrained(A.from_pretrained(sys.argv[1],dtype='bfloat16'),sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])"
)


def make(folder: Path, layers: int, hidden: int, inner: int, vocab: int) -> None:
    import torch
    from safetensors.torch import save_file

    from luthier.artifacts.tensorfile import TensorSpec, plan_files

    heads = hidden // 128
    keys = next(count for count in range(max(1, hidden // 384), 0, -1) if heads % count == 0)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": 128,
        "vocab_size": vocab, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    shapes = {"q_proj": (heads * 128, hidden), "k_proj": (keys * 128, hidden), "v_proj": (keys * 128, hidden), "o_proj": (hidden, heads * 128),
              "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}  # fmt: skip
    specs = [TensorSpec("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    adapter = {}
    for layer in range(layers):
        for name, shape in shapes.items():
            module = f"model.layers.{layer}.{'self_attn' if len(name) == 6 and name[0] in 'qkvo' else 'mlp'}.{name}"
            specs.append(TensorSpec(f"{module}.weight", "BF16", shape))
            adapter[f"base_model.model.{module}.lora_A.weight"] = torch.randn(16, shape[1]) * 0.01
            adapter[f"base_model.model.{module}.lora_B.weight"] = torch.randn(shape[0], 16) * 0.01
        specs += [TensorSpec(f"model.layers.{layer}.{n}.weight", "BF16", (hidden,)) for n in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    specs.append(TensorSpec("model.norm.weight", "BF16", (hidden,)))
    base = folder / "base"
    base.mkdir(parents=True)
    drawn = memoryview(torch.empty(1 << 24, dtype=torch.bfloat16).normal_(0, 0.02).view(torch.uint8).numpy())
    files, index = plan_files(specs, "model", {"format": "pt"})
    for file in files:
        with open(base / file.name, "wb") as out:
            out.write(file.header)
            for place in file.places:
                left = place.spec.size
                while left:  # one draw again and again: the merge does not care, and drawing billions takes minutes
                    left -= out.write(drawn[: min(left, len(drawn))])
    if index:
        (base / "model.safetensors.index.json").write_bytes(index)
    (base / "config.json").write_text(json.dumps(config))
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter/adapter_model.safetensors")
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "target_modules": list(shapes), "base_model_name_or_path": str(base)}  # fmt: skip
    (folder / "adapter/adapter_config.json").write_text(json.dumps(told))
    os.sync()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment of its own")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        make(folder, *SIZES[options.size])
        base, adapter, out = folder / "base", folder / "adapter", folder / "out"
        copies, merges = [], []
        for _ in range(options.turns):
            copies.append(timed(["sh", "-c", f"cp -r {base} {out} && sync {out}/*"], folder, out))
            merges.append(
                timed(
                    [
                        sys.executable,
                        "-m",
                        "luthier",
                        "export",
                        str(adapter),
                        str(out),
                        "--to",
                        "merged",
                        "--base",
                        str(base),
                        "--no-proof",
                    ],
                    folder,
                    out,
                )
            )
        told = {
            "size": options.size,
            "bytes": sum(path.stat().st_size for path in base.iterdir()),
            "cp_seconds": [round(seconds, 2) for seconds, _ in copies],
            "merge_seconds": [round(seconds, 2) for seconds, _ in merges],
            "ratio": round(statistics.median(s for s, _ in merges) / statistics.median(s for s, _ in copies), 3),
            "ratio_of_the_shortest": round(min(s for s, _ in merges) / min(s for s, _ in copies), 3),
            "merge_peak_anonymous_mib": round(max(peak for _, peak in merges)),
        }
        print(json.dumps(told), flush=True)
        if not options.without_peft:
            seconds, peak = timed([sys.executable, "-c", PEFT, str(base), str(adapter), str(out)], folder, out)
            told |= {"peft_seconds": round(seconds, 2), "peft_peak_anonymous_mib": round(peak)}
        if options.mergekit:
            plan = folder / "mergekit.yaml"
            plan.write_text(f"models: [{{model: {base}+{adapter}}}]\nmerge_method: passthrough\ndtype: bfloat16\n")
            command = [
                str(options.mergekit),
                str(plan),
                str(out),
                "--lora-merge-cache",
                str(folder / "cache"),
                "--lazy-unpickle",
                "--no-copy-tokenizer",
            ]
            seconds, peak = timed(command, folder, out)
            told |= {"mergekit_seconds": round(seconds, 2), "mergekit_peak_anonymous_mib": round(peak)}
        print(json.dumps(told))


if __name__ == "__main__":
    main()
