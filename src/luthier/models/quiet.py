"""Keeping other libraries' progress bars and warnings out of our output, and only while we call them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_deprecations() -> Iterator[None]:
    """Nothing about names that transformers is about to change and peft still uses, while the block runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """No "Loading weights" bar while the block runs; the caller's setting is put back."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
