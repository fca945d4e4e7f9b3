"""What a calibration text is mixed from: documents, each a text or a conversation still to be rendered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them: ``role`` and ``content``, perhaps ``tool_calls``; JSON values only.

    ``tools`` are the functions on offer, in the JSON schema that templates know.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Record:
    """One document of a source. ``where`` names its place for people: ``dialogues.jsonl, line 12``."""

    content: str | Conversation
    where: str


@dataclass(frozen=True)
class BadRecord:
    """One that cannot be used. ``why`` is a phrase, ``todo`` what to do about it."""

    where: str
    why: str
    todo: str
