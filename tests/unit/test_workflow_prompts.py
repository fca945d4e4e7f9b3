"""What of a user's file is a prompt, and how the model is given it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.chat.templates import ChatTemplate
from imatrix_runner.documents.documents import Conversation, DocumentRecord
from imatrix_runner.engines.measures import Prompt
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.evaluate.prompts import describe, read_prompts, write_prompts
from imatrix_runner.process import Runner
from support.dialogues import TEMPLATE

USER, AGAIN = {"role": "user", "content": "Why?"}, {"role": "user", "content": "And then?"}
SAID = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATML = ChatTemplate(TEMPLATE + "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}", "<s>", "</s>", "a test")


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


def asked(path: Path) -> list[str | Conversation]:
    return [record.content for record in read_prompts(path)]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("Why?", "Why?"),
        ({"prompt": "Why?"}, "Why?"),
        ({"prompt": "Why?", "text": "something else"}, "Why?"),
        ({"prompt": "Why?", "completion": "Because."}, "Why?"),
        ({"prompt": [USER], "chosen": [USER, SAID], "rejected": [USER, SAID]}, "Why?"),
        ({"prompt": [SYSTEM, USER]}, Conversation((SYSTEM, USER))),
        ({"text": "def main("}, "def main("),
        ({"question": "Why?", "answer": "Because."}, "Why?"),
        ({"instruction": "Sort these.", "input": "3 1 2", "output": "1 2 3"}, "Sort these.\n\n3 1 2"),
        ({"instruction": "Sort these.", "input": "3 1 2"}, "Sort these.\n\n3 1 2"),
        ({"prompt": "Why?", "system": "Be brief."}, Conversation((SYSTEM, USER))),
        ({"messages": [USER]}, "Why?"),
        ({"messages": [USER, SAID]}, "Why?"),
        ({"messages": [SYSTEM, USER, SAID, AGAIN, SAID]}, Conversation((SYSTEM, USER, SAID, AGAIN))),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}, "Why?"),
    ],
)
def test_every_form_of_a_record_is_what_it_asks(record: Any, expected: str | Conversation, tmp_path: Path) -> None:
    assert asked(lines(tmp_path / "prompts.jsonl", record)) == [expected]


def test_tools_on_offer_stay_with_what_is_asked(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    [found] = asked(lines(tmp_path / "prompts.jsonl", {"messages": [USER], "tools": [tool]}))
    assert found == Conversation((USER,), (tool,))


def test_prompts_come_as_lines_as_a_list_as_a_table_and_packed(tmp_path: Path) -> None:
    expected = ["Why?", "Wie – ß?", "And then?"]
    (tmp_path / "list.json").write_text(json.dumps(["Why?", {"prompt": "Wie – ß?"}, {"messages": [AGAIN]}]), encoding="utf-8")
    (tmp_path / "text.txt").write_text("Why?\r\n\n  Wie – ß?  \nAnd then?", encoding="utf-8")
    (tmp_path / "table.csv").write_text("id,prompt\n1,Why?\n2,Wie – ß?\n3,And then?\n", encoding="utf-8")
    packed = tmp_path / "lines.jsonl.gz"
    packed.write_bytes(gzip.compress(lines(tmp_path / "lines.jsonl", *expected).read_bytes()))
    for name in ("list.json", "text.txt", "table.csv", "lines.jsonl", "lines.jsonl.gz"):
        assert asked(tmp_path / name) == expected, name


def test_places_are_named_as_people_count_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n\n"two"\n', encoding="utf-8")
    assert [record.where for record in read_prompts(path)] == ["prompts.jsonl, line 1", "prompts.jsonl, line 3"]


def test_no_file_is_a_mistake_of_the_command_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UsageError, match="There is no file"):
            read_prompts(path)


def test_a_conversation_is_told_by_who_said_what() -> None:
    assert describe(DocumentRecord("Why?", "here")) == "Why?"
    assert describe(DocumentRecord(Conversation((SYSTEM, USER)), "here")) == "system: Be brief.\nuser: Why?"


def test_with_a_template_a_text_is_what_a_user_says_and_the_answer_begins() -> None:
    records = [DocumentRecord("Why?", "1"), DocumentRecord(Conversation((SYSTEM, USER, SAID, AGAIN)), "2")]
    assert write_prompts(records, CHATML, Runner()) == [
        Prompt("<s>user\nWhy?</s>\n<s>assistant\n", parse_special=True),
        Prompt(
            "<s>system\nBe brief.</s>\n<s>user\nWhy?</s>\n<s>assistant\nBecause.</s>\n<s>user\nAnd then?</s>\n<s>assistant\n",
            parse_special=True,
        ),
    ]


def test_without_a_template_a_text_is_gone_on_from_and_a_conversation_refused() -> None:
    assert write_prompts([DocumentRecord("Why?", "1")], None, Runner()) == [Prompt("Why?", parse_special=False)]
    with pytest.raises(InvalidDataError, match="p, line 2 is a conversation"):
        write_prompts(
            [DocumentRecord("Why?", "p, line 1"), DocumentRecord(Conversation((SYSTEM, USER)), "p, line 2")], None, Runner()
        )


def test_what_the_template_refuses_is_named() -> None:
    tool = DocumentRecord(Conversation(({"role": "tool", "content": "12"},)), "p, line 7")
    with pytest.raises(InvalidDataError, match="p, line 7 cannot be written down for this model") as caught:
        write_prompts([DocumentRecord("Why?", "p, line 6"), tool], CHATML, Runner())
    assert "no such role: tool" in caught.value.why
