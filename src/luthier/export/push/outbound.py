"""The files as they go out: the very bytes that were checked, and where a file names places of this machine, a copy without them.

An adapter's config names its base, and the name has to mean something elsewhere; the manifest and proofs name what they were
made from; a card shows how to open ``FOLDER``, which now has a name.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from luthier.artifacts import manifest as manifests
from luthier.artifacts.contents import ADAPTER_CONFIG
from luthier.artifacts.files import inside, link_or_copy, write_file
from luthier.artifacts.json_file import read_object
from luthier.artifacts.machine_paths import is_path, snapshot, text_without_paths, without_paths
from luthier.artifacts.manifest import Manifest, digest_file, stretches
from luthier.errors import RequestError
from luthier.export.push.parcel import CARD, Parcel
from luthier.report import serving

_MAY_NAME_PLACES = re.compile(r"(.*_)?config\.json|proof\.json")
_OWN_LINE = re.compile(r"^luthier push FOLDER .*\n", re.MULTILINE)
_HEAD = re.compile(r"\A---\n(.*?\n)---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass
class Outbound:
    """A folder of links and of changed copies, ready to be sent; ``base`` is what an adapter's base is called there."""

    folder: Path
    base: str | None = None
    changed: list[str] = field(default_factory=list)


@contextmanager
def ready(parcel: Parcel, repo: str, *, base: str | None = None, revision: str | None = None) -> Iterator[Outbound]:
    """The parcel in a folder of its own, which is removed afterwards.

    Args:
        repo: what it is called on the hub.
        base: what the base under an adapter is called there.

    Raises:
        RequestError: an adapter's base is named by a path, and nobody said what it is called on the hub.
    """
    names, revision_of_base = _names_of_bases(parcel, base)
    with tempfile.TemporaryDirectory(prefix="luthier-push-") as scratch:
        out = Outbound(Path(scratch) / "folder", base=next(iter(names.values()), None))
        for name in parcel.files:
            data = _changed(parcel, name, names, revision_of_base)
            if data is None:
                _link(inside(parcel.folder, name), out.folder / name)
            else:
                write_file(out.folder / name, data)
                out.changed.append(name)
        _write_card(parcel, out, repo, revision)
        if parcel.manifest is not None:
            manifests.write(out.folder, _manifest(parcel.manifest, out, names))
        yield out


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(source.resolve(), target)
    except OSError:  # Windows grants links to few
        link_or_copy(source, target)


def _names_of_bases(parcel: Parcel, base: str | None) -> tuple[dict[str, str], str | None]:
    """What the bases that adapters name are called on the hub, and the commit where their path tells it."""
    names: dict[str, str] = {}
    commit = None
    for name in parcel.files:
        if Path(name).name != ADAPTER_CONFIG:
            continue
        told = read_object(parcel.folder / name).get("base_model_name_or_path")
        if not isinstance(told, str) or not told:
            if base is None:
                continue
            told = ""
        cached = snapshot(told)
        if base is None and cached is None and is_path(told):
            raise named_by_path(told, str(parcel.folder / name))
        names[told], commit = (base, None) if base else cached or (told, None)
    return names, commit


def named_by_path(base: str, where: str, flag: str = "--base OWNER/NAME") -> RequestError:
    """The error for an adapter whose base nobody else could find."""
    return RequestError(
        f"the adapter names its base by a path, {base}, which nobody has who gets it from the hub.",
        code="base-is-a-path",
        where=where,
        remedy=f"Say what that base is called there: {flag}. If it is only here, push it first, or push one model: luthier export … --to merged.",
    )


def _changed(parcel: Parcel, name: str, names: dict[str, str], revision: str | None) -> bytes | None:
    """A file's content where it may not go as it is."""
    short = Path(name).name
    if short == CARD:
        told = (parcel.folder / name).read_text(encoding="utf-8")
        public = text_without_paths(told, names)
        return public.encode() if public != told else None
    if not _MAY_NAME_PLACES.fullmatch(short):
        return None
    content = read_object(parcel.folder / name)
    public = without_paths(content, names)
    if short == ADAPTER_CONFIG:
        told = content.get("base_model_name_or_path") or ""
        if told in names:
            public["base_model_name_or_path"] = names[told]
        if names.get(told, told) != told:  # a revision belongs to the name that it stood beside
            public["revision"] = revision
    return _as_json(public) if public != content else None


def _as_json(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _write_card(parcel: Parcel, out: Outbound, repo: str, revision: str | None) -> None:
    """The card, made where there is none: with the repository's name where it showed ``FOLDER``, and the base that hubs index by."""
    path = out.folder / CARD
    if path.is_file():
        told = path.read_text(encoding="utf-8")
    elif parcel.kind == "gguf":
        told = f"---\nlibrary_name: gguf\n---\n\n# {repo.partition('/')[2]}\n"
    else:
        proof = out.folder / "proof.json"
        told = serving.card(out.folder, proof.read_bytes() if proof.is_file() else None)
    here = f'"{repo}"' + (f', revision="{revision}"' if revision else "")
    public = _OWN_LINE.sub("", told)
    card = _with_base(public.replace('from_pretrained("FOLDER"', f"from_pretrained({here}"), out.base)
    if not path.is_file() or card != told:
        path.unlink(missing_ok=True)
        write_file(path, card.encode())
        out.changed = sorted({*out.changed, CARD})


def _with_base(card: str, base: str | None) -> str:
    """The card's head with ``base_model``; as it is where it has one, or where its head is not for us to write."""
    head = _HEAD.match(card)
    if base is None or (card.startswith("---\n") and not head):
        return card
    try:
        told = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:  # the hub says what is wrong with it
        return card
    if not isinstance(told, dict) or (told.get("base_model") and told["base_model"] == base):
        return card
    if isinstance(told.get("base_model"), str) and not is_path(told["base_model"]):
        return card
    body = card[head.end() :] if head else f"\n{card}"
    return f"---\n{yaml.safe_dump({'base_model': base} | told | {'base_model': base}, sort_keys=False, allow_unicode=True)}---\n{body}"


def _manifest(manifest: Manifest, out: Outbound, names: dict[str, str]) -> Manifest:
    """The manifest of what goes out: changed files with their new digests, and no places of this machine."""
    files, digests = dict(manifest.files), list(manifest.digests)
    for name in out.changed:
        if name not in files and name != CARD:
            continue
        files[name] = (out.folder / name).stat().st_size
        digests = [digest for digest in digests if digest.file != name]
        digests += digest_file(out.folder / name, name, stretches(files[name]))
    return replace(manifest, files=files, digests=tuple(digests), facts=without_paths(manifest.facts, names))
