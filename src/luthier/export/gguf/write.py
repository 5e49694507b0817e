"""`--to gguf`: a transformers folder becomes one GGUF file, in a stream, with what serves it beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from luthier.artifacts import manifest as manifests
from luthier.errors import RequestError
from luthier.export import exported_folder as folders
from luthier.export.gguf.card import card, modelfile, verdict
from luthier.export.gguf.file import GgufBytes, plan_gguf
from luthier.export.gguf.mix import QUANTS, mix, quant_of
from luthier.export.gguf.names import plan_model, weights_in_gguf
from luthier.export.gguf.proof import prove_gguf
from luthier.export.gguf.tokenizer import open_tokenizer, stop_ids, tokenizer_metadata
from luthier.export.read_back import check_written
from luthier.export.source import open_source
from luthier.export.stream import Output, write_stream
from luthier.export.unfinished import unfinished

DEFAULT_QUANT = "F16"


@dataclass
class GgufMade:
    """What was written: the file's name, its quantisation, what its reader should know, and what is said of this export alone."""

    file: str
    quant: str
    notes: list[str] = field(default_factory=list)
    proof: str | None = None
    said: list[str] = field(default_factory=list)

    def served(self, out: Path) -> str:
        """The commands that serve it, and what to know."""
        adapter = self.file.startswith("adapter")
        lines = [f"llama-server -m {'BASE.gguf --lora ' if adapter else ''}{out / self.file}"]
        lines.append(
            f"ollama create {out.name.lower()} -f {out / 'Modelfile'}{'   # after its FROM names the base' if adapter else ''}"
        )
        return "\n".join([*lines, *(f"to know: {note}" for note in self.notes), *self.said])


def export_gguf(
    folder: Path,
    out: Path,
    *,
    quant: str | None = None,
    prove: bool = True,
) -> GgufMade:
    """Write a transformers folder as a GGUF file, and publish the folder ``out`` that holds it.

    Args:
        quant: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M or Q4_K_M; F16 if None.
        prove: ask llama.cpp, or where it is not installed transformers, what the file answers.

    Raises:
        RequestError: llama.cpp has no place for something in the model or its tokenizer, or ``out`` exists.
        ArtifactError: a file is broken or missing, or the proof failed.
    """
    name = quant_of(quant or DEFAULT_QUANT)
    folders.check_target(out, [folder])
    if folders.read_config(folder).get("quantization_config"):
        raise RequestError(
            "its weights are quantised already, in another form than GGUF's.",
            code="quantised-base",
            where=str(folder),
            remedy="Export it to 16 bits first: luthier export SRC DST --to transformers, and that to gguf.",
        )
    config = open_config(folder)
    tokenizer = open_tokenizer(folder)
    stops = stop_ids(tokenizer, folder)
    with open_source(folder) as source:
        plan = plan_model(config, source.specs, str(folder))
        rows = plan.metadata[f"{plan.architecture}.vocab_size"]
        told, notes = tokenizer_metadata(tokenizer, folder, rows, stops)
        tensors, fallen = mix(plan.tensors, name, config.get_text_config().num_hidden_layers)
        made = GgufMade(f"model-{name}.gguf", name, [*plan.notes, *notes, *_fallen(fallen)])
        metadata = {
            "general.architecture": plan.architecture,
            "general.type": "model",
            "general.name": _title(folder, out, tokenizer),
            "general.file_type": int(QUANTS[name][1]),
            "general.quantization_version": 2,
            **plan.metadata,
            **told,
        }
        file = plan_gguf(made.file, metadata, tensors)
        packed = GgufBytes(source, tensors)
        with unfinished(out, [folder], ["gguf", name], made.said.append) as (partial, journal):
            outputs = [Output(tensor.spec, packed, tensor.name) for tensor in tensors]
            small = {"Modelfile": modelfile(made.file, tokenizer, stops).encode()}
            written = write_stream(
                partial, outputs, small, stem="model", kind="gguf", metadata={}, planned=[file], journal=journal
            )
            if prove:
                made.said.append(check_written(partial, written.manifest))
            prover = prove_gguf(
                folder, config, tokenizer, weights_in_gguf(plan, config.get_text_config()), source.specs
            )
            late = {"proof.json": prover(partial / made.file)} if prove else {}
            made.proof = verdict(late.get("proof.json"))
            late["README.md"] = card(made, folder, out.name, late.get("proof.json")).encode()
            folders.publish_folder(partial, out, written.manifest, _facts(folder), config=None, late=late)
    return made


def open_config(folder: Path) -> PreTrainedConfig:
    """A folder's config with every default filled in.

    Raises:
        RequestError: transformers does not know its type, or refuses its values.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise RequestError(f"transformers does not open it: {str(error).splitlines()[0]}", code="not-a-model", where=str(folder / "config.json"), remedy="Correct the config, or name another folder.") from error  # fmt: skip


def _fallen(fallen: dict[str, str]) -> list[str]:
    if not fallen:
        return []
    kinds = sorted(set(fallen.values()))
    names = list(fallen)
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [f"The rows of {len(names)} tensors ({listed}) do not fill whole blocks, so these are {' or '.join(kinds)}: the file is larger and nearer to the original than its name says."]  # fmt: skip


def _title(folder: Path, out: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for people, and for llama.cpp: it strips the spaces behind special tokens where a name says Phi-3.

    It fails to load a file of such a name whose vocabulary lacks Phi-3's tokens, and would strip for others too.
    """
    name = next((each for each in (folder.name, folder.parent.name) if each not in ("model", "final", "")), out.name)
    name = re.sub(r"(?i)phi-?3", "Phi 3", re.sub(r"(?i)modern-bert", "modern bert", name))
    added = tokenizer.added_tokens_decoder.values()
    strips = any(token.special and token.rstrip for token in added)
    theirs = {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= set(tokenizer.get_vocab())
    return f"{name} (Phi-3)" if strips and theirs else name


def _facts(folder: Path) -> dict[str, Any]:
    home = folder if (folder / manifests.NAME).is_file() else folder.parent
    told = manifests.read(home) if (home / manifests.NAME).is_file() else None
    kind = "merged" if told and told.kind == "merged" else "model"
    parent: dict[str, Any] = {"kind": kind, "name": str(folder.resolve())}
    if told is not None:
        parent |= {"fingerprint": told.facts.get("fingerprint"), "parents": told.facts.get("parents") or None}
    return {"parents": [{key: value for key, value in parent.items() if value is not None}]}
