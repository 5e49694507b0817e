"""Where folders that others wrote meet the libraries that open them: whatever those raise is an error in words."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from luthier.errors import ArtifactError, LuthierError

Opens = TypeVar("Opens", bound=Callable[..., Any])


def refused(opens: Opens) -> Opens:
    """Make of a function that opens a path one that raises only Luthier's errors, the device's and the user's.

    A config with a wrong value ends in whatever the library's code happens to do with it: a KeyError, a
    ZeroDivisionError. The cause stays attached, and ``--debug`` shows it.
    """

    @functools.wraps(opens)
    def opening(path: str | os.PathLike[str], *arguments: Any, **settings: Any) -> Any:
        try:
            return opens(path, *arguments, **settings)
        except (LuthierError, torch.OutOfMemoryError):
            raise
        except MemoryError as error:
            raise ArtifactError(
                "cannot be opened: it asks for more memory than there is.",
                code="unreadable",
                where=os.fspath(path),
                remedy="Free memory, or look at the sizes in its config files; `luthier inspect` says how large the model is.",
            ) from error
        except Exception as error:
            raise ArtifactError(
                f"cannot be opened: {type(error).__name__}: {' '.join(str(error).split())[:300]}.",
                code="unreadable",
                where=os.fspath(path),
                remedy="A config file in it holds a value that does not fit; `luthier inspect` says what is there.",
            ) from error

    return opening  # type: ignore[return-value]
