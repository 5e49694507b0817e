"""Text files as lines: UTF-8 with or without a mark, or the encoding the run file names; others are named in the error.

A file whose name ends in .gz is decompressed while it is read.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from luthier.errors import RequestError

LONGEST_LINE = 64 << 20
"""Bytes (characters with `data.encoding`) in the longest line that is read; a longer one is no sample but a mistake."""
SAMPLE = 1 << 18
FEW = 0.05
"""Share of a file's lines that may be no UTF-8 before the file as a whole is taken to be in another encoding."""
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class BadText(Exception):
    """A line that cannot be read, in a file that otherwise can; the text says why."""


def check_encoding(name: str | None) -> None:
    """Raise RequestError if Python knows no such encoding."""
    if name is None:
        return
    try:
        codecs.lookup(name)
    except LookupError:
        raise RequestError(
            f"data.encoding: {name!r} is not an encoding that Python knows.",
            code="unknown-encoding",
            where="data.encoding",
            remedy="Examples: utf-8, gb18030, big5, shift_jis, utf-16, latin-1.",
        ) from None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file's bytes, decompressed; raises RequestError for a compressed file that is not whole."""
    if path.suffix.lower() != ".gz":
        with open(path, "rb") as plain:
            yield plain
        return
    try:
        with gzip.open(path, "rb") as unpacked:
            yield cast(BinaryIO, unpacked)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RequestError(
            f"{path} is not a whole gzip file ({error}).",
            code="broken-file",
            where=str(path),
            remedy="Fetch or write the file again; a file that is not compressed must not be called .gz.",
        ) from None


def read_lines(path: Path, encoding: str | None) -> Iterator[tuple[int, str | BadText]]:
    """Yield (1-based number, line with its end), or BadText in place of a line that cannot be read.

    Raises RequestError if the file as a whole is in another encoding.
    """
    if encoding is None or codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        yield from _read_utf8(path)
        return
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding=encoding, newline="") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise _too_long(path, number)
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeError as error:
        raise RequestError(
            f"{path} cannot be read as {encoding}: {error}.",
            code="encoding",
            where="data.encoding",
            remedy=_advice(_detect(path)),
        ) from None


def _read_utf8(path: Path) -> Iterator[tuple[int, str | BadText]]:
    with _open(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if number == 1:
                if line[:2] in _MARKS:
                    raise _other_encoding(path, number, _MARKS[line[:2]])
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > LONGEST_LINE:
                raise _too_long(path, number)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                detected = _detect(path)
                if detected != "utf-8":
                    raise _other_encoding(path, number, detected) from None
                yield (
                    number,
                    BadText(
                        f"is not valid UTF-8 (byte {error.start + 1} of the line); a file in another encoding needs data.encoding"
                    ),
                )


def _other_encoding(path: Path, number: int, detected: str | None) -> RequestError:
    looks = f"it looks like {detected}" if detected else "its encoding could not be recognised"
    return RequestError(
        f"{path}:{number} is not UTF-8; {looks}.", code="encoding", where=f"{path}:{number}", remedy=_advice(detected)
    )


def _advice(detected: str | None) -> str:
    if detected:
        return f"Set `data.encoding: {detected}`, or convert the file to UTF-8."
    return "Name it with `data.encoding` (gb18030, big5, shift_jis, utf-16, latin-1, …), or convert the file to UTF-8."


def _too_long(path: Path, number: int) -> RequestError:
    return RequestError(
        f"{path}:{number} is longer than {LONGEST_LINE >> 20} MiB, which is more than one sample can be.",
        code="line-too-long",
        where=f"{path}:{number}",
        remedy="Write one sample a line (JSON Lines), or cut the sample into smaller ones.",
    )


def _detect(path: Path) -> str | None:
    """Name the encoding of a file: "utf-8" where only single lines are broken, None where nothing fits."""
    with _open(path) as file:
        data = _around_first_foreign_byte(file.read(SAMPLE), file.read)
    if data[:2] in _MARKS:
        return _MARKS[data[:2]]
    lines = data.split(b"\n")[:-1] or [data]
    foreign = [line for line in lines if not line.isascii()]
    broken = sum(not _decodes(line, "utf-8") for line in foreign)
    if broken < len(foreign) / 2:
        return "utf-8"
    if _is_simplified_chinese(data):
        return "gb18030"
    if broken <= len(lines) * FEW:
        return "utf-8"
    from charset_normalizer import from_bytes

    best = from_bytes(data).best()
    if best is None:
        return None
    name = codecs.lookup(best.encoding).name
    return "gb18030" if name in ("gbk", "gb2312", "gb18030") else name


def _around_first_foreign_byte(data: bytes, read: Callable[[int], bytes]) -> bytes:
    """Read on until the sample holds something that is not ASCII: a file may begin with pages of plain English."""
    while data.isascii() and (more := read(SAMPLE)):
        data = more
    return data


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _is_simplified_chinese(data: bytes) -> bool:
    """Whether bytes read as GB18030 are mostly the 3,755 everyday characters of GB 2312's first level."""
    text = data.decode("gb18030", errors="replace")
    foreign = [character for character in text if ord(character) > 0x7F]
    if not foreign or foreign.count("\ufffd") > len(foreign) // 20:
        return False
    everyday = 0
    for character in foreign:
        pair = character.encode("gb18030", errors="replace")
        everyday += len(pair) == 2 and 0xB0 <= pair[0] <= 0xD7 and pair[1] >= 0xA1
        everyday += len(pair) == 2 and 0xA1 <= pair[0] <= 0xA3 and pair[1] >= 0xA1  # punctuation, full-width forms
    return everyday > 0.9 * len(foreign)
