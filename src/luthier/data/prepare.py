"""From the run file to tokens: every source is tokenised once, mixed by weight, and some samples are held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.config.schema import RunConfig, SourceConfig
from luthier.data.cache import (
    digest_of,
    open_shard,
    place_digest,
    source_digest,
    summary_of,
    token_folder,
    tokenizer_digest,
)
from luthier.data.heldout import hold_out
from luthier.data.tokenise import Options, TooLong, tokenise
from luthier.data.tokens import Part, Shard, Tokens

DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Prepared:
    """Tokenised data of a run, memory-mapped from the cache, and what there is to say about them."""

    train: Tokens
    eval: Tokens | None
    facts: dict[str, Any]


def longest_row(asked: int | None, limit: int | None) -> int:
    """Return the longest row in tokens: the one asked for, else 2048 or the model's own limit if that is shorter."""
    return asked if asked is not None else min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)


def too_long(config: RunConfig) -> TooLong:
    """Return what happens to samples longer than a row: the run file's rule, else the one that suits the method."""
    return config.data.too_long or ("split" if config.method == "pretrain" else "truncate")


def prepare(
    config: RunConfig, tokenizer: Any, *, cache: Path | None = None, say: Callable[[str], None] = print
) -> Prepared:
    """Tokenise what the run file names, or open it from the cache, and say what was found.

    Raises RequestError for data that cannot be read, recognised or trained on, naming file and line.
    """
    work = _Work(config, tokenizer, token_folder(cache), say)
    train = work.parts(as_sources(config.data.train))
    held_out = config.data.eval
    if held_out is None or held_out == 0:
        evaluated: list[Part] = []
    elif isinstance(held_out, float | int):
        train, evaluated = hold_out(train, float(held_out), config.train.seed)
    else:
        evaluated = work.parts(as_sources(held_out))
    train_tokens = _tokens(train)
    eval_tokens = _tokens(evaluated) if evaluated else None
    return Prepared(train_tokens, eval_tokens, _facts(work, train_tokens, eval_tokens))


def as_sources(value: str | SourceConfig | Sequence[str | SourceConfig]) -> list[SourceConfig]:
    """Bring the forms that `data.train` and `data.eval` may have into one."""
    if isinstance(value, str | SourceConfig):
        value = [value]
    return [SourceConfig(path=each) if isinstance(each, str) else each for each in value]


class _Work:
    """Finds or makes the shards of one run's sources."""

    def __init__(self, config: RunConfig, tokenizer: Any, folder: Path, say: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._tokenizer_digest = tokenizer_digest(tokenizer)
        self._folder = folder
        self._say = say
        self.options = Options(
            method=config.method,
            train_on=config.data.train_on,
            too_long=too_long(config),
            on_bad=config.data.on_bad,
            max_length=longest_row(config.train.max_length, getattr(tokenizer, "model_max_length", None)),
            columns=config.data.columns,
            encoding=config.data.encoding,
        )
        self.shards: list[Shard] = []
        self.warm = True

    def parts(self, sources: Sequence[SourceConfig]) -> list[Part]:
        return [Part(self._shard(source), weight=source.weight) for source in sources]

    def _shard(self, source: SourceConfig) -> Shard:
        chosen = source.model_dump(include={"limit", "split"})
        fingerprint = digest_of(chosen, source_digest(source), self._tokenizer_digest, asdict(self.options))
        name = digest_of(fingerprint, place_digest(source))
        shard = open_shard(self._folder / name)
        if shard is None:
            self.warm = False
            self._say(f"Tokenising {source.path}")
            shard = tokenise(source, self._tokenizer, self.options, self._folder / name, fingerprint)
        self.shards.append(shard)
        for line in describe(shard, self.options.max_length):
            self._say(line)
        return shard


def describe(shard: Shard, longest: int) -> list[str]:
    """Say in a few lines what became of a source's samples."""
    counts = shard.facts["counts"]
    lines = [f"{shard.facts['path']}: {len(shard):,} samples, format {shard.facts['format']}"]
    told = {
        "skipped": "broken samples skipped",
        "empty": "empty samples left out",
        "empty_answers": "samples with nothing but blank answers",
        "untrained": "samples left out, because no token of theirs is trained",
        "truncated": f"samples truncated to {longest} tokens",
        "dropped": f"samples of more than {longest} tokens dropped",
        "split": f"samples split into pieces of {longest} tokens",
    }
    for name, words in told.items():
        if counts[name]:
            places = shard.facts.get(f"{name}_places") or []
            lines.append(f"  {counts[name]:,} {words}{' (' + '; '.join(places) + ')' if places else ''}")
    return lines


def repeats(facts: dict[str, Any]) -> list[str]:
    """Say in a line each what a run's data hold more than once."""
    lines = []
    if facts["eval_in_train"]:
        lines.append(f"{facts['eval_in_train']:,} evaluation samples are also trained on")
    if facts["duplicates"]:
        lines.append(f"{facts['duplicates']:,} samples are duplicates of others")
    return lines


def _tokens(parts: Sequence[Part]) -> Tokens:
    parts = [part for part in parts if len(part)]
    selections = [None if part.selection is None else digest_of(part.selection.tolist()) for part in parts]
    weights = [part.weight for part in parts]
    return Tokens(parts, digest_of([part.shard.fingerprint for part in parts], selections, weights))


def _facts(work: _Work, train: Tokens, held_out: Tokens | None) -> dict[str, Any]:
    counts = [shard.facts["counts"] for shard in work.shards]
    digests = train.digests
    facts: dict[str, Any] = {name: sum(each[name] for each in counts) for name in counts[0]}
    facts |= {
        "format": ", ".join(dict.fromkeys(shard.facts["format"] for shard in work.shards)),
        "samples": len(train),
        "tokens": int(train.lengths.sum(dtype=np.int64)),
        "trained_tokens": int(train.trained.sum(dtype=np.int64)),
        "lengths": summary_of(train.lengths),
        "duplicates": int(len(digests) - len(np.unique(digests))) if work.options.too_long != "split" else 0,
        "eval_samples": len(held_out) if held_out is not None else 0,
        "eval_in_train": int(np.isin(held_out.digests, digests).sum()) if held_out is not None else 0,
        "max_length": work.options.max_length,
        "warm": work.warm,
        "fingerprint": train.fingerprint,
        "sources": [shard.facts | {"samples": len(shard)} for shard in work.shards],
    }
    return facts
