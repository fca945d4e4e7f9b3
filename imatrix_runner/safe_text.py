"""Text from outside made safe to show: in a terminal, in a report, in a file name."""

from __future__ import annotations

import unicodedata

_NAME = 200

_TEXT = 20_000

_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Bidirectional controls: they also change the direction of text that follows."""


def shown(text: str, limit: int = _NAME) -> str:
    """Return an untrusted name or line as one line of bounded length, without control characters."""
    return printable(text[:limit]) + ("…" if len(text) > limit else "")


def shown_text(text: str, limit: int = _TEXT) -> str:
    """Return an untrusted text of several lines, of bounded length. Joiners stay: many scripts and emoji need them."""
    cut = text[:limit].replace("\r\n", "\n")
    kept = (
        character
        if character in "\n\t" or (unicodedata.category(character) not in ("Cc", "Cs") and character not in _TURNING)
        else "\ufffd"
        for character in cut
    )
    return "".join(kept) + ("…" if len(text) > limit else "")


def printable(text: str) -> str:
    """Return an untrusted text without the characters that could control a terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
