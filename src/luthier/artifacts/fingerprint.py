"""Fingerprints over meaning: the same weights have the same one in any number of files and under any path.

A model's fingerprint is BLAKE3 over every tensor's name, dtype, shape and bytes, and over its config without keys
that say nothing about what it computes. The bytes enter as digests of pieces of 64 MiB, the same that a manifest
lists, so that writing a model and fingerprinting it is one pass.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from luthier.artifacts.files import replace_file
from luthier.artifacts.manifest import Digest, digest_file, digest_of, stretches
from luthier.artifacts.tensorfile import Place, check_length, read_header
from luthier.errors import ArtifactError

VOLATILE = {"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "_attn_implementation_autoset"}  # fmt: skip


def of_tensors(places: Iterable[Place], digests: Iterable[Digest]) -> str:
    """Fingerprint of a set of tensors from the digests of their stretches."""
    pieces: dict[tuple[str, int], str] = {(digest.file, digest.offset): digest.blake3 for digest in digests}
    lines = []
    for place in sorted(places, key=lambda place: place.spec.name):
        parts = [pieces[place.file, offset] for offset, _ in _tensor_stretches(place)]
        lines.append(f"{place.spec.name}|{place.spec.dtype}|{list(place.spec.shape)}|{''.join(parts)}")
    return digest_of("\n".join(lines).encode())


def _tensor_stretches(place: Place) -> list[tuple[int, int]]:
    return [stretch for stretch in stretches(place.end, [place]) if stretch[0] >= place.offset and place.spec.size]


def of_config(config: Mapping[str, Any]) -> str:
    """Fingerprint of a config.json's content without volatile keys, at any depth."""

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strip(value[key]) for key in sorted(value) if key not in VOLATILE}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return digest_of(json.dumps(strip(config), sort_keys=True).encode())


def of_folder(folder: Path) -> str:
    """Fingerprint of the safetensors weights and config in a transformers folder, cached by inode, size and time.

    Raises:
        ArtifactError: the folder has no safetensors files, or one of them is broken.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtifactError("there are no safetensors files here to fingerprint.", code="no-weights", where=str(folder))
    config = folder / "config.json"
    return remembered([*files, config], lambda: _of_model(files, config))


def of_weights(files: Sequence[Path]) -> str:
    """Fingerprint of the tensors in safetensors files alone, such as an adapter's."""
    places: list[Place] = []
    for path in files:
        check_length(path)
        places += read_header(path)[0].values()
    jobs = [(path, [s for p in places if p.file == path.name for s in _tensor_stretches(p)]) for path in files]
    with ThreadPoolExecutor(4) as pool:
        digests = [
            d for found in pool.map(lambda job: list(digest_file(job[0], job[0].name, job[1])), jobs) for d in found
        ]
    return of_tensors(places, digests)


def _of_model(files: Sequence[Path], config: Path) -> str:
    return combine(of_weights(files), json.loads(config.read_text()) if config.is_file() else {})


def combine(weights: str, config: Mapping[str, Any]) -> str:
    """A model's fingerprint from its weights' and its config."""
    return digest_of(f"{weights}|{of_config(config)}".encode())


def of_file(path: Path) -> str:
    """Fingerprint of one opaque file such as a GGUF: of all its bytes, cached alike."""

    def compute() -> str:
        digests = digest_file(path, path.name, stretches(path.stat().st_size))
        return digest_of("".join(digest.blake3 for digest in digests).encode())

    return remembered([path], compute)


def remembered(files: Sequence[Path], compute: Callable[[], str], *, facts: Sequence[str] = ()) -> str:
    """What was computed from files before, while they have the same inodes, sizes and times of change; else computed.

    Args:
        facts: what the result depends on beside the files, and what tells it from others made of the same ones.
    """
    key = digest_of(json.dumps([*map(_stat_key, files), *facts]).encode())
    memo = cache_folder() / "fingerprints" / key
    if memo.is_file():
        return memo.read_text()
    result = compute()
    with contextlib.suppress(OSError):  # a home that can't be written costs the time of computing it again
        replace_file(memo, result.encode())
    return result


def cache_folder() -> Path:
    """Where derived data may be kept between runs; safe to delete at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"


def _stat_key(path: Path) -> list[Any]:
    if not path.exists():
        return [str(path)]
    status = path.resolve().stat()
    return [str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns]
