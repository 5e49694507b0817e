"""``luthier push``: a folder that was checked, to the hub, and checked again there. The only verb that writes to a network."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from luthier.artifacts.files import readable_size
from luthier.artifacts.machine_paths import text_without_paths
from luthier.config.hub_id import wrong_id
from luthier.errors import RequestError
from luthier.export.push.failures import quiet_secrets
from luthier.export.push.outbound import ready
from luthier.export.push.parcel import Parcel, find
from luthier.export.push.upload import Place, Say, check_login, default_endpoint, send


@dataclass(frozen=True)
class Pushed:
    """What the hub holds now. ``bytes`` are those of all files, ``checked`` the number of files compared by checksum."""

    id: str
    url: str
    commit: str
    revision: str | None
    private: bool
    new: bool
    files: int
    bytes: int
    checked: int
    proof: str | None
    base: str | None
    left_out: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        state = "private" if self.private else "public"
        what = f"{self.files} files, {readable_size(self.bytes)}"
        lines = [
            f"{self.url} ({state}) {'holds' if self.new else 'already held'} {what}, commit {self.commit[:12]}",
            f"read back: all {self.checked} have the checksums of the files here",
        ]
        if self.proof is None:
            lines.append(
                "no proof lies beside these weights: what was pushed is what is here, and nothing is said of what it computes"
            )
        elif self.proof != "passed":
            lines.append(f"its proof is {self.proof}")
        lines += [f"left here: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join(lines)


def push(
    path: Path,
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    endpoint: str | None = None,
    base: str | None = None,
    replace: bool = False,
    unproven: bool = False,
    say: Say = lambda text: None,
) -> Pushed:
    """Upload a run's final folder, a checkpoint's weights, or any folder that plain libraries or llama.cpp open.

    Everything is checked before the first request: the folder against its manifest, its proof, the id, the login. A second call
    after an interrupted one sends what the hub does not have yet.

    Args:
        repo: OWNER/NAME; made where it does not exist.
        private: how it is made; a repository that is public already needs ``private=False``.
        revision: a branch, made where it does not exist.
        endpoint: another hub's address; HF_ENDPOINT, or the public hub, if left out.
        base: what the base under an adapter is called on the hub, where its config names a path.
        replace: remove weights of another upload from the repository.
        unproven: also what failed its proof.
        say: told one line at a time what happens.

    Raises:
        RequestError: the request is wrong, there is no login, or the hub refuses.
        ArtifactError: the folder is damaged, its proof failed, or the hub holds other bytes than were sent.
        LuthierError: the hub was not reached, failed, or is full.
    """
    place = Place(repo, revision, _address(endpoint))
    for text, where in ((repo, "ID"), (base, "--base")):
        if text is not None and wrong_id(text):
            raise RequestError(wrong_id(text), code="hub-id", where=where, remedy="Write it as in `luthier push runs/x me/my-model`.")  # fmt: skip
    check_login(repo, place.endpoint)
    say(f"reading {path} back")
    parcel = find(Path(path), unproven=unproven)
    with ready(parcel, repo, base=base, revision=revision) as out:
        say(f"uploading {len(parcel.files)} files, {readable_size(parcel.size)}, to {place.url}")
        with quiet_secrets():
            sent = send(out.folder, place, private=private, replace=replace, describe=_description(parcel), say=say)
        sizes = [file.stat().st_size for file in out.folder.rglob("*") if file.is_file()]
    verdict = (parcel.proof or {}).get("verdict")
    return Pushed(
        repo, place.url, sent.commit, revision, sent.private, sent.new, len(sizes), sum(sizes), sent.checked,
        str(verdict) if verdict else None, out.base, list(parcel.left_out),
    )  # fmt: skip


def command(
    path: Path, repo: str, *, private: bool = True, revision: str | None = None, base: str | None = None
) -> str:
    """The line for a shell that does the same."""
    words = ["luthier", "push", str(path), repo, *([] if private else ["--public"])]
    words += ["--revision", revision] if revision else []
    words += ["--base", base] if base else []
    return shlex.join(words)


def _address(endpoint: str | None) -> str:
    if endpoint is None:
        return default_endpoint()
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise RequestError("this is no address of a hub.", code="hub-endpoint", where="--endpoint", remedy="Write it as https://hub.example.org, without a user or a query.")  # fmt: skip
    return endpoint.rstrip("/")


def _description(parcel: Parcel) -> str:
    mark = parcel.manifest.facts.get("fingerprint") if parcel.manifest else None
    lines = [f"Fingerprint: {mark}"] if mark else []
    if parcel.proof:
        lines.append(f"Proof: {parcel.proof.get('verdict')}: {parcel.proof.get('says')}")
    return text_without_paths("\n".join(lines))
