"""``luthier.json``: what a folder of ours must contain, byte for byte, and the one rule for calling it whole.

A folder is *whole* when its manifest is there, undamaged, and matches every file's size and every tensor header.
It is *verified* when every digest was recomputed from the device. The manifest is written last, so a folder without
one was never finished.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import blake3

from luthier.artifacts.files import flush_file, forget_cached, inside
from luthier.artifacts.json_file import read_object
from luthier.artifacts.tensorfile import FilePlan, Place, checked_spec, read_header
from luthier.errors import ArtifactError

NAME = "luthier.json"
FORMAT = 1
PIECE = 64 * 2**20
LARGEST = 256 * 2**20  # bytes of a manifest: millions of tensors
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True)
class Digest:
    """BLAKE3 of one stretch of one file."""

    file: str
    offset: int
    length: int
    blake3: str


@dataclass(frozen=True)
class Problem:
    """Something wrong with an artefact, for people (message, remedy) and for programs (code)."""

    code: str
    message: str
    remedy: str = ""
    fault: bool = True  # a fault means not whole; else it opens, and this is what to know

    def as_dict(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "remedy": self.remedy}


@dataclass(frozen=True)
class Manifest:
    """The content of ``luthier.json``; ``facts`` holds what is said beside the bytes (step, base, parents, versions)."""

    kind: str
    files: dict[str, int]
    digests: tuple[Digest, ...]
    tensors: tuple[Place, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def to_bytes(self) -> bytes:
        content = {
            "format": FORMAT,
            "kind": self.kind,
            **self.facts,
            "files": [{"path": path, "size": size} for path, size in sorted(self.files.items())],
            "tensors": [
                {
                    "name": p.spec.name,
                    "dtype": p.spec.dtype,
                    "shape": list(p.spec.shape),
                    "file": p.file,
                    "offset": p.offset,
                }
                for p in self.tensors
            ],
            "digests": [
                {"file": d.file, "offset": d.offset, "length": d.length, "blake3": d.blake3} for d in self.digests
            ],
        }
        content["digest"] = _self_digest(content)
        return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def stretches(size: int, plan: FilePlan | Sequence[Place] | None = None) -> list[tuple[int, int]]:
    """The (offset, length) pairs that a file is digested in: its header, then tensor by tensor in pieces of 64 MiB.

    They are a function of the file alone, never of how many processes wrote it, and they let a damaged byte be
    traced to the tensor it belongs to.
    """
    if plan is None:
        bounds = [(0, size)]
    else:
        places = sorted(plan.places if isinstance(plan, FilePlan) else plan, key=lambda place: place.offset)
        header = places[0].offset if places else size
        bounds = [(0, header)] + [(place.offset, place.spec.size) for place in places]
    return [
        (offset + start, min(PIECE, length - start)) for offset, length in bounds for start in range(0, length, PIECE)
    ]


def digest_of(data: Any) -> str:
    """BLAKE3 in hex of a bytes-like object; large ones on several threads."""
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO if len(data) > 1 << 20 else 1)
    hasher.update(data)
    return hasher.hexdigest()


def digest_file(path: Path, name: str, pieces: Iterable[tuple[int, int]]) -> Iterator[Digest]:
    """Digest stretches of a file as it lies on the device."""
    pieces = [piece for piece in pieces if piece[1]]
    if not pieces:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        try:
            for offset, length in pieces:
                with view[offset : offset + length] as part:
                    yield Digest(name, offset, length, digest_of(part))
        finally:
            view.release()


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and flush it; the last file of a folder."""
    with open(folder / NAME, "wb") as file:
        file.write(manifest.to_bytes())
        file.flush()
        flush_file(file.fileno())


def read(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        ArtifactError: it is missing, damaged, or of a newer format than this version knows.
    """
    path = folder / NAME
    if not path.is_file():
        raise ArtifactError(
            "this folder has no luthier.json, so it was never finished, or is not one of ours.",
            code="no-manifest",
            where=str(folder),
            remedy="`luthier inspect` on the run's folder shows which checkpoints are whole.",
        )
    try:
        content = read_object(path, unique=True, largest=LARGEST)
        if type(content.get("format")) is not int:
            raise ValueError("it names no format")
        newer = content["format"] > FORMAT
        if not newer and content["digest"] != _self_digest({k: v for k, v in content.items() if k != "digest"}):
            raise ValueError("its own digest does not match")
        if not newer:
            return _from_content(content)
    except (ValueError, KeyError, TypeError, RecursionError, ArtifactError) as error:
        why = error.message if isinstance(error, ArtifactError) else f"{error}"
        raise ArtifactError(
            f"the manifest is damaged: {why.rstrip('.')}.",
            code="manifest-damaged",
            where=str(path),
            remedy="Use an older checkpoint; `luthier inspect` on the run's folder lists them.",
        ) from None
    raise ArtifactError(
        f"written by a newer Luthier (format {content['format']}, this one knows {FORMAT}).",
        code="newer-format",
        where=str(path),
        remedy="Upgrade: pip install -U luthier.",
    )


def _from_content(content: dict[str, Any]) -> Manifest:
    """The manifest that JSON holds; raises ValueError, KeyError or TypeError where a value is of another type."""
    known = {"format", "kind", "files", "tensors", "digests", "digest"}
    manifest = Manifest(
        kind=_text(content["kind"]),
        files={_text(entry["path"]): _whole_number(entry["size"]) for entry in content["files"]},
        digests=tuple(
            Digest(_text(e["file"]), _whole_number(e["offset"]), _whole_number(e["length"]), _text(e["blake3"]))
            for e in content["digests"]
        ),
        tensors=tuple(
            Place(checked_spec(e["name"], e), _text(e["file"]), _whole_number(e["offset"])) for e in content["tensors"]
        ),
        facts={key: value for key, value in content.items() if key not in known},
    )
    if len(manifest.files) != len(content["files"]):
        raise ValueError("it lists a file twice")
    _check_facts(manifest.facts)
    for digest in manifest.digests:
        if digest.offset + digest.length > manifest.files.get(digest.file, 0):
            raise ValueError(f"it has a digest of bytes that {digest.file!r} does not have")
    return manifest


def _check_facts(facts: dict[str, Any]) -> None:
    parents = facts.get("parents", [])
    if not isinstance(parents, list) or not all(isinstance(parent, dict) for parent in parents):
        raise ValueError("its parents are no list of artefacts")
    for entry in (*parents, facts.get("base") or {}):
        if not isinstance(entry, dict):
            raise ValueError("its base is no artefact")
        for key in ("kind", "name", "path", "fingerprint", "revision"):
            if not isinstance(entry.get(key), str | None):
                raise ValueError(f"a parent's {key} is no text")
    for key, kind in (("fingerprint", str), ("step", int), ("versions", dict)):
        if not isinstance(facts.get(key), kind | None):
            raise ValueError(f"its {key} is of the wrong type")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no text")
    value.encode()  # half of a surrogate pair names no file
    return value


def _whole_number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.40} is no size")
    return value


def _self_digest(content: dict[str, Any]) -> str:
    return digest_of(json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())


def check_whole(folder: Path) -> tuple[Manifest | None, list[Problem]]:
    """The rule for *whole*: manifest, sizes and headers match, and no weights lie there that nobody accounts for."""
    try:
        manifest = read(folder)
    except ArtifactError as error:
        return None, [Problem(error.code, error.message, error.remedy)]
    problems: list[Problem] = []
    again = "Use an older checkpoint or copy the folder again; nothing can rebuild these bytes."
    for name, size in manifest.files.items():
        try:
            path = inside(folder, name)
        except ArtifactError as error:
            return None, [Problem(error.code, error.message, error.remedy)]
        if not path.is_file():
            problems.append(Problem("file-missing", f"{name} is missing.", again))
        elif path.stat().st_size != size:
            problems.append(Problem("file-size", f"{name} has {path.stat().st_size} bytes instead of {size}.", again))
    broken = {problem.message.split(" ", 1)[0] for problem in problems}
    expected: dict[str, list[Place]] = {}
    for place in manifest.tensors:
        expected.setdefault(place.file, []).append(place)
    for name in sorted(name for name in manifest.files if name.endswith(".safetensors")):
        if name not in broken or (folder / name).is_file():
            problems += _check_header(folder, name, expected.get(name, []))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in WEIGHT_SUFFIXES and name not in manifest.files:
            problems.append(
                Problem(
                    "stranger", f"{name} is not in the manifest.", "Move it away: it was not saved with this folder."
                )
            )
    return manifest, problems


def _check_header(folder: Path, name: str, expected: list[Place]) -> list[Problem]:
    try:
        found, _, _ = read_header(folder / name)
    except ArtifactError as error:
        return [Problem(error.code, f"{name}: {error.message}", error.remedy)]
    wanted = {place.spec.name: place for place in expected}
    remedy = "The file was changed after it was saved; use an older checkpoint or copy it again."
    problems = [
        Problem("tensor-missing", f"{name} lacks tensor {tensor}.", remedy) for tensor in wanted if tensor not in found
    ]
    problems += [Problem("tensor-extra", f"{name} holds tensor {tensor}, which was not saved there.", remedy) for tensor in found if tensor not in wanted]  # fmt: skip
    problems += [
        Problem("tensor-changed", f"{name}: tensor {tensor} is {found[tensor].spec.dtype} {list(found[tensor].spec.shape)} instead of {place.spec.dtype} {list(place.spec.shape)}.", remedy)
        for tensor, place in wanted.items()
        if tensor in found and (found[tensor].spec, found[tensor].offset) != (place.spec, place.offset)
    ]  # fmt: skip
    return problems


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache where the system can, so that `verify` reads the device."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                forget_cached(file.fileno())


def verify(folder: Path, *, threads: int = 4) -> tuple[Manifest | None, list[Problem]]:
    """Read every byte back against the manifest: `check_whole`, then every digest."""
    manifest, problems = check_whole(folder)
    if manifest is None:
        return None, problems
    return manifest, problems + read_back(folder, manifest, threads=threads)


def read_back(folder: Path, manifest: Manifest, *, threads: int = 4) -> list[Problem]:
    """Compare the bytes of every file with the manifest's digests, also before the manifest is written."""
    by_file: dict[str, list[Digest]] = {}
    for digest in manifest.digests:
        by_file.setdefault(digest.file, []).append(digest)
    uncovered = [name for name in manifest.files if manifest.files[name] and name not in by_file]
    problems = [Problem("undigested", f"{name} has no digest in the manifest.", "Save it again.") for name in uncovered]
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(lambda item: _verify_file(folder, manifest, *item), by_file.items()):
            problems += found
    return problems


def _verify_file(folder: Path, manifest: Manifest, name: str, digests: list[Digest]) -> list[Problem]:
    path = inside(folder, name)
    if not path.is_file() or path.stat().st_size != manifest.files.get(name):
        return []  # named already
    actual = digest_file(path, name, [(digest.offset, digest.length) for digest in digests])
    bad = [wanted for wanted, found in zip(digests, actual, strict=True) if wanted.blake3 != found.blake3]
    return [
        Problem(
            "bytes-changed",
            f"{name}: bytes {digest.offset} to {digest.offset + digest.length} are not those that were saved{_tensor_at(manifest, digest)}.",
            "The device or a program changed them; use an older checkpoint or copy the file again.",
        )
        for digest in bad
    ]


def _tensor_at(manifest: Manifest, digest: Digest) -> str:
    for place in manifest.tensors:
        if place.file == digest.file and place.offset <= digest.offset < place.end:
            return f" (tensor {place.spec.name})"
    return " (the header)" if digest.file.endswith(".safetensors") else ""


def raise_problems(folder: Path, problems: Sequence[Problem]) -> None:
    """Turn problems into one ArtifactError; do nothing where there are none."""
    if problems:
        rest = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ArtifactError(
            " ".join(problem.message for problem in problems[:3]) + rest,
            code=problems[0].code,
            where=str(folder),
            remedy=problems[0].remedy,
        )


def versions() -> dict[str, str]:
    """Versions of the libraries that an artefact was made with."""
    names = ("luthier", "torch", "transformers", "peft", "tokenizers", "safetensors")
    return {name: metadata.version(name) for name in names}
