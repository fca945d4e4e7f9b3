"""Single chat messages, one per line, are joined into dialogues."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.documents.conversations import content_of
from imatrix_runner.documents.documents import BadRecord, Conversation, DocumentRecord
from imatrix_runner.documents.message_rows import LONGEST
from imatrix_runner.documents.records import read_source

CALLING = {"role": "assistant", "content": None, "tool_calls": [{"name": "x"}]}


def said(role: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": role, **more}


def dialogues(path: Path, *rows: dict[str, Any], field: str = "") -> list[str]:
    """The roles of every dialogue, or the text of a row, or why it is bad."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for document in read_source(path, partial(content_of, field=field)):
        if isinstance(document, BadRecord):
            found.append(document.why)
        elif isinstance(document.content, Conversation):
            found.append(" ".join(str(message["role"]) for message in document.content.messages))
        else:
            found.append(document.content)
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([said("user"), said("assistant")], ["user assistant"]),
        ([said("user"), said("assistant"), said("user"), said("assistant")], ["user assistant user assistant"]),
        (
            [said("system"), said("user"), said("assistant"), said("system"), said("user")],
            ["system user assistant", "system user"],
        ),
        ([said("user"), said("user"), said("assistant")], ["user", "user assistant"]),
        ([said("user", conversation_id=1), said("assistant", conversation_id=2)], ["user", "assistant"]),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], ["user assistant"]),
        ([said("user"), {"text": "plain"}, said("user"), said("assistant")], ["user", "plain", "user assistant"]),
        ([said("user", messages=[said("user"), said("assistant")]), said("user")], ["user assistant", "user"]),
        (
            [
                said("user"),
                CALLING,
                said("tool"),
                said("assistant"),
            ],
            ["user assistant tool assistant"],
        ),
    ],
)
def test_messages_are_joined(rows: list[dict[str, Any]], expected: list[str], tmp_path: Path) -> None:
    assert dialogues(tmp_path / "d.jsonl", *rows) == expected


def test_a_list_of_messages_in_a_json_document(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([said("user"), said("assistant")]))
    (document,) = read_source(path, content_of)
    assert isinstance(document, DocumentRecord)
    assert document.where == f"{path}, item 1"
    assert isinstance(document.content, Conversation)


def test_a_dialogue_without_end_is_cut_at_a_users_turn(tmp_path: Path) -> None:
    found = dialogues(tmp_path / "d.jsonl", *[said(role) for _ in range(LONGEST) for role in ("user", "assistant")])
    assert [len(each.split()) for each in found] == [LONGEST, LONGEST]
    assert all(each.startswith("user") for each in found)


def test_a_named_field_is_taken_from_each_line(tmp_path: Path) -> None:
    assert dialogues(tmp_path / "d.jsonl", said("user"), said("assistant"), field="content") == ["user", "assistant"]


def test_a_broken_message_names_its_dialogues_first_line(tmp_path: Path) -> None:
    (why,) = dialogues(tmp_path / "d.jsonl", said("user"), {"role": "assistant", "content": 7})
    assert why == "the content of message 2 is a number, not a text"
