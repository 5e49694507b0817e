"""Where samples come from: files, folders, globs and hub data sets, read record by record with file and line."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from luthier.config.schema import SourceConfig
from luthier.data.encoding import LONGEST_LINE, BadText, read_lines
from luthier.data.offenders import Noting, Place
from luthier.errors import RequestError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSED = ".gz"
"""May follow any of them but .parquet, which is compressed within."""
LARGEST_JSON = 2 << 30
"""Bytes in the largest .json array that is read; it has to be held in memory whole."""
TEXT_PORTION = 1 << 20
"""Characters of a .txt file taken together; longer files are cut at line ends."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_KINDS = f"Data files end in {', '.join(SUFFIXES)}; all but the tables of .parquet may be compressed ({COMPRESSED})."
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Record:
    """One sample as its source has it: column names and values."""

    place: Place
    values: dict[str, Any]
    whole: bool = True
    """False for a portion of a text that goes on in the next record."""


def kind_of(path: Path) -> str | None:
    """Return which of SUFFIXES says how a file is read; None for what is no data file."""
    name = path.name.lower()
    kind = Path(name.removesuffix(COMPRESSED)).suffix
    packed_twice = kind == ".parquet" and name.endswith(COMPRESSED)
    return kind if kind in SUFFIXES and not packed_twice else None


def find_files(source: SourceConfig) -> list[Path] | None:
    """Return the files of a source, sorted; None for a hub data set. Raises RequestError if there are none."""
    path = Path(source.path).expanduser()
    if path.is_file():
        if kind_of(path) is None:
            raise _unreadable(path)
        return [path]
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if _is_data_file(each, path))
    elif _GLOB.search(source.path):
        found = sorted(Path(each) for each in glob.glob(str(path), recursive=True))
        found = [each for each in found if each.is_file() and kind_of(each)]
    elif _HUB_ID.fullmatch(source.path) and kind_of(path) is None:
        return None
    else:
        raise _missing(path)
    if not found:
        raise RequestError(
            f"{source.path} holds no data file.",
            code="no-data",
            where="data.train",
            remedy=_KINDS,
        )
    return found


def _is_data_file(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return kind_of(path) is not None and path.is_file() and not hidden


def _unreadable(path: Path) -> RequestError:
    return RequestError(
        f"{path} is not of a kind that can be read.",
        code="unknown-file-kind",
        where=str(path),
        remedy=_KINDS,
    )


def _missing(path: Path) -> RequestError:
    folder = path.parent
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    close = get_close_matches(path.name, names, n=1)
    hint = (
        f"Did you mean {folder / close[0]}?"
        if close
        else "Check the path; relative ones start at the working directory."
    )
    return RequestError(f"{path} does not exist.", code="no-data", where="data.train", remedy=hint)


def read_records(source: SourceConfig, encoding: str | None, offenders: Noting) -> Iterator[Record]:
    """Yield a source's records, at most ``source.limit``; broken ones go to ``offenders``."""
    for count, record in enumerate(_all_records(source, encoding, offenders)):
        if count == source.limit:
            return
        yield record


def _all_records(source: SourceConfig, encoding: str | None, offenders: Noting) -> Iterator[Record]:
    files = find_files(source)
    if files is None:
        yield from _read_hub(source)
        return
    for path in files:
        if path.stat().st_size == 0:
            raise RequestError(
                f"{path} is empty.", code="empty-file", where=str(path), remedy="Write samples to it, or take it out."
            )
        kind = kind_of(path)
        if kind == ".jsonl" or (kind == ".json" and _holds_lines(path, encoding)):
            yield from _read_json_lines(path, encoding, offenders)
        elif kind == ".json":
            yield from _read_json(path, encoding, offenders)
        elif kind in (".csv", ".tsv"):
            yield from _read_table(path, encoding, offenders, "," if kind == ".csv" else "\t")
        elif kind == ".parquet":
            yield from _read_parquet(path)
        else:
            yield from _read_text(path, encoding, offenders)


def _holds_lines(path: Path, encoding: str | None) -> bool:
    """Whether a .json file is JSON Lines: its first line is a whole object, and not all there is."""
    lines = (line for _, line in read_lines(path, encoding) if not isinstance(line, str) or line.strip())
    first, second = next(lines, None), next(lines, None)
    if not isinstance(first, str) or second is None or not first.lstrip().startswith("{"):
        return False
    try:
        json.loads(first)
    except json.JSONDecodeError:
        return False
    return True


def _read_json_lines(path: Path, encoding: str | None, offenders: Noting) -> Iterator[Record]:
    for number, line in read_lines(path, encoding):
        place = Place(str(path), number)
        if isinstance(line, BadText):
            offenders.add(place, str(line))
        elif line.strip():
            try:
                values = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                offenders.add(place, f"is not JSON ({error.msg} at character {error.pos + 1})")
                continue
            except RecursionError:
                offenders.add(place, "is JSON nested too deeply")
                continue
            if isinstance(values, dict):
                yield Record(place, values)
            else:
                offenders.add(place, f"holds a JSON {_json_kind(values)} where an object {{…}} is expected")


def _json_kind(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _read_json(path: Path, encoding: str | None, offenders: Noting) -> Iterator[Record]:
    if path.stat().st_size > LARGEST_JSON:
        raise RequestError(
            f"{path} is larger than {LARGEST_JSON >> 30} GiB, and a JSON array has to be held in memory whole.",
            code="file-too-large",
            where=str(path),
            remedy="Convert it to JSON Lines (.jsonl), one object a line, which is read line by line.",
        )
    lines = []
    for number, line in read_lines(path, encoding):
        if isinstance(line, BadText):
            raise RequestError(f"{path}:{number} {line}.", code="encoding", where=f"{path}:{number}", remedy="Mend it.")
        lines.append(line)
    text = "".join(lines)
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"{path}:{getattr(error, 'lineno', 1)}"
        raise RequestError(
            f"{where} is not JSON ({error}).",
            code="broken-file",
            where=where,
            remedy="Mend the file: an array of objects, or JSON Lines with one object a line.",
        ) from None
    rows, start = _rows_of(whole, path), 0
    decoder = json.JSONDecoder()
    position = text.index("[") + 1 if isinstance(whole, list) else None
    begins = 1
    for number, values in enumerate(rows, start=1):
        if position is not None:
            position = _skip_separators(text, position)
            begins += text.count("\n", start, position)
            start = position
            _, position = decoder.raw_decode(text, position)
        place = Place(str(path), begins if position is not None else number)
        if isinstance(values, dict):
            yield Record(place, values)
        else:
            offenders.add(place, f"holds a JSON {_json_kind(values)} where an object {{…}} is expected")


def _skip_separators(text: str, position: int) -> int:
    while text[position] in " \t\r\n,":
        position += 1
    return position


def _rows_of(whole: Any, path: Path) -> list[Any]:
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict):
        tables = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(tables) == 1 and not {"messages", "conversations"} & whole.keys():
            return tables[0]
        return [whole]
    raise RequestError(
        f"{path} holds a JSON {_json_kind(whole)} where an array of objects is expected.",
        code="broken-file",
        where=str(path),
        remedy="Write an array of objects, or JSON Lines with one object a line.",
    )


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let csv read fields of more than 131,072 characters, its default; restored afterwards."""
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_table(path: Path, encoding: str | None, offenders: Noting, delimiter: str) -> Iterator[Record]:
    damaged: list[tuple[int, BadText]] = []
    finished = False

    def lines() -> Iterator[str]:
        nonlocal finished
        for number, line in read_lines(path, encoding):
            if isinstance(line, BadText):
                damaged.append((number, line))
            else:
                yield line
        finished = True

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = rows.line_num + 1 + len(damaged)
        try:
            with _long_fields():
                row = next(rows, None)
        except csv.Error as error:
            offenders.add(Place(str(path), start), f"is not a row ({error})")
            if finished:
                return
            continue
        while damaged:
            number, reason = damaged.pop()
            offenders.add(Place(str(path), number), str(reason))
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
        elif len(row) != len(header):
            offenders.add(Place(str(path), start), f"has {len(row)} fields where the header has {len(header)}")
        else:
            yield Record(Place(str(path), start), dict(zip(header, row, strict=True)))


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield Record(Place(str(path), number), _without_nulls(values))
    except pyarrow.ArrowException as error:
        raise RequestError(
            f"{path} is not a whole parquet file ({error}).",
            code="broken-file",
            where=str(path),
            remedy="Fetch or write the file again.",
        ) from None


def _without_nulls(value: Any) -> Any:
    """Drop keys without a value: columns of structs give every struct the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _read_text(path: Path, encoding: str | None, offenders: Noting) -> Iterator[Record]:
    """Yield a file as one text; a long one in portions, so that it never has to be in memory whole."""
    held: list[str] = []
    size, start = 0, 1
    for number, line in read_lines(path, encoding):
        if isinstance(line, BadText):
            offenders.add(Place(str(path), number), str(line))
            continue
        if size + len(line) > TEXT_PORTION and held:
            yield Record(Place(str(path), start), {"text": "".join(held)}, whole=False)
            held, size, start = [], 0, number
        held.append(line)
        size += len(line)
    if held:
        yield Record(Place(str(path), start), {"text": "".join(held)})


def load_hub(source: SourceConfig) -> Any:
    """Open a hub data set through ``datasets``; raises RequestError if it cannot be reached or has no such split."""
    import datasets

    try:
        return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RequestError(
            f"The data set {source.path!r} is neither a file here nor could it be opened from the hub "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}).",
            code="hub-data",
            where="data.train",
            remedy="Give a local file or folder, check the id and split, set HF_ENDPOINT to a mirror that can be "
            "reached, or unset HF_HUB_OFFLINE.",
        ) from None


def _read_hub(source: SourceConfig) -> Iterator[Record]:
    for number, values in enumerate(load_hub(source), start=1):
        yield Record(Place(source.path, number), _without_nulls(values))
