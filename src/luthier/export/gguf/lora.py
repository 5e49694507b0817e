"""An adapter as a GGUF that llama.cpp puts onto its base with `--lora`.

The file holds one alpha, and llama.cpp scales each layer by alpha / rank: where a layer's own scaling is another (rank-stabilised,
patterns) the difference goes into B. Of LoRA it knows products on linear layers only; what an adapter has besides is refused, and
goes through `--to merged`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType
from transformers import PreTrainedConfig

from luthier.artifacts import publish
from luthier.errors import ArtifactError, RequestError
from luthier.export import exported_folder as folders
from luthier.export.gguf.card import adapter_card, adapter_modelfile, verdict
from luthier.export.gguf.file import GgufBytes, GgufTensor, plan_gguf
from luthier.export.gguf.mix import QUANTS, quant_of
from luthier.export.gguf.names import architecture_of, heads_of, names_in_gguf
from luthier.export.gguf.proof import has_llama_cpp, prove_lora
from luthier.export.gguf.write import GgufMade, export_gguf, open_config
from luthier.export.merged.adapter import Adapter, open_adapters
from luthier.export.read_back import check_written
from luthier.export.source import open_source
from luthier.export.stream import Output, write_stream
from luthier.export.unfinished import unfinished

DEFAULT_QUANT = "F32"


def export_gguf_lora(
    folder: Path,
    base: Path,
    out: Path,
    *,
    quant: str | None = None,
    expected_base: str | None = None,
    prove: bool = True,
) -> GgufMade:
    """Write an adapter's folder as a GGUF LoRA file, and publish the folder ``out`` that holds it.

    Args:
        base: the folder of its base; only the config is needed, but for the proof.
        quant: F32, F16 or BF16; F32 if None.

    Raises:
        RequestError: the adapter has parts that llama.cpp knows no form of, or ``out`` exists.
        ArtifactError: the adapter does not fit the base, a file is broken, or the proof failed.
    """
    name = quant_of(quant or DEFAULT_QUANT)
    if name not in ("F32", "F16", "BF16"):
        raise RequestError(f"an adapter is not packed as {name}.", code="gguf-quant", where="--quant", remedy="Take F32, F16 or BF16; its base may be of any kind.")  # fmt: skip
    folders.check_target(out, [folder, base])
    config = open_config(base)
    with open_adapters([folder], [1.0]) as (adapter,):
        alpha = float(adapter.config.get("lora_alpha", 8))
        tensors = _tensors(adapter, config, QUANTS[name][0], alpha)
        made = GgufMade(f"adapter-{name}.gguf", name)
        metadata = {
            "general.architecture": architecture_of(config),
            "general.type": "adapter",
            "general.name": out.name,
            "general.file_type": int(QUANTS[name][1]),
            "general.base_model.count": 1,
            "general.base_model.0.name": base.name,
            "adapter.type": "lora",
            "adapter.lora.alpha": alpha,
        }
        packed = GgufBytes(adapter.source, tensors)
        with unfinished(out, [folder, base], ["gguf", name], made.said.append) as (partial, journal):
            outputs = [Output(tensor.spec, packed, tensor.name) for tensor in tensors]
            small = {"Modelfile": adapter_modelfile(made.file, base).encode()}
            planned = [plan_gguf(made.file, metadata, tensors)]
            written = write_stream(
                partial, outputs, small, stem="model", kind="gguf", metadata={}, planned=planned, journal=journal
            )
            if prove:
                made.said.append(check_written(partial, written.manifest))
            late = {"proof.json": _prove(folder, base, partial / made.file)} if prove else {}
            made.proof = verdict(late.get("proof.json"))
            late["README.md"] = adapter_card(made, folder, base, out.name).encode()
            parents: list[dict[str, Any]] = [
                {"kind": "adapter", "name": str(folder.resolve()), "fingerprint": adapter.fingerprint},
                {"kind": "base", "name": str(base.resolve())}
                | ({"fingerprint": expected_base} if expected_base else {}),
            ]
            folders.publish_folder(partial, out, written.manifest, {"parents": parents}, config=None, late=late)
    return made


def _tensors(adapter: Adapter, config: PreTrainedConfig, kind: GGMLQuantizationType, alpha: float) -> list[GgufTensor]:
    architecture, text = architecture_of(config), config.get_text_config()
    known = names_in_gguf(architecture, text)
    if adapter.wholes:
        raise _merge_first(f"{next(iter(adapter.wholes))} is a whole tensor of its own", adapter)
    found = []
    for module, parts in sorted(adapter.parts.items()):
        strange = sorted(set(parts) - {"lora_A", "lora_B"})
        if strange or len(parts) < 2:
            raise _merge_first(f"{module} has {strange[0]}" if strange else f"{module} lacks a part", adapter)
        plain = module.replace("model.language_model.", "model.").removeprefix("language_model.")
        target = known.get(f"{plain}.weight")
        if target is None:
            raise ArtifactError(f"{module} has no place in a model of type {config.model_type}.", code="coverage", where=str(adapter.folder), remedy="Give the base it was trained on with --base.")  # fmt: skip
        if target == "token_embd.weight" or (target == "output.weight" and text.tie_word_embeddings):
            raise _merge_first(f"{module} is shared by embedding and head, or is an embedding", adapter)
        a, b = adapter.spec(module, "lora_A"), adapter.spec(module, "lora_B")
        rank = a.shape[0]
        if len(a.shape) != 2 or b.shape[1:] != (rank,):
            raise _merge_first(f"{module} has factors of the shapes {list(a.shape)} and {list(b.shape)}", adapter)
        factor = adapter.scaling(module, rank, module) * rank / alpha
        heads = heads_of(architecture, target, text)
        found.append(GgufTensor(f"{target}.lora_a", a.shape, kind, parts["lora_A"]))
        found.append(GgufTensor(f"{target}.lora_b", b.shape, kind, parts["lora_B"], heads, scale=factor))
    if not found:
        raise _merge_first("it changes no linear layer", adapter)
    return found


def _merge_first(why: str, adapter: Adapter) -> RequestError:
    return RequestError(
        f"llama.cpp's adapters have no form for this one: {why}.",
        code="gguf-adapter",
        where=str(adapter.folder),
        remedy="Merge it first: `luthier export ADAPTER MERGED --to merged`, then `luthier export MERGED DST --to gguf`.",
    )


def _prove(folder: Path, base: Path, file: Path) -> bytes:
    """With a GGUF of the base beside it for as long as the proof takes."""
    with tempfile.TemporaryDirectory(prefix=publish.MARK, dir=file.parent.parent) as scratch:
        model = Path(scratch) / "base"
        with open_source(base) as source:
            specs = source.specs
        if has_llama_cpp():
            made = export_gguf(base, model, quant="F32", prove=False)
            return prove_lora(folder, base, file, specs, model / made.file)
        return prove_lora(folder, base, file, specs, None)
