"""The format of a record is recognised, and its text or conversation extracted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.documents.conversations import MAX_DEPTH, Unfit, content_of, text_flaw
from imatrix_runner.documents.documents import Conversation

ASK, TELL = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
PAIR = (ASK, TELL)
SYSTEM = {"role": "system", "content": "Be brief."}
PARAMETERS = {"type": "object", "properties": {"town": {"type": "string"}}}
BARE = {"name": "weather", "description": "of a town", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": BARE}


def messages_of(record: Any, field: str = "") -> tuple[Any, ...]:
    found = content_of(record, field)
    assert isinstance(found, Conversation), found
    return found.messages


def why(record: Any, field: str = "") -> str:
    found = content_of(record, field)
    assert isinstance(found, Unfit), found
    assert found.todo.endswith(".")
    return found.why


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK, TELL]},
        {"messages": json.dumps([ASK, TELL]), "id": 7},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {"conversations": json.dumps([{"from": "User", "value": "Why?"}, {"from": " ChatGPT ", "value": "Because."}])},
        {"conversation": [{"from": "user", "value": "Why?"}, {"from": "model", "value": "Because."}]},
        {"conversations": [{"role": "human", "content": "Why?"}, {"role": "bot", "content": "Because."}]},
        {"prompt": "Why?", "response": "Because."},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": [ASK], "completion": [TELL]},
        {"prompt": [ASK], "chosen": [TELL], "rejected": [ASK]},
        {"prompt": "Why?", "chosen": [ASK, TELL]},
        {"chosen": [ASK, TELL], "rejected": [ASK]},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"instruction": "Why?", "response": "Because.", "context": None},
        {"question": "Why?", "answer": "Because."},
        [ASK, TELL],
    ],
)
def test_the_forms_of_a_conversation(record: Any) -> None:
    assert content_of(record) == Conversation(PAIR)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "Once.\n"}, "Once.\n"),
        ("Once.", "Once."),
        ({"prompt": "Why?", "text": "Once."}, "Once."),  # a prompt without an answer is none of the forms
        ({"conversation": "USER: hi", "text": "Once."}, "Once."),
        ({"messages": None, "text": "Once."}, "Once."),
    ],
)
def test_plain_texts(record: Any, expected: str) -> None:
    assert content_of(record) == expected


def test_precedence_where_several_forms_fit() -> None:
    forms: dict[str, Any] = {
        "messages": [{"role": "user", "content": "1"}],
        "conversations": [{"from": "human", "value": "2"}],
        "prompt": "3",
        "response": "-",
        "instruction": "4",
        "output": "-",
        "question": "5",
        "answer": "-",
        "text": "6",
    }
    taken = []
    for names in (("messages",), ("conversations",), ("prompt", "response"), ("instruction", "output"), ("question", "answer")):
        taken.append(messages_of(forms)[0]["content"])
        for name in names:
            del forms[name]
    assert [*taken, content_of(forms)] == ["1", "2", "3", "4", "5", "6"]


def test_an_instruction_with_what_it_is_about() -> None:
    for name in ("input", "context"):
        record = {"instruction": "Translate.", name: "Haus", "output": "house"}
        assert messages_of(record)[0] == {"role": "user", "content": "Translate.\n\nHaus"}
    assert messages_of({"prompt": "Why?", "input": "Haus", "response": "Because."})[0] == ASK


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_comes_first(name: str) -> None:
    for record in ({"conversations": [ASK, TELL]}, {"question": "Why?", "response": "Because."}, {"messages": [ASK, TELL]}):
        assert messages_of({**record, name: "Be brief."}) == (SYSTEM, *PAIR)
        assert messages_of({**record, name: " "}) == PAIR
        assert messages_of({**record, name: True}) == PAIR
    assert messages_of({"messages": [SYSTEM, ASK], name: "Be long."}) == (SYSTEM, ASK)


def test_a_prompt_that_the_answer_repeats_is_not_doubled() -> None:
    assert messages_of({"prompt": "Why?", "chosen": [SYSTEM, ASK, TELL]}) == (SYSTEM, *PAIR)
    assert messages_of({"prompt": [SYSTEM, ASK], "chosen": [SYSTEM, ASK, TELL]}) == (SYSTEM, *PAIR)
    assert messages_of({"prompt": [ASK, TELL], "completion": [ASK]}) == (ASK, TELL, ASK)


def test_roles_of_sharegpt() -> None:
    spoken = ("system", "human", "function_call", "observation", "function_response", "tool", "assistant", "Narrator")
    found = messages_of({"conversations": [{"from": role, "value": role} for role in spoken]})
    assert [message["role"] for message in found] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "tool",
        "assistant",
        "narrator",
    ]


def test_roles_of_messages_are_left_to_the_template() -> None:
    assert [message["role"] for message in messages_of({"messages": [{"role": "Human", "content": "a"}]})] == ["Human"]
    # Written the other way nevertheless:
    assert messages_of({"messages": [{"from": "gpt", "value": "Because."}]}) == (TELL,)


def test_what_else_a_message_has_is_kept() -> None:
    said = {"role": "tool", "content": "21", "name": "weather", "tool_call_id": "c1", "reasoning_content": None, "weight": 0}
    assert messages_of({"messages": [ASK, said]}) == (ASK, said)
    assert messages_of({"messages": [{"from": "human", "value": "Why?", "name": "Ada"}]}) == ({**ASK, "name": "Ada"},)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"town": "Zürich"}', {"town": "Zürich"}),
        ({"town": "Zürich"}, {"town": "Zürich"}),
        ("", {}),
        ("{broken", "{broken"),
        ("[1]", "[1]"),
        ('{"a":' * 100_000, '{"a":' * 100_000),
    ],
    ids=["text", "object", "empty", "broken", "list", "deep"],
)
def test_arguments_of_a_call_become_an_object(arguments: Any, expected: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    for calls in ([call], json.dumps([call])):
        found = messages_of({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": calls}]})
        made = {**call, "function": {"name": "weather", "arguments": expected}}
        assert found[1] == {"role": "assistant", "content": "", "tool_calls": [made]}
    flat = messages_of({"messages": [{**TELL, "tool_calls": [{"name": "weather", "arguments": arguments}]}]})
    assert flat[0]["tool_calls"] == [{"name": "weather", "arguments": expected}]


@pytest.mark.parametrize("calls", [None, [], "null", ""])
def test_no_calls_are_not_mentioned(calls: Any) -> None:
    record = {"messages": [{**TELL, "tool_calls": calls}]}
    if calls in ("null", ""):
        assert why(record) == "the tool calls of message 1 are not a list of objects"
    else:
        assert messages_of(record) == (TELL,)


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([TOOL], (TOOL,)),
        (json.dumps([TOOL]), (TOOL,)),
        (TOOL, (TOOL,)),
        ([BARE], (TOOL,)),
        ([{"name": "weather", "parameter_definitions": {}}], ({"name": "weather", "parameter_definitions": {}},)),
        ([], ()),
        ("", ()),
        ("[]", ()),
        (None, ()),
    ],
)
def test_tools_on_offer(tools: Any, expected: Any) -> None:
    for record in ({"messages": [ASK, TELL]}, {"conversations": [{"from": "human", "value": "Why?"}]}):
        found = content_of({**record, "tools": tools})
        assert isinstance(found, Conversation)
        assert found.tools == expected


def test_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "Wh"}, "y", {"text": ""}, {"type": "input_text", "text": "?"}]
    assert messages_of({"messages": [{"role": "user", "content": parts}]}) == (ASK,)
    record = {"messages": [{"role": "user", "content": [*parts, {"type": "image_url", "image_url": {"url": "http://x"}}]}]}
    assert why(record) == "message 1 has a part of the type image_url that is not text"
    assert why({"messages": [ASK, {"role": "user", "content": [7]}]}) == "message 2 has a part that is not text"


def test_a_tool_may_answer_with_an_object() -> None:
    said = {"role": "tool", "content": {"celsius": 21.5}}
    assert messages_of({"messages": [said]}) == (said,)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": []}, "`messages` is an empty conversation"),
        ({"messages": "hello"}, "`messages` is a text, not a list of messages"),
        ({"messages": {"role": "user"}}, "`messages` is an object, not a list of messages"),
        ({"messages": ["hello"]}, "message 1 is a text, not an object"),
        ({"messages": [ASK, {"content": "x"}]}, "message 2 has no role"),
        ({"messages": [{"role": " ", "content": "x"}]}, "message 1 has no role"),
        ({"messages": [{"role": 3, "content": "x"}]}, "the role of message 1 is a number"),
        ({"messages": [{"role": "user"}]}, "message 1 (user) has no content"),
        ({"messages": [{"role": "\x1b[31m", "content": None}]}, "message 1 (\ufffd[31m) has no content"),
        ({"messages": [{"role": "user", "content": None, "tool_calls": [{}]}]}, "message 1 (user) has no content"),
        ({"messages": [{"role": "user", "content": 7}]}, "the content of message 1 is a number, not a text"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "the content of message 1 is an object, not a text"),
        ({"messages": [{**TELL, "tool_calls": ["x"]}]}, "the tool calls of message 1 are not a list of objects"),
        ({"messages": [ASK], "tools": "weather"}, "`tools` is not a list of functions"),
        ({"messages": [ASK], "tools": [1]}, "`tools` is not a list of functions"),
        ({"conversations": []}, "`conversations` is an empty conversation"),
        ({"prompt": "Why?", "response": " "}, "`response` is empty"),
        ({"prompt": "", "response": "Because."}, "`prompt` is empty"),
        ({"question": "Why?", "answer": {"text": ["a"]}}, "`answer` is an object, neither a text nor messages"),
        ({"prompt": [], "response": "Because."}, "`prompt` is an empty conversation"),
        ({"text": 7}, "`text` is a number, not a text"),
        ({"text": "a\0b"}, "`text` contains NUL characters"),
        ({"text": "\ud83d"}, "`text` contains half a surrogate pair, which is not a character"),
        ({}, "it has no known field; it is empty"),
        (7, "the record is a number, not an object"),
        (None, "the record is null, not an object"),
        (True, "the record is true or false, not an object"),
        ([], "the record is an empty conversation"),
        (b"x", "the record is not a JSON value, not an object"),
    ],
)
def test_what_is_unfit_and_why(record: Any, expected: str) -> None:
    assert why(record) == expected


@pytest.mark.parametrize("record", [{"text": " \n"}, {"text": ""}, "", " "])
def test_a_blank_text_is_a_short_document_and_nothing_broken(record: Any) -> None:
    assert content_of(record) == ""


def test_a_record_of_no_known_form_names_its_fields() -> None:
    record = {**{f"field{number}": 0 for number in range(7)}, "\x1b]0;" + "x" * 100: 0, "ninth": 0, "prompt": "a"}
    found = content_of(record)
    assert isinstance(found, Unfit)
    listed = ", ".join(f"field{number}" for number in range(7))
    assert found.why == f"it has no known field; it has: {listed}, \ufffd]0;{'x' * 36} and 2 more"
    assert "--field NAME" in found.todo


def test_a_field_by_name() -> None:
    record = {"body": "Once.", "data": {"talk": [ASK, TELL], "inner": {"text": "Twice."}}, "a.b": "Thrice.", "n": 7, "z": None}
    record["tools"] = [TOOL]
    assert content_of(record, "body") == "Once."
    assert content_of(record, "data.talk") == Conversation(PAIR, (TOOL,))
    assert content_of(record, "data.inner.text") == "Twice."
    assert content_of(record, "data.inner") == "Twice."
    assert content_of(record, "a.b") == "Thrice."
    assert content_of({"chat": json.dumps([ASK])}, "chat") == json.dumps([ASK])  # a text is a text
    assert why(record, "n") == "`n` is a number, not a text"
    fields = "it has: body, data, a.b, n, z, tools"
    assert why(record, "none") == f"it has no field 'none'; {fields}"
    assert why(record, "z") == f"it has no field 'z'; {fields}"
    assert why(record, "body.x") == f"it has no field 'body.x'; {fields}"


def nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


def test_absurd_depth() -> None:
    def record(depth: int) -> Any:
        return {"messages": [{**ASK, "extra": nested(depth)}]}

    # The list, the message and its field are three.
    assert isinstance(content_of(record(MAX_DEPTH - 2)), Conversation)
    for depth in (MAX_DEPTH - 1, 5000):
        assert why(record(depth)) == f"it is nested deeper than {MAX_DEPTH} levels"
    assert why({"messages": [ASK], "tools": [{"function": nested(5000)}]}).startswith("it is nested deeper")
    assert why({"messages": "[" * 100_000}) == "`messages` is a text, not a list of messages"


NAMES = ["messages", "conversations", "role", "content", "from", "value", "tool_calls", "function", "arguments", "tools"]
NAMES += ["prompt", "chosen", "instruction", "input", "output", "text", "type", "system", "name", "x"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=30,
)


@given(JSON, st.sampled_from(["", "x", "x.messages", "messages"]))
def test_no_record_raises(record: Any, field: str) -> None:
    found = content_of(record, field)
    if isinstance(found, str):
        assert not found or not text_flaw(found)  # a blank one is a short document
    elif isinstance(found, Conversation):
        assert found.messages
        assert all(isinstance(message["role"], str) and "content" in message for message in found.messages)
        json.dumps(found.messages)
    else:
        assert found.why.isprintable()
