"""The exact commands that serve a folder: plain transformers, vLLM, llama.cpp and Ollama, and the upload to the hub.

What a server can take is read off the folder's own config files, so that no command is shown that would fail. vLLM takes
LoRA alone, of one rank up to 512 and one factor, on linear layers: other methods, DoRA, rank patterns, modules trained whole and new token rows are
merged first
(https://docs.vllm.ai/en/stable/features/lora.html).
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_BARS_VLLM = {
    "use_dora": "DoRA",
    "modules_to_save": "modules trained whole",
    "trainable_token_indices": "trained token rows",
    "lora_bias": "biases in the adapter",
    "target_parameters": "experts trained as parameters",
    "rank_pattern": "ranks of their own in some layers",  # its one factor, alpha / r, would be wrong there, without a word
    "alpha_pattern": "factors of their own in some layers",
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "aLoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}


def card(folder: Path, proof: bytes | None) -> str:
    """The README.md of an exported folder: what it is, what was proven, how it is served.

    Args:
        folder: where its files lie while it has not yet got its name, which the card leaves out: folders are renamed and copied.
        proof: the content of its ``proof.json``, if it was proven.
    """
    adapter, config = _json(folder / "adapter_config.json"), _json(folder / "config.json")
    what = "adapter" if adapter else "model"
    head = ["---", f"library_name: {'peft' if adapter else 'transformers'}", "---", "", f"# Exported {what}", ""]
    method = (config.get("quantization_config") or {}).get("quant_method")
    kind = str(adapter.get("peft_type") or (config.get("architectures") or ["model"])[0])
    head.append(f"{what.capitalize()} ({kind}{f', quantised for {method}' if method else ''}), written by Luthier.")
    told = json.loads(proof) if proof else None
    said = f"Proof: {told['verdict']}: {told['says']}" if told else "It was not proven."
    lines = commands(folder, shown="FOLDER", base="BASE")
    return "\n".join([*head, "", "## How to serve it", "", "```sh", *lines, "```", "", said]) + "\n"


def commands(folder: Path, shown: str | None = None, base: str | None = None) -> list[str]:
    """Lines for a shell (and one for Python) that serve what lies in a folder; comments begin with ``#``.

    Args:
        folder: an adapter's or a model's folder, with its config file.
        shown: what the folder is called in the commands; its own path if None.
        base: what the base under an adapter is called; what the adapter's config names if None. A card that travels with the
            folder shows no paths of this machine.
    """
    name = shlex.quote(shown or str(folder))
    adapter = _json(folder / "adapter_config.json")
    if adapter:
        return _adapter(adapter, name, shlex.quote(base or str(adapter.get("base_model_name_or_path") or "BASE")))
    config = _json(folder / "config.json")
    lines = [_python("from transformers import pipeline as p; print(p('text-generation', sys.argv[1])('Hello'))", name)]
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "bitsandbytes":
        lines.append(f"vllm serve {name}   # needs bitsandbytes beside vLLM")
    else:
        lines.append(f"vllm serve {name}")
    if method is None:
        lines.append(f"luthier export {name} OUT --to gguf   # then llama.cpp and Ollama serve it")
    return [*lines, _push(name)]


def _adapter(config: dict[str, Any], name: str, base: str) -> list[str]:
    lines = [_python("from peft import AutoPeftModelForCausalLM as A; A.from_pretrained(sys.argv[1])", name)]
    bars = [what for key, what in _BARS_VLLM.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        bars.append("trained biases")
    kind, rank = str(config.get("peft_type", "")).upper(), config["r"] if isinstance(config.get("r"), int) else 0
    if kind != "LORA":
        bars.insert(0, f"{kind or 'this method'}")
    if rank > VLLM_RANKS[-1]:
        bars.append(f"rank {rank}")
    if bars:
        lines.append(
            f"luthier export {name} MERGED --to merged   # merge first: vLLM's adapters can't have {', '.join(bars)}"
        )
        lines.append("vllm serve MERGED")
    else:
        fits = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
        alias = re.sub(r"[^\w.-]+", "-", shlex.split(name)[0].rpartition("/")[2]) or "adapter"
        lines.append(f"vllm serve {base} --enable-lora --max-lora-rank {fits} --lora-modules {alias}={name}")
    if kind == "LORA" and not bars:
        lines.append(f"luthier export {name} OUT --to gguf   # an adapter for llama.cpp's --lora")
    return [*lines, _push(name)]


def _python(code: str, name: str) -> str:
    """The path is an argument, so that no quote in it ends the code."""
    return f'python -c "import sys; {code}" {name}'


def _push(name: str) -> str:
    return f"luthier push {name} OWNER/NAME   # to the hub, private"


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
