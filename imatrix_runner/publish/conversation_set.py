"""Conversations over which a chat template is checked: what programs and people send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from imatrix_runner.documents.documents import Conversation


@dataclass(frozen=True)
class CheckedConversation:
    """A conversation with the name by which findings refer to it. ``answering``: the text ends where the answer begins.
    ``variables``: what the program gives the template besides. ``typed``: its content is a list of parts, which llama.cpp
    rewrites for templates that do not take it."""

    name: str
    conversation: Conversation
    answering: bool = True
    variables: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    typed: bool = False


def _says(role: str, content: Any, **further: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **further}


_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}
_ASKS = _says("user", "What is the weather in Zürich?")
_SYSTEM = _says("system", "Answer briefly.")
_SUM = _says("user", "What is 2+2?")
_THOUGHT = (_SUM, _says("assistant", "4", reasoning_content="Two and two make four."), _says("user", "And 3+3?"))

CONVERSATIONS: Final = (
    CheckedConversation("a question", Conversation((_says("user", "Hello"),))),
    CheckedConversation("a system message", Conversation((_SYSTEM, _says("user", "Hello")))),
    CheckedConversation("several turns", Conversation((_says("user", "Hi"), _says("assistant", "Hey!"), _says("user", "Bye")))),
    CheckedConversation(
        "a finished answer", Conversation((_SYSTEM, _says("user", "Hi"), _says("assistant", "Hey!"))), answering=False
    ),
    CheckedConversation("an empty message", Conversation((_says("system", ""), _says("user", "")))),
    CheckedConversation(
        "spaces, line breaks and marks", Conversation((_says("user", "  <b>{{ x }}</b>\n\n\"quoted\" 'too' \\n é 字 🙂\n"),))
    ),
    CheckedConversation("tools", Conversation((_SYSTEM, _ASKS), (_WEATHER,))),
    CheckedConversation(
        "a call of a tool",
        Conversation(
            (
                _ASKS,
                _says("assistant", "", tool_calls=[_CALL]),
                _says("tool", '{"degrees": 18}', tool_call_id="call00001", name="get_weather"),
            ),
            (_WEATHER,),
        ),
    ),
    CheckedConversation("thinking in an earlier answer", Conversation(_THOUGHT)),
    CheckedConversation("thinking on", Conversation((_SUM,)), variables={"enable_thinking": True}),
    CheckedConversation("thinking off", Conversation((_SUM,)), variables={"enable_thinking": False}),
    CheckedConversation(
        "content in parts",
        Conversation((_says("user", [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]),)),
        typed=True,
    ),
)
