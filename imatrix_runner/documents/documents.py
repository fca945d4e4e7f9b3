"""Documents, the units that a calibration text is mixed from: each a text, or a conversation to be rendered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates take: ``role``, ``content``, optionally ``tool_calls``; JSON values only.

    ``tools`` are the available functions, in the JSON schema that templates expect.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class DocumentRecord:
    """One document of a source. ``where``: its place, for people (``dialogues.jsonl, line 12``)."""

    content: str | Conversation
    where: str


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used. ``why`` is a phrase, ``todo`` a sentence."""

    where: str
    why: str
    todo: str


MAX_ROW = 16 << 20
"""Upper bound, in bytes, for a record that is read; a whole calibration text is a hundredth of it."""

MAX_VALUES = 1 << 20
"""Upper bound for brackets and commas in a record of more than 1 MiB. Each may cost a hundred bytes of memory when parsed."""

TOO_LONG = f"it is longer than {MAX_ROW >> 20} MiB"

TOO_MANY = f"it is longer than 1 MiB and has more than {MAX_VALUES} values"

SHORTEN = "Split it into shorter records, or leave it out."


@dataclass(frozen=True)
class Row:
    """The fields of one record: JSON values, or the text of a table's cells. ``where``: its place, for people."""

    where: str
    fields: Mapping[str, Any]


def too_many(text: str | bytes, start: int = 0) -> bool:
    """Whether parsing ``text`` from ``start`` on could take many times its own memory."""
    if len(text) - start <= 1 << 20:
        return False
    if isinstance(text, str):
        return sum(text.count(mark, start) for mark in "[{,") > MAX_VALUES
    return sum(text.count(mark, start) for mark in (b"[", b"{", b",")) > MAX_VALUES
