"""A base on the hub: found through transformers, without a request where HF_HUB_OFFLINE says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors
from transformers.utils.hub import cached_file, extract_commit_hash

from luthier.errors import LuthierError, RequestError
from luthier.models.check_folder import read_json
from luthier.models.source import BaseSource

_OTHER_WAYS = (
    "Give a local folder as model.path (one fetched by ModelScope opens as it is), "
    "or set HF_ENDPOINT to a mirror that you reach."
)


def fetch_config(source: BaseSource) -> tuple[BaseSource, dict[str, Any]]:
    """Fetches config.json and pins the revision to its commit, so that everything after comes from the same one.

    Raises:
        RequestError: the hub was not reached, or has no such repository, revision or config.json.
    """
    try:
        file = str(cached_file(source.name, "config.json", revision=source.revision))
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        raise explain(error, source) from error
    commit = extract_commit_hash(file, None) or source.revision
    return replace(source, path=Path(file).parent, revision=commit), read_json(Path(file))


def explain(error: BaseException, source: BaseSource) -> LuthierError:
    """The failure of a fetch as one error that says which of its causes it was and what to do."""
    at = f" at revision {source.revision}" if source.revision else ""
    for cause in _chain(error):
        if isinstance(cause, errors.GatedRepoError):
            return _error(
                f"{source.name} is gated, and access was refused.",
                "gated",
                "Accept its terms on the hub and log in with `hf auth login`, or give a local folder.",
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return _error(f"{source.name} has no revision {source.revision}.", "no-such-revision", "Name another one.")
        if isinstance(cause, errors.RepositoryNotFoundError):
            return _error(
                f"the hub has no model {source.name}, or it is private.",
                "no-such-model",
                "Check the id; for a private one log in with `hf auth login`. " + _OTHER_WAYS,
            )
        if isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            break
        if isinstance(cause, errors.EntryNotFoundError):
            return _error(
                f"{source.name}{at} lacks a file of a transformers model ({_first_line(cause)}).",
                "not-a-model",
                "If it holds GGUF files, download one and give its path.",
            )
    if constants.HF_HUB_OFFLINE:
        return _error(
            f"{source.name}{at} is not (wholly) in the local cache, and HF_HUB_OFFLINE is set, so no request was made.",
            "hub-offline",
            "Unset HF_HUB_OFFLINE to fetch it. " + _OTHER_WAYS,
        )
    return _error(
        f"{source.name}{at} is not in the local cache, and the hub at {constants.ENDPOINT} was not reached ({_first_line(error)}).",
        "hub-unreachable",
        _OTHER_WAYS + " HF_HUB_OFFLINE=1 keeps to the cache.",
    )


def _error(message: str, code: str, remedy: str) -> RequestError:
    return RequestError(message, code=code, where="model.path", remedy=remedy)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
