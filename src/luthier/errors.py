"""The four ways a call can end other than well, each with an exit code and a remedy.

An error is one short paragraph for the person at the keyboard: what went wrong, where (the config key or the
file), why, and what to do about it.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_REQUEST = 2
EXIT_ARTIFACT = 3
EXIT_STOPPED = 75


class LuthierError(Exception):
    """Base of Luthier's own errors.

    Args:
        message: what went wrong and why, in one or two sentences.
        code: a short stable identifier, such as ``unknown-key``.
        where: the config key, file or folder concerned; empty where there is none.
        remedy: what to do about it; empty where nothing can be advised.
    """

    exit_code = EXIT_FAILURE

    def __init__(self, message: str, *, code: str = "error", where: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where and self.where not in self.message else self.message
        return f"{head} {self.remedy}".rstrip()

    def __reduce__(self) -> tuple:  # survives a trip through a worker process
        return _rebuild, (type(self), self.message, self.code, self.where, self.remedy)


def _rebuild(kind: type[LuthierError], message: str, code: str, where: str, remedy: str) -> LuthierError:
    return kind(message, code=code, where=where, remedy=remedy)


class RequestError(LuthierError):
    """The request is wrong: a config key, a path, a flag or the data (exit code 2)."""

    exit_code = EXIT_REQUEST


class ArtifactError(LuthierError):
    """Something on disk is broken, or a proof failed (exit code 3)."""

    exit_code = EXIT_ARTIFACT


class Stopped(LuthierError):
    """Training was asked to stop; a checkpoint is published and the run can be resumed (exit code 75)."""

    exit_code = EXIT_STOPPED
