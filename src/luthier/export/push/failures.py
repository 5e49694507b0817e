"""What the hub's client raises, as one error that says which of its causes it was and what to do. No secrets in any of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import errors

from luthier.errors import LuthierError, RequestError

AGAIN = "The same command goes on: what the hub has by then is not sent again."
_FULL = re.compile(r"storage|quota|insufficient space|billing|payment", re.IGNORECASE)
_LARGE = re.compile(r"too (?:large|big)|larger than|exceeds|maximum (?:file )?size", re.IGNORECASE)
_SECRETS = (re.compile(r"\b(?:hf|api_org|hf_jwt)_[A-Za-z0-9._-]{4,}"), re.compile(r"(?i)bearer\s+\S+"))
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")
_NETWORK = ("TransportError", "ConnectionError", "TimeoutError", "gaierror")


@contextmanager
def explained(repo: str, endpoint: str, doing: str) -> Iterator[None]:
    """Turn whatever the client raises within the block into one of our errors.

    Args:
        doing: what was being done, as in ``uploading``.
    """
    try:
        yield
    except LuthierError:
        raise
    except Exception as error:  # the client, its HTTP library and hf_xet each raise their own
        # `from None`: the client's own texts name links that are keys to the storage while they last
        raise explain(error, repo, endpoint, doing) from None


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


@contextmanager
def quiet_secrets() -> Iterator[None]:
    """Keep keys out of the client's own log lines within the block: it names each link that it tries again."""
    log, redacting = logging.getLogger("huggingface_hub.utils._http"), _Redacting()
    log.addFilter(redacting)
    try:
        yield
    finally:
        log.removeFilter(redacting)


def explain(error: BaseException, repo: str, endpoint: str, doing: str) -> LuthierError:
    """The failure as one error; where it is the repository's id."""
    chain, text = _chain(error), _text(error, lines=4)
    if "Invalid metadata in README.md" in text:
        return _card(text, repo)
    for cause in chain:
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return RequestError("HF_HUB_OFFLINE is set, so no request was made.", code="hub-offline", where=repo, remedy="Unset it (and TRANSFORMERS_OFFLINE) to push.")  # fmt: skip
        if isinstance(cause, errors.LocalTokenNotFoundError):
            return not_logged_in(repo)
        if isinstance(cause, errors.HfHubHTTPError):
            return _by_status(cause, repo, endpoint, doing)
    for cause in chain:
        # by name: which HTTP library the client is built on differs between its versions
        if any(kind.__name__ in _NETWORK for kind in type(cause).__mro__):
            return LuthierError(
                f"the hub at {endpoint} was not reached while {doing} ({_text(cause)}).",
                code="push-unreachable",
                where=repo,
                remedy=f"Check the network, or give another hub by --endpoint or HF_ENDPOINT. {AGAIN}",
            )
    if "LFS batch API returned errors" in text:
        return _too_large(text, repo) if _LARGE.search(text) else _refused(text, repo, doing)
    return _failed(f"{doing} failed ({type(error).__name__}: {text})", repo)


def not_logged_in(repo: str) -> RequestError:
    """The error where the hub's client has no token."""
    return RequestError(
        "you are not logged in to the hub: there is no token.",
        code="not-logged-in",
        where=repo,
        remedy="Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
    )


def redacted(text: str) -> str:
    """A text without tokens, and without the part of links that is a key."""
    for secret in _SECRETS:
        text = secret.sub("<secret>", text)
    return _QUERY.sub(r"\1", text)


def _by_status(error: errors.HfHubHTTPError, repo: str, endpoint: str, doing: str) -> LuthierError:
    status = error.response.status_code
    said = redacted(" ".join((error.server_message or "").split()))[:300].rstrip(".")
    because = f" It says: {said}." if said else ""
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"the hub has no such branch of {repo}.{because}", code="no-such-revision", where="--revision", remedy="Name a branch; one that does not exist yet is made.")  # fmt: skip
    if status in (402, 507) or (status in (400, 403, 413) and _FULL.search(said)):
        return LuthierError(
            f"the hub has no room left for this account or organisation (status {status}).{because}",
            code="hub-full",
            where=repo,
            remedy=f"Make room or widen the plan; public repositories count otherwise than private ones. {AGAIN}",
        )
    if status == 401:
        return RequestError(
            f"the hub at {endpoint} does not know the token that was sent (status 401).{because}",
            code="hub-token",
            where=repo,
            remedy="Log in anew with `hf auth login`, or mend HF_TOKEN; it may have expired, or belong to another hub.",
        )
    if status in (403, 404):
        return RequestError(
            f"the token may not write to {repo} (status {status}).{because}",
            code="hub-permission",
            where=repo,
            remedy="Check the owner's name, and that the token has write access there: `hf auth whoami` says whose it is.",
        )
    if status == 413 or _LARGE.search(said):
        return _too_large(said or f"status {status}", repo)
    if status == 400:
        return _refused(said or "status 400", repo, doing)
    return _failed(f"the hub at {endpoint} answered with status {status} while {doing}.{because}", repo)


def _too_large(said: str, repo: str) -> RequestError:
    return RequestError(f"the hub does not take a file of this size: {said}.", code="hub-too-large", where=repo, remedy="Write smaller files and push those: luthier export … --to transformers --shard-size 5GB.")  # fmt: skip


def _card(said: str, repo: str) -> RequestError:
    return RequestError(f"the hub refuses the head of README.md: {said}.", code="hub-card", where=repo, remedy="Mend the YAML between the first two lines of `---`; nothing was uploaded.")  # fmt: skip


def _refused(said: str, repo: str, doing: str) -> RequestError:
    return RequestError(f"the hub refused the request while {doing}: {said}.", code="hub-refused", where=repo, remedy="The hub's own words say why; nothing was published by this request.")  # fmt: skip


def _failed(said: str, repo: str) -> LuthierError:
    return LuthierError(
        said if said.endswith(".") else f"{said}.",
        code="hub-failed",
        where=repo,
        remedy=f"Wait a little. {AGAIN} For a hub without Xet storage set HF_HUB_DISABLE_XET=1.",
    )


def _text(error: BaseException, lines: int = 1) -> str:
    told = [line.strip() for line in str(error).splitlines() if line.strip()][:lines]
    return redacted(" ".join(told) or type(error).__name__)[:300].rstrip(".")


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
