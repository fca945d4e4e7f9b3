"""Joins rows that are single chat messages (``{"role": …, "content": …}``) into dialogues."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from imatrix_runner.documents.documents import BadRecord, Row

LONGEST = 64
"""Number of messages after which a user's message begins a new dialogue, if nothing else in the rows marks its beginning."""

_IDS = ("conversation_id", "conv_id", "dialogue_id", "dialog_id", "chat_id", "thread_id", "session_id")
_SYSTEM = frozenset(("system", "developer"))
_USER = frozenset(("user", "human"))
_WHOLE = ("messages", "conversations", "conversation", "prompt", "instruction", "question", "text")


def joined(rows: Iterable[Row | BadRecord], stands_alone: Callable[[Mapping[str, Any]], bool]) -> Iterator[Row | BadRecord]:
    """The rows, with runs of single messages joined into rows with ``messages``. Any other row ends a run, and so does one for
    which ``stands_alone`` returns True.

    A new dialogue begins where the dialogue's id changes, with a system message, with a user's message after another user's
    message, and with a user's message after :data:`LONGEST` messages.
    """
    run: list[Row] = []
    for row in rows:
        if isinstance(row, BadRecord) or not is_message(row.fields) or stands_alone(row.fields):
            yield from _dialogue(run)
            run = []
            yield row
            continue
        if run and _begins(row.fields, run):
            yield from _dialogue(run)
            run = []
        run.append(row)
    yield from _dialogue(run)


def is_message(fields: Mapping[str, Any]) -> bool:
    """Whether a row is one message of a dialogue, without fields of any other known form."""
    if any(fields.get(name) is not None for name in _WHOLE):
        return False
    openai = isinstance(fields.get("role"), str) and (fields.get("content") is not None or fields.get("tool_calls") is not None)
    return openai or (isinstance(fields.get("from"), str) and fields.get("value") is not None)


def _begins(fields: Mapping[str, Any], run: list[Row]) -> bool:
    last = run[-1].fields
    if any(fields.get(name) != last.get(name) for name in _IDS):
        return True
    role, before = _role(fields), _role(last)
    if role in _SYSTEM:
        return True
    return role in _USER and (before in _USER or len(run) >= LONGEST)


def _role(fields: Mapping[str, Any]) -> str:
    return str(fields.get("role") or fields.get("from")).strip().lower()


def _dialogue(run: list[Row]) -> Iterator[Row]:
    if run:
        yield Row(run[0].where, {"messages": [dict(row.fields) for row in run]})
