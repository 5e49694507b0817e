"""An adapter's folder, read as what it asks for: which layer, by which tensors, with which scaling.

Only plain files are looked at: peft is neither imported nor needed. What this module doesn't know the formula of, it
refuses by name, since merging by a wrong formula would go unnoticed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.artifacts import fingerprint, names
from luthier.artifacts import manifest as manifests
from luthier.artifacts.tensorfile import TensorSpec
from luthier.errors import ArtifactError, RequestError
from luthier.export.merged.methods import THROUGH_PEFT, why_not
from luthier.export.source import SafetensorsSource, Source, open_source

# Variants of LoRA whose merged form is another formula, by the key of adapter_config.json that asks for them.
VARIANTS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config", "monteclora_config",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base when the adapter is loaded
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_A\.bias|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(\.weight)?|trainable_tokens_delta)"
)


@dataclass
class Adapter:
    """One adapter: ``parts[module][part]`` and ``wholes[tensor]`` are names in ``source``.

    ``others`` are the tensors of a method that peft merges, under the names that peft writes.
    """

    folder: Path
    config: dict[str, Any]
    source: Source
    fingerprint: str
    weight: float = 1.0
    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    wholes: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return str(self.config.get("peft_type") or "").upper()

    def spec(self, module: str, part: str) -> TensorSpec:
        return self.source.specs[self.parts[module][part]]

    def scaling(self, key: str, rank: int, where: str) -> float:
        """The factor of a layer's product.

        Raises:
            ArtifactError: the tensors are of another rank than the config says.
        """
        wanted = int(self._pattern("rank_pattern", key, self.config.get("r", 8)))
        if wanted != rank:
            raise ArtifactError(
                f"{where} has rank {rank} in the file and {wanted} in adapter_config.json.",
                code="adapter-rank",
                where=str(self.folder),
                remedy="The two files belong to different adapters, or rank_pattern is missing.",
            )
        alpha = float(self._pattern("alpha_pattern", key, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _pattern(self, name: str, key: str, default: Any) -> Any:
        for pattern, value in (self.config.get(name) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", key):
                return value
        return default


@contextmanager
def open_adapters(folders: list[Path], weights: list[float]) -> Iterator[list[Adapter]]:
    """Open adapters for merging.

    Raises:
        RequestError: a folder is no adapter's, or of a method or variant whose formula is not known here.
        ArtifactError: files are missing or broken.
    """
    with ExitStack() as stack:
        yield [_read(folder, weight, stack) for folder, weight in zip(folders, weights, strict=True)]


def _read(folder: Path, weight: float, stack: ExitStack) -> Adapter:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise RequestError("there is no adapter_config.json here.", code="no-adapter", where=str(folder), remedy="Name an adapter's folder, a checkpoint or a run.")  # fmt: skip
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"it is no JSON ({error}).", code="broken-file", where=str(path), remedy="Get the file again.") from None  # fmt: skip
    _refuse_unknown(config, folder)
    source = stack.enter_context(open_source(folder, "adapter_model"))
    adapter = Adapter(folder, config, source, _fingerprint(folder, source), weight)
    for name, plain in names.renamed(source.specs, adapter=True, where=str(folder)).items():
        if adapter.method in THROUGH_PEFT and not plain.endswith("trainable_tokens_delta"):
            adapter.others[plain] = name
            continue
        plain = plain.removeprefix(names.PEFT)
        found = _PART.fullmatch(plain)
        if found:
            part = found["part"].removesuffix(".weight")
            adapter.parts.setdefault(found["module"].removesuffix(".token_adapter"), {})[part] = name
        else:
            adapter.wholes[plain.replace(".base_layer.", ".")] = name
    return adapter


def _refuse_unknown(config: dict[str, Any], folder: Path) -> None:
    method = str(config.get("peft_type") or "").upper()
    found = why_not(method)
    if found is None and method == "LORA":
        remedy = "Serve the adapter on its base, or merge it in memory with peft's merge_and_unload."
        variant = next((key for key in VARIANTS if config.get(key)), None)
        if variant:
            found = f"its LoRA is of a variant ({variant}) that is not merged by the plain formula", remedy
        elif not _init_is_plain(config):
            found = f"init_lora_weights: {config['init_lora_weights']} changes the base's weights when peft loads it", remedy  # fmt: skip
    if found:
        raise RequestError(f"{found[0]}.", code="cannot-merge", where=str(folder), remedy=found[1])


def _init_is_plain(config: dict[str, Any]) -> bool:
    value = config.get("init_lora_weights", True)
    return any(value is known or value == known for known in INITS)


def _fingerprint(folder: Path, source: Source) -> str:
    if (folder / manifests.NAME).is_file():
        told = manifests.read(folder).facts.get("fingerprint")
        if told:
            return str(told)
    if not isinstance(source, SafetensorsSource):
        return fingerprint.of_file(folder / "adapter_model.bin")
    return fingerprint.of_weights([folder / file for file in sorted(set(source.file_of.values()))])
