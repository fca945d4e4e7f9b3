"""Conversations rendered with published templates, character for character as transformers renders them."""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.chat.rendering import DATE, Unrendered, render
from imatrix_runner.chat.templates import ChatTemplate, load_template
from imatrix_runner.documents.conversations import content_of
from imatrix_runner.documents.documents import Conversation
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Runner
from support.tiny_models import write_hf_directory, write_llama_gguf

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOWN = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town, in °C & <hPa>",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "Its name"},
                "days": {"type": "integer", "default": 1},
                "units": {"type": "string", "enum": ["metric", "imperial"]},
            },
            "required": ["town"],
        },
    },
}
FUNCTION = {"name": "weather", "arguments": {"town": "Zürich", "days": 2}}
CALL: dict[str, Any] = {"id": "call00001", "type": "function", "function": FUNCTION}
PLAIN: list[dict[str, Any]] = [
    {"role": "user", "content": " How 'high' <is> it? 🏔\n"},
    {"role": "assistant", "content": "4,478 m.  \n\nQuite."},
]
TURNS = [*PLAIN, {"role": "user", "content": "And in feet?"}, {"role": "assistant", "content": "14,692 ft."}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]
REASONED = [PLAIN[0], {**PLAIN[1], "reasoning_content": "The Matterhorn, then."}]
THOUGHT = [PLAIN[0], {**PLAIN[1], "thinking": "<think>Which mountain?", "reasoning": None}]
CALLED = [
    {"role": "user", "content": "Weather in Zürich?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"celsius": 21.5}'},
    {"role": "assistant", "content": "21.5 °C."},
]
NULL = [CALLED[0], {**CALLED[1], "content": None}, *CALLED[2:]]
ENDS_WITH_USER = [{"role": "user", "content": "Hello?", "name": "Ada", "weight": 0}]
CHATS: dict[str, Conversation] = {
    "plain": Conversation(tuple(PLAIN)),
    "turns": Conversation(tuple(TURNS)),
    "system": Conversation(tuple(SYSTEM)),
    "reasoned": Conversation(tuple(REASONED)),
    "thought": Conversation(tuple(THOUGHT)),
    "tools": Conversation(tuple(TURNS), (TOWN,)),
    "called": Conversation(tuple(CALLED), (TOWN,)),
    "null": Conversation(tuple(NULL), (TOWN,)),
    "open": Conversation(tuple(ENDS_WITH_USER)),
}


def template(source: str, **changes: Any) -> ChatTemplate:
    return ChatTemplate(source, "<s>", "</s>", "a test", **changes)


def texts(source: str, *conversations: Conversation) -> list[str | Unrendered]:
    return render(template(source), conversations, Runner())


# -- against transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``apply_chat_template`` of a tokenizer with the special tokens of :func:`template`, on the day our clock shows."""
    import tokenizers
    import transformers
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls.fromisoformat(DATE)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")

    def apply(source: str, chat: Conversation) -> str | Exception:
        tools = [dict(tool) for tool in chat.tools] or None
        try:
            return str(tokenizer.apply_chat_template(list(chat.messages), tools=tools, chat_template=source, tokenize=False))
        except Exception as error:  # noqa: BLE001 - to be compared
            return error

    return apply


def with_text_arguments(chat: Conversation) -> Conversation:
    arguments = CALL["function"]["arguments"]
    changed = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}
    messages = [{**each, "tool_calls": [changed]} if "tool_calls" in each else each for each in chat.messages]
    return Conversation(tuple(messages), chat.tools)


@pytest.mark.convert
def test_published_templates_render_as_in_transformers(theirs: Any, llama_models: Path) -> None:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted((llama_models / "templates").glob("*.jinja"))}
    assert len(sources) >= 60
    rendered = dict.fromkeys(CHATS, 0)
    dated, different = [], []
    for name, source in sources.items():
        for (kind, chat), ours in zip(CHATS.items(), texts(source, *CHATS.values()), strict=True):
            expected = theirs(source, chat)
            if isinstance(expected, TypeError) and kind in ("called", "null") and not isinstance(ours, Unrendered):
                expected = theirs(source, with_text_arguments(chat))  # the documented exception: see below
            if isinstance(expected, Exception):
                if not isinstance(ours, Unrendered) or str(expected).split("\n")[0][:80] not in ours.why:
                    different.append((name, kind, repr(expected), ours))
                continue
            if expected != ours:
                different.append((name, kind, expected, ours))
            rendered[kind] += 1
        if "strftime_now" in source and any(day in str(ours) for day in (DATE, "01 Jan 2026", "January 01, 2026")):
            dated.append(name)
    assert different == []
    # Not vacuous: most templates take most of them. (Three are for tools only, and one wants variables of its own.)
    assert rendered.pop("null") >= len(sources) - 20
    assert min(rendered.values()) >= len(sources) - 7
    assert len(dated) >= 4


@pytest.mark.convert
@pytest.mark.parametrize(
    "source",
    [
        "{{ messages|tojson(indent=2) }}{{ messages|tojson(separators=(',', ':'), sort_keys=True) }}",
        "{% generation %}{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}[{{ x }}]",
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
        "  {% if messages %}\n  yes\n  {% endif %}\r\n\n",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ messages }}",
        "{{ dict(a=1) }}{{ dict.fromkeys('ab', 2) }}{% set ns = namespace(self=3) %}{% set ns.b = 4 %}{{ ns.self }}{{ ns.b }}",
        "{{ messages[0] }}{{ messages[1].keys()|list }}",
        "{% set ns = namespace(_a=messages) %}",
        "{{ strftime_now('%A, %d %B %Y %H:%M:%S') }}{{ messages|length }}",
        "{{ messages[0]['content'].append(1) }}",
        "{{ dict.__class__ }}{{ messages }}",
    ],
)
def test_the_environment_is_that_of_transformers(source: str, theirs: Any) -> None:
    for chat, ours in zip(CHATS.values(), texts(source, *CHATS.values()), strict=True):
        expected = theirs(source, chat)
        if isinstance(expected, Exception):
            assert isinstance(ours, Unrendered), expected
        else:
            assert ours == expected


# -- on their own ------------------------------------------------------------------------------------------------------------


def test_arguments_are_given_as_text_to_a_template_that_wants_text() -> None:
    source = "{% for m in messages if m.tool_calls %}{{ 'CALL ' + m.tool_calls[0].function.arguments }}{% endfor %}"
    assert texts(source, CHATS["called"]) == ['CALL {"town": "Zürich", "days": 2}']


def test_the_template_for_tools_takes_what_offers_tools() -> None:
    both = template("plain {{ messages|length }}", with_tools="with {{ tools[0].function.name }} {{ messages|length }}")
    assert render(both, (CHATS["plain"], CHATS["called"]), Runner()) == ["plain 2", "with weather 4"]


def test_special_tokens_that_the_model_lacks_are_undefined() -> None:
    bare = ChatTemplate(
        "{{ bos_token is defined }} {{ eos_token }} {{ unk_token }} {{ messages|length }}", "", "</s>", "a test"
    )
    assert render(bare, (CHATS["plain"],), Runner()) == ["False </s>  2"]


def test_the_same_conversations_give_the_same_texts_at_any_time() -> None:
    source = "{{ strftime_now('%d %b %Y %H:%M') }} {{ range(10**5)|random }} {{ lipsum(n=1) }} {{ messages|length }}"
    first, again, alone = texts(source, CHATS["plain"], CHATS["plain"]) + texts(source, CHATS["plain"])
    assert first == again == alone
    assert str(first).startswith("01 Jan 2026 00:00 ")
    [other] = render(template(source), (CHATS["plain"],), Runner(), date="2024-02-29")
    assert str(other).startswith("29 Feb 2024 00:00 ")
    with pytest.raises(UsageError, match="'tomorrow' is not a date"):
        render(template(source), (CHATS["plain"],), Runner(), date="tomorrow")


def test_what_a_template_refuses_is_said_in_its_own_words() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}\n"
        "{{ raise_exception('System role\nnot \x1b[31msupported') }}{% endif %}\n{{ m.content + m.name }}{% endfor %}"
    )
    named = Conversation(({"role": "u", "content": "a", "name": "b"},))
    refused, failed, fine = texts(source, CHATS["system"], CHATS["plain"], named)
    assert isinstance(refused, Unrendered)
    assert refused.why == "the template refuses it: System role not \ufffd[31msupported"
    assert "--chat-template-file FILE" in refused.todo
    assert isinstance(failed, Unrendered)
    assert failed.why == "the template fails in line 4: 'dict object' has no attribute 'name'"
    assert fine == "ab"


def test_a_text_that_no_file_can_hold_is_refused() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = [Conversation(({"role": "user", "content": content},)) for content in (" \n", "a\0b", "a\ud83d", "fine")]
    assert [getattr(each, "why", each) for each in texts(source, *chats)] == [
        "the template's output for it is empty",
        "the template's output for it contains NUL characters",
        "the template's output for it contains half a surrogate pair, which is not a character",
        "fine",
    ]


def test_values_that_are_no_json_reach_templates_as_placeholders() -> None:
    chat = Conversation(({"role": "user", "content": "hi", "at": datetime.date(2026, 1, 1), "n": 1 << 70, 7: 8},))  # type: ignore[dict-item]
    assert texts("{{ messages[0]['at'] }} {{ messages[0].n }} {{ messages[0].content }}", chat) == [f"<date> {1 << 70} hi"]


def test_progress_is_told_up_to_the_end() -> None:
    counts: list[int] = []
    chats = [CHATS["plain"]] * 400
    slow = "{% for a in range(20000) %}{% endfor %}{{ messages|length }}"
    assert render(template(slow), chats, Runner(), on_progress=counts.append) == ["2"] * 400
    assert counts == sorted(counts)
    assert counts[-1] == 400
    assert len(counts) > 1
    assert render(template(slow), [], Runner(), on_progress=counts.append) == []


def test_the_child_loads_little() -> None:
    """It starts anew after every conversation that ended it, and answers before anything heavy would be loaded."""
    code = (
        "import sys, imatrix_runner.chat.render_worker as w; w._environment(__import__('datetime').datetime.now());"
        "print(*sorted(name for name in ('numpy', 'msgspec', 'psutil', 'click', 'rich', 'tokenizers') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# -- where templates are -----------------------------------------------------------------------------------------------------


def test_a_gguf_with_variants_of_its_template(llama_models: Path) -> None:
    model = llama_models / "ggml-vocab-command-r.gguf"
    loaded = load_template(model)
    assert (loaded.bos, loaded.eos) == ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>")
    assert loaded.others["pad_token"] == "<PAD>"
    assert loaded.origin == "tokenizer.chat_template of ggml-vocab-command-r.gguf"
    rag = load_template(model, name="rag")
    assert rag.origin == "tokenizer.chat_template.rag of ggml-vocab-command-r.gguf"
    assert rag.with_tools == ""
    assert len({loaded.source, loaded.with_tools, rag.source, ""}) == 4
    assert load_template(model, name="tool_use").source == loaded.with_tools
    assert len({loaded.sha256, rag.sha256, load_template(model, name="default").sha256}) == 3
    assert rag.sha256 == hashlib.sha256(rag.source.encode()).hexdigest()
    offered = {"name": "weather", "description": "of a town", "parameter_definitions": {}}
    plain, called = render(loaded, (CHATS["plain"], Conversation(tuple(PLAIN), (offered,))), Runner())
    assert str(plain).startswith("<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>How 'high' <is> it?")
    assert "weather" in str(called)
    with pytest.raises(UsageError, match="no chat template named 'none'") as caught:
        load_template(model, name="none")
    assert caught.value.why == "it has: default, rag, tool_use"


def test_a_gguf_with_few_tokens(tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "few-F16.gguf", layers=1, metadata={"tokenizer.chat_template": CHATML})
    assert isinstance(read_header(model).metadata["tokenizer.ggml.tokens"], tuple)
    loaded = load_template(model)
    assert loaded == ChatTemplate(CHATML, "<s>", "</s>", "tokenizer.chat_template of few-F16.gguf")
    assert render(loaded, (CHATS["plain"],), Runner()) == [
        "<|im_start|>user\n How 'high' <is> it? 🏔\n<|im_end|>\n<|im_start|>assistant\n4,478 m.  \n\nQuite.<|im_end|>\n"
    ]


def test_a_shard_of_a_gguf_has_the_template_of_the_first(tmp_path: Path) -> None:
    write_llama_gguf(tmp_path / "m-00001-of-00002.gguf", layers=1, metadata={"tokenizer.chat_template": CHATML})
    later = write_llama_gguf(tmp_path / "m-00002-of-00002.gguf", layers=1)
    assert load_template(later).source == CHATML
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(InvalidDataError, match="has no chat template"):
        load_template(later)


def test_special_tokens_that_the_vocabulary_lacks(tmp_path: Path) -> None:
    values = {
        "tokenizer.chat_template": CHATML,
        "tokenizer.ggml.unknown_token_id": 1 << 31,
        "tokenizer.ggml.mask_token_id": 512,
    }
    assert load_template(write_llama_gguf(tmp_path / "m.gguf", layers=1, metadata=values)).others == {}


def test_a_file_of_the_users_has_the_tokens_of_the_model(llama_models: Path, tmp_path: Path) -> None:
    for name, content in (("mine.jinja", CHATML), ("tokenizer_config.json", json.dumps({"chat_template": CHATML}))):
        file = tmp_path / name
        file.write_text(content, encoding="utf-8-sig" if file.suffix == ".jinja" else "utf-8")
        loaded = load_template(llama_models / "ggml-vocab-llama-bpe.gguf", file)
        assert loaded == ChatTemplate(CHATML, "<|begin_of_text|>", "<|end_of_text|>", str(file))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_the_places_of_a_hugging_face_directory(tmp_path: Path) -> None:
    """The newest place wins; what transformers would not read any more is not mixed in."""
    tokens = {"bos_token": {"content": "<b>", "lstrip": False}, "eos_token": "<e>", "pad_token": None}
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": "<old>", "unk_token": {"content": "<u>"}})
    variants = [{"name": "default", "template": "1 messages"}, {"name": "tool_use", "template": "2 messages"}, {"name": 7}, "?"]
    write_json(tmp_path / "tokenizer_config.json", {**tokens, "chat_template": variants})
    loaded = load_template(tmp_path)
    assert loaded == ChatTemplate(
        "1 messages", "<b>", "<e>", f"tokenizer_config.json of {tmp_path.name}", "2 messages", {"unk_token": "<u>"}
    )
    write_json(tmp_path / "chat_template.json", {"chat_template": "3 messages"})
    assert load_template(tmp_path).source == "3 messages"
    assert load_template(tmp_path).with_tools == ""
    (tmp_path / "chat_template.jinja").write_bytes(b"4\r\nmessages\n")
    loaded = load_template(tmp_path)
    assert (loaded.source, loaded.with_tools) == ("4\r\nmessages\n", "")
    assert loaded.origin == f"chat_template.jinja of {tmp_path.name}"
    assert render(loaded, (CHATS["plain"],), Runner()) == ["4\nmessages"]
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("5 messages", encoding="utf-8")
    (more / "rag.jinja").write_text("6 messages", encoding="utf-8")
    assert load_template(tmp_path).with_tools == "5 messages"
    assert load_template(tmp_path, name="rag").source == "6 messages"
    with pytest.raises(UsageError, match="no chat template named"):
        load_template(tmp_path, name="../additional_chat_templates/rag")


def test_one_template_under_another_name_is_the_one(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": {"tool_use": "messages"}})
    assert load_template(tmp_path).source == "messages"
    assert load_template(tmp_path).with_tools == ""
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": {"tool_use": "messages", "rag": "messages 2"}})
    with pytest.raises(InvalidDataError, match="none is the default") as caught:
        load_template(tmp_path)
    assert caught.value.why == "it has: rag, tool_use"


@pytest.mark.parametrize("kind", ["gguf", "directory", "json", "folder of ggufs"])
def test_no_template_is_an_error_and_no_guess(kind: str, llama_models: Path, tmp_path: Path) -> None:
    model, file, todo = tmp_path, None, "--chat-template-file FILE, or one field as plain text with --field."
    if kind == "gguf":
        model = llama_models / "ggml-vocab-gpt-2.gguf"
    elif kind == "folder of ggufs":
        write_llama_gguf(tmp_path / "m.gguf", layers=1)
        todo = "Give the GGUF file in it."
    else:
        write_hf_directory(tmp_path, layers=1)
        file = tmp_path / "tokenizer_config.json" if kind == "json" else None
    with pytest.raises(InvalidDataError, match="has no chat template") as caught:
        load_template(model, file)
    assert todo in caught.value.todo


def test_a_record_of_a_file_as_the_model_sees_it(llama_models: Path) -> None:
    """The whole way: a ShareGPT record, Phi-3's own template out of its GGUF."""
    record = json.loads('{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}')
    chat = content_of(record)
    assert isinstance(chat, Conversation)
    [text] = render(load_template(llama_models / "ggml-vocab-phi-3.gguf"), [chat], Runner())
    assert text == "<s><|user|>\nWhy?<|end|>\n<|assistant|>\nBecause.<|end|>\n"
