"""What a repository on the hub may be called: the rule of huggingface_hub, without importing it."""

from __future__ import annotations

import re

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(f"{_PART}/{_PART}")


def wrong_id(text: str) -> str:
    """What is wrong with OWNER/NAME, as a sentence; empty where nothing is."""
    if not _ID.fullmatch(text):
        return f"{text!r} is no OWNER/NAME of the hub: a user or an organisation, one slash, a name; letters, digits, `-`, `_` and `.` inside."
    if "--" in text or ".." in text:
        return f"{text!r} has `--` or `..` in it, which the hub does not take."
    if text.endswith(".git"):
        return f"{text!r} ends in .git, which the hub does not take."
    return ""
