"""The cache of tokenised sources: one folder a source, named by everything that its content depends on.

A folder is written beside its place and renamed into it, so that it is there whole or not at all. Finding one reads no
data file: a file's digest is remembered by its path, inode, size and time of change.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from blake3 import blake3
from numpy.typing import NDArray
from tokenizers import AddedToken

from luthier.artifacts.files import NO_ROOM, no_room, write_file
from luthier.artifacts.fingerprint import cache_folder, of_file, remembered
from luthier.config.schema import SourceConfig
from luthier.data.sources import find_files, kind_of, load_hub
from luthier.data.tokens import ARRAYS, Shard

VERSION = 2
"""Part of every name: raised when the arrays or what goes into them change meaning."""
_PROBE = "The quick brown fox, 1234567890!\n\tdef f(x): return x**2  # ünïcödé\r\n你好，世界。こんにちは 안녕 🙂 <|x|>"


def token_folder(cache: Path | None) -> Path:
    """Where tokenised sources lie: in ``cache`` if one is given, else with the rest of what may be derived again."""
    return cache if cache is not None else cache_folder() / "tokens"


def source_digest(source: SourceConfig) -> str:
    """Digest of a source's content: of its files' bytes and kinds in their order, or of a hub data set's fingerprint.

    Where the files lie and what they are called does not enter: data that was moved is the same data.
    """
    files = find_files(source)
    if files is None:
        return digest_of(source.path, source.name, source.revision, load_hub(source)._fingerprint)
    return digest_of([[kind_of(path), of_file(path)] for path in files])


def place_digest(source: SourceConfig) -> str:
    """Digest of where a source lies; a folder in the cache names files and lines, so it serves one place only."""
    return digest_of(source.path, [str(path.resolve()) for path in find_files(source) or []])


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what decides a tokenizer's output: vocabulary, merges, normalisers, added and special tokens, template.

    Taken from the tokenizer as it stands in memory: the same one, saved again or brought over from another format, has
    the same digest. Padding and truncation, which every call sets anew, do not enter.
    """
    backend = tokenizer.backend_tokenizer
    steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    facts = {
        "model": _model_digest(tokenizer),
        "steps": [None if step is None else json.loads(step.__getstate__()) for step in steps],
        "added": {index: _flags(token) for index, token in tokenizer.added_tokens_decoder.items()},
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": _with_plain_newlines(tokenizer.chat_template),
        "probe": tokenizer(_PROBE)["input_ids"],
    }
    return blake3(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _model_digest(tokenizer: Any) -> str:
    """Digest of vocabulary and merges, as the tokenizer's backend writes them out: in the order of ids and ranks.

    Writing out a large vocabulary takes up to half a second, so the digest is remembered by the files opened.
    """
    model = tokenizer.backend_tokenizer.model

    def compute() -> str:
        return blake3(model.__getstate__()).hexdigest()

    folder = Path(str(tokenizer.name_or_path))
    if not (folder / "tokenizer.json").is_file():
        return compute()
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    facts = ["tokenizer", tokenizers.__version__, transformers.__version__, type(tokenizer).__name__, str(size)]
    return remembered([folder / "tokenizer.json", folder / "tokenizer_config.json"], compute, facts=facts)


def _flags(token: AddedToken) -> list[Any]:
    return [token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special]


def _with_plain_newlines(template: Any) -> Any:
    """A template's text as it is read back from a file; Jinja takes any kind of line end for the same."""
    return template.replace("\r\n", "\n").replace("\r", "\n") if isinstance(template, str) else template


def digest_of(*parts: Any) -> str:
    """Digest of JSON data."""
    return blake3(json.dumps([VERSION, *parts], sort_keys=True, default=str).encode()).hexdigest()


def open_shard(folder: Path) -> Shard | None:
    """Open a source's folder in the cache; None if it is not there, or not what was written."""
    try:
        facts = json.loads((folder / "facts.json").read_bytes())
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in ARRAYS}
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return Shard(folder, facts) if sizes == facts["sizes"] else None


class ShardWriter:
    """Writes a source's arrays sample by sample; ``publish`` makes them findable, ``discard`` removes them."""

    def __init__(self, target: Path) -> None:
        self._target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        self._files = {name: open(self._folder / f"{name}.bin", "wb") for name in ARRAYS}  # noqa: SIM115
        self._end = 0
        self._record_end = 0

    def add(
        self, ids: NDArray[np.int32], mask: NDArray[np.bool_], *, digest: int, file: int, line: int, record: bytes
    ) -> None:
        """Append one sample."""
        self._end += len(ids)
        self._record_end += len(record)
        self._put("ids", ids)
        self._put("mask", mask)
        for name, value in (("ends", self._end), ("trained", mask.sum()), ("digests", digest), ("files", file)):
            self._put(name, value)
        self._put("lines", line)
        self._put("record_ends", self._record_end)
        self._files["records"].write(record)

    def _put(self, name: str, values: Any) -> None:
        try:
            self._files[name].write(np.asarray(values, ARRAYS[name]).tobytes())
        except OSError as error:
            if error.errno in NO_ROOM:
                raise no_room(error, self._target.parent) from error
            raise

    def publish(self, facts: dict[str, Any]) -> Shard:
        """Rename the folder into its place; what another process has put there meanwhile is as good."""
        for file in self._files.values():
            file.close()
        sizes = {name: (self._folder / f"{name}.bin").stat().st_size for name in ARRAYS}
        facts = {**facts, "sizes": sizes}
        write_file(self._folder / "facts.json", json.dumps(facts, ensure_ascii=False).encode())
        if self._target.exists() and open_shard(self._target) is None:
            shutil.rmtree(self._target)
        try:
            os.rename(self._folder, self._target)
        except OSError:
            if open_shard(self._target) is None:
                raise
            shutil.rmtree(self._folder)
        return Shard(self._target, facts)

    def discard(self) -> None:
        """Remove what was written."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def summary_of(values: Sequence[int] | NDArray) -> dict[str, float]:
    """Describe lengths in tokens: least, mean, median, 95th percentile, greatest."""
    numbers = np.asarray(values)
    return {
        "min": int(numbers.min()),
        "mean": round(float(numbers.mean()), 1),
        "median": float(np.median(numbers)),
        "p95": float(np.percentile(numbers, 95)),
        "max": int(numbers.max()),
    }
