"""Sending a folder to the hub with the hub's own client, and comparing what the hub then holds, checksum by checksum."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, RepoFile, constants, get_token

from luthier import __version__
from luthier.errors import ArtifactError, RequestError
from luthier.export.push.failures import AGAIN, explained, not_logged_in

Say = Callable[[str], None]
# What plain libraries would take for part of the model, or for the model, at the top of a repository.
_WEIGHTS = re.compile(r"(adapter_)?model.*\.safetensors(\.index\.json)?|(pytorch|adapter)_model.*\.bin(\.index\.json)?|adapter_config\.json")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A repository on a hub: its id, a branch (None: the main one), and the hub's address."""

    id: str
    revision: str | None
    endpoint: str

    @property
    def url(self) -> str:
        return f"{self.endpoint}/{self.id}" + (f"/tree/{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Sent:
    """What a commit of the hub holds: ``checked`` files of it were compared and equal; ``new`` is False where all was there."""

    commit: str
    checked: int
    private: bool
    new: bool


def check_login(repo: str, endpoint: str) -> None:
    """Raises RequestError where there is no token to send; asks no hub."""
    with explained(repo, endpoint, "looking for a token"):
        if get_token() is None:
            raise not_logged_in(repo)


def default_endpoint() -> str:
    """The hub that huggingface_hub talks to: HF_ENDPOINT, or the public one."""
    return constants.ENDPOINT


def send(folder: Path, place: Place, *, private: bool, replace: bool, describe: str, say: Say) -> Sent:
    """Upload a folder's files, and ask the hub for the checksums of what it has.

    Args:
        private: make the repository so where it does not exist; one that is public is refused.
        replace: remove weights from the repository that this folder doesn't have.
        describe: the commit's description.

    Raises:
        RequestError: the hub refuses, or holds what would mix with this.
        LuthierError: the hub was not reached, failed, or is full.
        ArtifactError: the hub holds other bytes than were sent.
    """
    api = HfApi(endpoint=place.endpoint, token=True, library_name="luthier", library_version=__version__)
    with explained(place.id, place.endpoint, "making the repository"):
        api.create_repo(place.id, private=private, exist_ok=True)
        info = api.repo_info(place.id)
    is_private = bool(info.private)
    if private and not is_private:
        raise RequestError(
            f"{place.id} is public on the hub, so everybody would see what is pushed there.",
            code="hub-public",
            where=place.id,
            remedy="Say --public (in a run file `private: false`) if that is meant, or name another repository.",
        )
    if is_private and not private:
        say(f"{place.id} exists and is private, and stays so; its settings on the hub change that.")
    if place.revision and place.revision != constants.DEFAULT_REVISION and not place.revision.startswith("refs/"):
        with explained(place.id, place.endpoint, "making the branch"):
            api.create_branch(place.id, branch=place.revision, exist_ok=True)
    with explained(place.id, place.endpoint, "reading what the repository holds"):
        before = api.repo_info(place.id, revision=place.revision).sha
        there = [file.path for file in api.list_repo_tree(place.id, recursive=True, revision=place.revision) if isinstance(file, RepoFile)]  # fmt: skip
    strangers = [name for name in there if _WEIGHTS.fullmatch(name) and not (folder / name).is_file()]
    strangers = strangers if any(_WEIGHTS.fullmatch(path.name) for path in folder.iterdir()) else []
    if strangers and not replace:
        raise _mixes(strangers, place)
    with explained(place.id, place.endpoint, "uploading"):
        commit = api.upload_folder(
            repo_id=place.id, folder_path=folder, revision=place.revision, commit_message="Upload with Luthier",
            commit_description=describe, delete_patterns=[glob.escape(name) for name in strangers] or None,
        )  # fmt: skip
    say("comparing what the hub holds")
    return Sent(commit.oid, _compare(api, folder, place, commit.oid), is_private, commit.oid != before)


def _compare(api: HfApi, folder: Path, place: Place, commit: str) -> int:
    """The number of files that the hub has with the checksums of those here: SHA-256 of large ones, git's SHA-1 of small ones.

    Raises:
        ArtifactError: one is missing there, or is another.
    """
    with explained(place.id, place.endpoint, "reading the checksums of what was uploaded"):
        found = api.verify_repo_checksums(place.id, revision=commit, local_dir=folder)
    wrong = [f"{one['path']} is not what was sent ({one['algorithm']} {one['actual'][:12]} here, {one['expected'][:12]} there)" for one in found.mismatches]  # fmt: skip
    wrong += [f"{name} is not there" for name in found.extra_paths]
    if wrong:
        rest = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ArtifactError(
            f"the hub does not hold what was sent, at commit {commit[:12]}: {'; '.join(wrong[:3])}{rest}.",
            code="hub-differs",
            where=place.url,
            remedy=f"Don't use that commit. A .gitignore in the repository also keeps files away. {AGAIN}",
        )
    return found.checked_count


def _mixes(strangers: list[str], place: Place) -> RequestError:
    listed = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
    return RequestError(
        f"the repository already holds {listed}, which this folder does not have; who opens it there would get a mixture.",
        code="hub-strangers",
        where=place.url,
        remedy="--replace removes them in the same commit (older commits keep them); or push to another repository or --revision.",
    )
