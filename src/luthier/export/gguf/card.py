"""What lies beside a GGUF for those who serve it: a Modelfile for Ollama, and a card with the commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from luthier.export.gguf.ollama_template import ollama_template

if TYPE_CHECKING:
    from luthier.export.gguf.write import GgufMade


def modelfile(file: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> str:
    """Ollama's Modelfile: the chat template in Ollama's language where it can be said in it, and the stop texts."""
    lines = [f"FROM ./{file}"]
    template = ollama_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    elif tokenizer.chat_template:
        lines.append("# The chat template has no plain form for Ollama: it takes its own for templates it knows, else add TEMPLATE.")  # fmt: skip
    texts = [tokenizer.convert_ids_to_tokens(index) for index in stops]
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in texts if isinstance(text, str)]
    return "\n".join(lines) + "\n"


def verdict(proof: bytes | None) -> str | None:
    """What a proof says, in a line."""
    told = json.loads(proof) if proof else None
    return f"{told['verdict']}: {told['says']}" if told else None


def card(made: GgufMade, source: Path, name: str, proof: bytes | None) -> str:
    """The folder's README.md: what it is, how it is served, what was proven and what to know."""
    told = json.loads(proof) if proof else None
    lines = [
        f"# {name}",
        "",
        f"`{made.file}`: a GGUF ({made.quant}) of `{source.name}`, written by Luthier.",
        "",
        "```sh",
        f"llama-server -m {made.file}                 # llama.cpp; an OpenAI-compatible server",
        f"llama-cli -m {made.file} -p 'Hello'",
        f"ollama create {name.lower()} -f Modelfile && ollama run {name.lower()}",
        "```",
        "",
        f"Proof: {told['verdict']}: {told['says']} Compared: {told['compared']}." if told else "It was not proven.",
    ]
    if made.notes:
        lines += ["", "To know:", "", *(f"- {note}" for note in made.notes)]
    return "\n".join(lines) + "\n"


def adapter_modelfile(file: str, base: Path) -> str:
    """Ollama's Modelfile of an adapter."""
    return (
        f"# FROM wants the base {base.name}: a GGUF of it, or its name in Ollama.\nFROM ./base.gguf\nADAPTER ./{file}\n"
    )


def adapter_card(made: GgufMade, adapter: Path, base: Path, name: str) -> str:
    """The README.md of an adapter's folder."""
    return f"""# {name}

`{made.file}`: the adapter `{adapter.name}` as a GGUF ({made.quant}) for llama.cpp, written by Luthier. It goes onto a GGUF of
its base, `{base.name}`, of any quantisation:

```sh
luthier export {base} base --to gguf          # where there is none yet
llama-server -m base/model-F16.gguf --lora {made.file}
ollama create {name.lower()} -f Modelfile      # after FROM names the base
```

One file of both: `luthier export {adapter} merged --to merged`, then `luthier export merged out --to gguf`.

Proof: {made.proof or "it was not proven"}
"""
