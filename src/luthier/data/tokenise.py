"""One source into arrays: records are read, recognised, rendered and tokenised, and every sample is accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from luthier.config.schema import SourceConfig
from luthier.data.cache import ShardWriter
from luthier.data.encode import Encoder
from luthier.data.encoding import check_encoding
from luthier.data.formats import Conversation, Text, check_columns, convert, map_columns, require_format
from luthier.data.offenders import SHOWN, Offenders, Place, SampleError
from luthier.data.sources import read_records
from luthier.data.template import Encoded, TrainOn
from luthier.data.tokens import Shard
from luthier.data.workers import encode_in_order, worker_count
from luthier.errors import RequestError

TooLong = Literal["truncate", "drop", "split"]
TOGETHER = 512
"""Samples tokenised in one call."""
TEXT_TOGETHER = 4 << 20
"""Characters of plain text tokenised in one call."""


@dataclass(frozen=True)
class Options:
    """What decides how a source becomes tokens, beside the source and the tokenizer."""

    method: Literal["sft", "pretrain"]
    train_on: TrainOn
    too_long: TooLong
    on_bad: Literal["error", "skip"]
    max_length: int
    columns: dict[str, str] = field(default_factory=dict)
    encoding: str | None = None


@dataclass
class Counts:
    """What became of the samples of one source."""

    read: int = 0
    """Samples in the source, broken ones not counted."""
    skipped: int = 0
    """Broken samples left out under `on_bad: skip`."""
    empty: int = 0
    """Samples without any text, left out."""
    empty_answers: int = 0
    """Samples whose answers are all blank; kept."""
    untrained: int = 0
    """Samples without a token to train on, left out."""
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    """Samples longer than a row and what was done: cut off, left out, or cut into several."""
    all_trained: int = 0
    """Samples of which every token is trained."""


@dataclass(frozen=True)
class _Sample:
    place: Place
    content: Conversation | Text
    record: bytes
    digest: int


@dataclass(frozen=True)
class _Broken:
    place: Place
    reason: str


@dataclass(frozen=True)
class _Group:
    """What was read at a stretch, in the order of the source."""

    items: list[_Sample | _Broken]

    @property
    def samples(self) -> list[_Sample]:
        return [item for item in self.items if isinstance(item, _Sample)]

    @property
    def contents(self) -> list[Conversation | Text]:
        return [sample.content for sample in self.samples]


class _Noted:
    """Takes what the reader finds broken, until its turn comes: reading runs ahead of the rest."""

    def __init__(self) -> None:
        self.items: list[_Broken] = []

    def add(self, place: Place, reason: str) -> None:
        self.items.append(_Broken(place, reason))

    def take(self) -> list[_Broken]:
        taken, self.items = self.items, []
        return taken


def tokenise(source: SourceConfig, tokenizer: Any, options: Options, target: Path, fingerprint: str) -> Shard:
    """Tokenise a source into the folder ``target``; raises RequestError for what cannot be read or trained on."""
    check_encoding(options.encoding)
    check_columns(options.columns)
    writer = ShardWriter(target)
    try:
        return _Tokenising(source, tokenizer, options, writer).run(fingerprint)
    except BaseException:
        writer.discard()
        raise


class _Tokenising:
    def __init__(self, source: SourceConfig, tokenizer: Any, options: Options, writer: ShardWriter) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._options = options
        self._writer = writer
        self._offenders = Offenders(options.on_bad)
        self._counts = Counts()
        self._files: dict[str, int] = {}
        self._untrained_places: list[str] = []
        self._encoded = 0
        self._written = 0
        self._format: str | None = None
        self._encoder = Encoder(tokenizer, options.train_on)

    def run(self, fingerprint: str) -> Shard:
        groups = _grouped(self._items())
        encoded = encode_in_order(
            groups, self._encoder, self._tokenizer, self._options.train_on, workers=worker_count()
        )
        with closing(encoded):
            for group, results in encoded:
                self._take(group, results)
        self._offenders.finish()
        self._counts.skipped = self._offenders.count
        self._check()
        facts = {
            "fingerprint": fingerprint,
            "path": self._source.path,
            "format": self._format,
            "files": list(self._files),
            "counts": asdict(self._counts),
            "skipped_places": self._offenders.first,
            "untrained_places": self._untrained_places,
            "end_of_turn": self._encoder.end_of_turn,
        }
        return self._writer.publish(facts)

    def _items(self) -> Iterator[_Sample | _Broken]:
        noted = _Noted()
        for record in read_records(self._source, self._options.encoding, noted):
            yield from noted.take()
            try:
                values = map_columns(record.values, self._options.columns)
                if self._format is None:
                    self._format = require_format(values, str(record.place))
                    self._check_format(self._format, record.place)
                content = convert(values, self._format, whole=record.whole)
            except SampleError as error:
                yield _Broken(record.place, str(error))
                continue
            self._counts.read += 1
            if _is_empty(content):
                self._counts.empty += 1
            else:
                yield _sample(record.place, content)
        yield from noted.take()

    def _check_format(self, name: str, place: Place) -> None:
        if self._options.method == "pretrain" and name != "text":
            raise RequestError(
                f"{place} holds samples of the format {name}, and `method: pretrain` trains on plain text.",
                code="not-text",
                where="method",
                remedy="Set `method: sft`, with `data.train_on: all` to train on every token; or name the text's column "
                "with `data.columns: {text: …}`.",
            )
        if self._options.method == "sft" and name == "text" and self._options.train_on != "all":
            raise RequestError(
                f"{place} holds plain text, in which no answers can be told apart to train on.",
                code="no-answers",
                where="data.train_on",
                remedy="Set `method: pretrain`, or `data.train_on: all`; or bring the data into messages or "
                "prompt/completion form.",
            )

    def _take(self, group: _Group, results: Sequence[Encoded | SampleError]) -> None:
        answers = iter(results)
        for item in group.items:
            result = SampleError(item.reason) if isinstance(item, _Broken) else next(answers)
            if isinstance(item, _Broken) or isinstance(result, SampleError):
                self._offenders.add(item.place, str(result))
            else:
                self._offenders.passed()
                self._keep(item, *result)

    def _keep(self, sample: _Sample, ids: Any, mask: Any) -> None:
        self._encoded += 1
        begins = len(ids) > 0 and ids[0] == self._tokenizer.bos_token_id
        self._counts.all_trained += bool(mask.any() and mask[1 if begins else 0 :].all())
        self._counts.empty_answers += _answers_nothing(sample.content)
        longest, rule = self._options.max_length, self._options.too_long
        pieces = [(ids, mask)]
        if len(ids) > longest and rule == "drop":
            self._counts.dropped += 1
            return
        if len(ids) > longest and rule == "truncate":
            self._counts.truncated += 1
            pieces = [(ids[:longest], mask[:longest])]
        elif len(ids) > longest:
            self._counts.split += 1
            pieces = [(ids[at : at + longest], mask[at : at + longest]) for at in range(0, len(ids), longest)]
        kept = 0
        for piece, trained in pieces:
            trained = trained.copy()
            trained[:1] = False  # nothing before it predicts a sample's first token
            if trained.any():
                self._write(sample, piece, trained)
                kept += 1
        if not kept:
            self._counts.untrained += 1
            if len(self._untrained_places) < SHOWN:
                self._untrained_places.append(str(sample.place))

    def _write(self, sample: _Sample, ids: Any, mask: Any) -> None:
        file = self._files.setdefault(sample.place.file, len(self._files))
        self._writer.add(ids, mask, digest=sample.digest, file=file, line=sample.place.line, record=sample.record)
        self._written += 1

    def _check(self) -> None:
        counts, path = self._counts, self._source.path
        answers_only = self._options.train_on != "all" and self._options.method == "sft"
        if answers_only and self._written and counts.all_trained == self._encoded:
            raise RequestError(
                f"Every token of every sample in {path} would be trained, the questions too.",
                code="mask-full",
                where="data.train_on",
                remedy="The data hold answers without questions, or the template marks everything as generated. If that "
                "is meant, set `data.train_on: all`.",
            )
        if self._written:
            return
        if counts.dropped:
            raise RequestError(
                f"All {counts.dropped} samples in {path} are longer than {self._options.max_length} tokens and were dropped.",
                code="no-samples",
                where="train.max_length",
                remedy="Raise `train.max_length`, or set `data.too_long: truncate` or `split`.",
            )
        if counts.untrained:
            raise RequestError(
                f"No sample in {path} has a token to train on (the first: {', '.join(self._untrained_places)}).",
                code="mask-empty",
                where="data.train_on",
                remedy="Conversations need assistant turns within `train.max_length`; to train on every token, set "
                "`data.train_on: all`.",
            )
        why = f"; {counts.skipped} broken ones were skipped, {counts.empty} are empty" if counts.skipped else ""
        raise RequestError(
            f"{path} holds no sample{why}.", code="no-samples", where=path, remedy="Check the file, or leave it out."
        )


def _sample(place: Place, content: Conversation | Text) -> _Sample:
    if isinstance(content, Text):
        digest, record = blake3(content.text.encode()), b""
    else:
        fields = {"messages": content.messages, "tools": content.tools}
        record = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), default=str).encode()
        digest = blake3(record)
    return _Sample(place, content, record, int.from_bytes(digest.digest(length=8), "little"))


def _is_empty(content: Conversation | Text) -> bool:
    if isinstance(content, Text):
        return not content.text.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in content.messages)


def _answers_nothing(content: Conversation | Text) -> bool:
    if isinstance(content, Text):
        return False
    answers = [message for message in content.messages if message["role"] == "assistant"]
    return bool(answers) and not any(message["content"].strip() or message.get("tool_calls") for message in answers)


def _grouped(items: Iterable[_Sample | _Broken]) -> Iterator[_Group]:
    """Group samples for one call of the tokenizer, bounded in number and in text."""
    held: list[_Sample | _Broken] = []
    size = 0
    for item in items:
        held.append(item)
        size += _size(item)
        if len(held) >= TOGETHER or size >= TEXT_TOGETHER:
            yield _Group(held)
            held, size = [], 0
    if held:
        yield _Group(held)


def _size(item: _Sample | _Broken) -> int:
    if isinstance(item, _Broken):
        return 0
    return len(item.content.text) if isinstance(item.content, Text) else len(item.record)
