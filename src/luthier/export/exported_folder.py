"""What an exported folder holds beside its weights, what it says of itself, and how it gets its name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.artifacts import fingerprint, publish
from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import full_disk_named, write_file
from luthier.artifacts.manifest import Digest, Manifest, digest_file, digest_of, stretches, versions
from luthier.artifacts.weight_facts import main_float
from luthier.errors import RequestError
from luthier.export.source import SafetensorsSource, Source
from luthier.export.stream import Output
from luthier.export.unfinished import forget
from luthier.report import serving

WORDS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp", ".h5", ".msgpack", ".onnx")
OURS = (manifests.NAME, "proof.json", "README.md", "config.json", "adapter_config.json", "training_args.bin")
KEPT = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab")


def word_of(dtype: str | None) -> str | None:
    """safetensors' word for bf16, fp16 or fp32.

    Raises:
        RequestError: it is none of them.
    """
    if dtype is not None and dtype not in WORDS:
        raise RequestError(f"there is no dtype {dtype!r} here.", code="dtype", where="--dtype", remedy=f"Take one of {', '.join(WORDS)}.")  # fmt: skip
    return WORDS[dtype] if dtype else None


def word_in(config: Mapping[str, Any]) -> str:
    """safetensors' word for the dtype that a config says the model has; fp32 where it says none."""
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    told = config.get("dtype") or config.get("torch_dtype") or (inner or {}).get("dtype")
    return next((word for word, name in DTYPES.items() if name == told), "F32")


def check_target(out: Path, sources: Sequence[Path]) -> None:
    """Raises RequestError where ``out`` exists, or would lie in a folder that is read."""
    if out.exists():
        raise RequestError("this folder exists already.", code="exists", where=str(out), remedy="Give another name, or move it away.")  # fmt: skip
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise RequestError(f"it lies inside {source}, which is only read.", code="inside-source", where=str(out), remedy="Give a folder outside of it.")  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a transformers folder.

    Raises:
        RequestError: there is none.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise RequestError("there is no config.json here, so it is no transformers folder.", code="not-a-model", where=str(folder), remedy="Name a model's folder; --base gives an adapter's base.")  # fmt: skip
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def changed_config(
    config: Mapping[str, Any], outputs: Sequence[Output], *, untied: bool = False, vocabulary: int | None = None
) -> dict[str, Any]:
    """The config as it was, with the dtype that most weights have now, and what else changed about them."""
    changed = dict(config)
    dtype = DTYPES.get(main_float(output.spec for output in outputs), "float32")
    for key in ("torch_dtype", "quantization_config"):  # what is written is never quantised, whatever it was read from
        changed.pop(key, None)
    changed["dtype"] = dtype
    inner = dict(changed["text_config"]) if isinstance(changed.get("text_config"), dict) else None
    for key, value in (("tie_word_embeddings", False if untied else None), ("vocab_size", vocabulary)):
        if value is None:
            continue
        if inner is not None and (key in inner or key == "vocab_size"):
            inner[key] = value
        if inner is None or key in changed or key == "tie_word_embeddings":
            changed[key] = value
    if inner is not None:
        for key in ("dtype", "torch_dtype"):
            if key in inner:
                inner[key] = dtype
        changed["text_config"] = inner
    return changed


def companions(folders: Sequence[Path]) -> dict[str, bytes]:
    """Tokenizer, template, processor, generation config; what a later folder holds too is taken from it."""
    found: dict[str, bytes] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if not path.is_file() or path.name in OURS or path.suffix in WEIGHTS or path.name.endswith(".index.json"):
                continue
            if path.suffix in KEPT:
                found[path.name] = path.read_bytes()
    return found


def as_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def parents_of(folder: Path) -> list[dict[str, Any]]:
    """What a merged folder of ours was made from; nothing for any other."""
    if not (folder / manifests.NAME).is_file():
        return []
    manifest = manifests.read(folder)
    return list(manifest.facts.get("parents", [])) if manifest.kind == "merged" else []


def said_of_exports(folders: Sequence[Path]) -> list[str]:
    """A sentence for each folder that is an export itself: what that rounded is not got back from it."""
    said = []
    for folder in folders:
        facts = manifests.read(folder).facts if (folder / manifests.NAME).is_file() else {}
        names = [str(parent.get("name")) for parent in facts.get("parents") or []]
        if names and "step" not in facts:
            said.append(f"{folder} is an export itself, made from {' and '.join(names)}; what was rounded there stays rounded")  # fmt: skip
    return said


def fingerprint_of_base(folder: Path, source: Source, seen: Mapping[tuple[str, int], Digest]) -> str | None:
    """A transformers folder's fingerprint, from digests made on the way; only what was not read is read again."""
    if not isinstance(source, SafetensorsSource):
        return None
    places = [place for name in source.specs if (place := source.place(name))]

    def compute() -> str:
        digests = []
        for place in places:
            wanted = [piece for piece in stretches(place.end, [place]) if piece[0] >= place.offset and piece[1]]
            known = [seen.get((place.file, at)) for at, _ in wanted]
            have = [d for d, (_, length) in zip(known, wanted, strict=True) if d is not None and d.length == length]
            if len(have) < len(wanted):
                have = list(digest_file(folder / place.file, place.file, wanted))
            digests += have
        return fingerprint.combine(fingerprint.of_tensors(places, digests), json.loads((folder / "config.json").read_text()))  # fmt: skip

    files = sorted(folder.glob("*.safetensors"))
    if {path.name for path in files} != {place.file for place in places}:
        return fingerprint.of_folder(folder)
    return fingerprint.remembered([*files, folder / "config.json"], compute)


def publish_folder(
    partial: Path,
    out: Path,
    manifest: Manifest,
    facts: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None,
    late: Mapping[str, bytes],
) -> None:
    """Add what could only be made from what was written, complete the manifest, and give the folder its name.

    Args:
        late: small files, such as the proof.

    Raises:
        LuthierError: the disk is full.
    """
    if "README.md" not in late and "README.md" not in manifest.files:
        late = {**late, "README.md": serving.card(partial, late.get("proof.json")).encode()}
    files, digests = dict(manifest.files), list(manifest.digests)
    for name, data in late.items():
        with full_disk_named(out):
            write_file(partial / name, data)
        files[name] = len(data)
        digests += [Digest(name, at, length, digest_of(data[at : at + length])) for at, length in stretches(len(data))]
    weights = fingerprint.of_tensors(manifest.tensors, manifest.digests)
    own = weights if config is None else fingerprint.combine(weights, config)
    told = {key: value for key, value in facts.items() if value is not None}
    told |= {"fingerprint": own, "versions": versions()}
    forget(partial)
    publish.finish(partial, out, replace(manifest, files=files, digests=tuple(digests), facts=told))


def shard_bytes(text: str | None, default: int) -> int:
    """``2GB`` as a number of bytes.

    Raises:
        RequestError: it is no size.
    """
    if text is None:
        return default
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1, "": 1}
    number = text.strip().upper().rstrip("BIGKM")
    unit = text.strip().upper()[len(number) :]
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError):
        size = 0
    if size < 1:
        raise RequestError(f"{text!r} is no size.", code="shard-size", where="--shard-size", remedy="Write it as 2GB or 500MB.")  # fmt: skip
    return size
