"""Interprets a JSON record as a text, or as a conversation in one of the common formats.

Formats in order of precedence: ``messages`` (OpenAI, Hugging Face); ``conversations`` or ``conversation`` (ShareGPT);
``prompt`` with ``response``, ``completion`` or ``chosen``; ``instruction`` with ``output`` or ``response`` (Alpaca);
``question`` with ``answer`` or ``response``; a list of messages in ``chosen`` or ``completion``; ``text``. Nothing is rendered
here, and roles are not checked: which ones are valid is up to the model's template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imatrix_runner.documents.documents import Conversation
from imatrix_runner.safe_text import printable

MAX_DEPTH = 64
"""Nesting of objects and lists; a tool's JSON schema has about ten levels."""

_PAIRS = (
    ("prompt", ("response", "completion", "chosen")),
    ("instruction", ("output", "response")),
    ("question", ("answer", "response")),
)
_INPUTS = ("input", "context")  # the input of an instruction: Alpaca's name and Dolly's
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "model", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_CORRECT = "Correct this record."

Message = dict[str, Any]


@dataclass(frozen=True)
class Unfit:
    """A record that is neither a text nor a conversation. ``why`` is a phrase, ``todo`` a sentence."""

    why: str
    todo: str = _CORRECT


def content_of(record: Any, field: str = "", *, unanswered: bool = False) -> str | Conversation | Unfit:
    """The text or conversation in a JSON value read from a source.

    ``field`` names the one field to take, which may be nested (``data.dialogue``): a string there is plain text, a list of
    messages a conversation, an object a record itself. ``unanswered``: a ``prompt``, ``instruction`` or ``question`` without an
    answer is a conversation as well. Never raises for bad data.
    """
    if isinstance(record, str):
        return _text(record, "the record")
    if isinstance(record, (list, tuple)):
        return _conversation(_messages(record, "the record"), {})
    if not isinstance(record, Mapping):
        return Unfit(f"the record is {_kind(record)}, not an object")
    if field:
        return _field(record, field)
    if record.get("messages") is not None:
        return _conversation(_messages(record["messages"], "`messages`"), record)
    for name in ("conversations", "conversation"):
        value = _decoded(record.get(name))
        if isinstance(value, (list, tuple)):
            return _conversation(_messages(value, f"`{name}`", sharegpt=True), record)
    for asked, answers in _PAIRS:
        answered = next((name for name in answers if record.get(name) is not None), "")
        if record.get(asked) is not None and (answered or unanswered):
            return _conversation(_pair(record, asked, answered), record)
    for name in ("chosen", "completion"):
        if isinstance(record.get(name), (list, tuple)):
            return _conversation(_messages(record[name], f"`{name}`"), record)
    if record.get("text") is not None:
        return _text(record["text"], "`text`")
    return Unfit(f"it has no known field; {_fields(record)}", "Name the field to take with --field NAME.")


def text_flaw(text: str) -> str:
    """Why a text cannot be part of a calibration text, as the end of a sentence about it; empty if it can."""
    if not text.strip():
        return "is empty"
    if "\0" in text:
        return "contains NUL characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "contains half a surrogate pair, which is not a character"
    return ""


def _field(record: Mapping[Any, Any], field: str) -> str | Conversation | Unfit:
    value: Any = record
    for name in (field,) if field in record else field.split("."):
        if not isinstance(value, Mapping) or value.get(name) is None:
            return Unfit(f"it has no field {printable(field)[:80]!r}; {_fields(record)}", "Name another field with --field.")
        value = value[name]
    what = f"`{printable(field)[:80]}`"
    if isinstance(value, Mapping):
        return content_of(value)
    if isinstance(value, (list, tuple)):
        return _conversation(_messages(value, what), record)
    return _text(value, what)


def _text(value: Any, what: str) -> str | Unfit:
    if not isinstance(value, str):
        return Unfit(f"{what} is {_kind(value)}, not a text", "Name the field to take with --field NAME.")
    if not value.strip():
        return ""  # many published sets have such rows: they count as short documents, not as broken ones
    flaw = text_flaw(value)
    return Unfit(f"{what} {flaw}") if flaw else value


def _conversation(messages: list[Message] | Unfit, record: Mapping[Any, Any]) -> Conversation | Unfit:
    """A conversation of the messages, with the record's ``system`` (or ``system_prompt``) and ``tools``."""
    if isinstance(messages, Unfit):
        return messages
    system = next((record[name] for name in ("system", "system_prompt") if isinstance(record.get(name), str)), "")
    if system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    tools = _tools(record.get("tools"))
    if isinstance(tools, Unfit):
        return tools
    if _too_deep((messages, tools)):
        return Unfit(f"it is nested deeper than {MAX_DEPTH} levels")
    return Conversation(tuple(messages), tuple(tools))


def _messages(value: Any, what: str, *, sharegpt: bool = False) -> list[Message] | Unfit:
    value = _decoded(value)
    if not isinstance(value, (list, tuple)):
        return Unfit(f"{what} is {_kind(value)}, not a list of messages")
    if not value:
        return Unfit(f"{what} is an empty conversation")
    messages: list[Message] = []
    for number, item in enumerate(value, 1):
        message = _message(item, number, sharegpt)
        if isinstance(message, Unfit):
            return message
        messages.append(message)
    return messages


def _message(item: Any, number: int, sharegpt: bool) -> Message | Unfit:
    """One message in the form that templates take. Other fields (``name``, ``reasoning_content``, …) are kept, because some
    templates use them."""
    if not isinstance(item, Mapping):
        return Unfit(f"message {number} is {_kind(item)}, not an object")
    role = item["role"] if item.get("role") is not None else item.get("from")
    if not isinstance(role, str):
        return Unfit(f"message {number} has no role" if role is None else f"the role of message {number} is {_kind(role)}")
    if not role.strip():
        return Unfit(f"message {number} has no role")
    if sharegpt or "role" not in item:
        role = role.strip().lower()
        role = _SHAREGPT_ROLES.get(role, role)
    kept = {key: value for key, value in item.items() if key not in ("role", "from", "content", "value", "tool_calls")}
    calls = _tool_calls(item.get("tool_calls"), number)
    if isinstance(calls, Unfit):
        return calls
    content = item["content"] if item.get("content") is not None else item.get("value")
    if content is None and calls and role == "assistant":
        content = ""  # OpenAI's null: of 70 published templates nine fail on it, and none distinguishes it from an empty text
    content = _content(content, role, number)
    if isinstance(content, Unfit):
        return content
    return {"role": role, "content": content, **kept, **({"tool_calls": calls} if calls else {})}


def _content(value: Any, role: str, number: int) -> Any:
    """The content of a message: a text, joined from its parts; of a tool's message it may be an object."""
    if isinstance(value, str) or (isinstance(value, Mapping) and role == "tool"):
        return value
    if value is None:
        return Unfit(f"message {number} ({_short(role)}) has no content")
    if not isinstance(value, (list, tuple)):
        return Unfit(f"the content of message {number} is {_kind(value)}, not a text")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            named = f"a part of the type {_short(kind)}" if isinstance(kind, str) else "a part"
            todo = "Leave it out: a calibration text has no images or sound."
            return Unfit(f"message {number} has {named} that is not text", todo)
        texts.append(text)
    return "".join(texts)


def _tool_calls(value: Any, number: int) -> list[Message] | Unfit:
    value = _decoded(value)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(call, Mapping) for call in value):
        return Unfit(f"the tool calls of message {number} are not a list of objects")
    calls = []
    for call in value:
        function = call.get("function")
        inner = {"function": _with_arguments(function)} if isinstance(function, Mapping) else {}
        calls.append({**_with_arguments(call), **inner})
    return calls


def _with_arguments(function: Mapping[Any, Any]) -> Message:
    """The function with its arguments as an object: OpenAI stores them as a JSON string, and templates expect the object."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return dict(function)
    parsed = _decoded(arguments) if arguments.strip() else {}
    return {**function, "arguments": parsed if isinstance(parsed, Mapping) else arguments}


def _tools(value: Any) -> list[Message] | Unfit:
    """The available functions; a bare one is wrapped as ``{"type": "function", "function": …}``. Cohere's older form, with
    ``parameter_definitions``, is kept."""
    value = _decoded(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        return Unfit("`tools` is not a list of functions")
    return [{"type": "function", "function": dict(tool)} if _is_bare(tool) else dict(tool) for tool in value]


def _is_bare(tool: Mapping[Any, Any]) -> bool:
    return "name" in tool and "parameters" in tool and tool.get("type") is None and tool.get("function") is None


def _pair(record: Mapping[Any, Any], asked: str, answered: str) -> list[Message] | Unfit:
    """The messages of a question and its answer, if there is one; each may itself be a list of messages."""
    question = _side(record[asked], "user", f"`{asked}`")
    answer = _side(record[answered], "assistant", f"`{answered}`") if answered else []
    for side in (question, answer):
        if isinstance(side, Unfit):
            return side
    assert not isinstance(question, Unfit)
    assert not isinstance(answer, Unfit)
    about = next((record[name] for name in _INPUTS if isinstance(record.get(name), str) and record[name].strip()), "")
    if asked == "instruction" and about:
        question[-1]["content"] = f"{question[-1]['content']}\n\n{about}"
    # In preference data `chosen` often repeats the prompt.
    start = len(answer) > 1 and answer[0]["role"] == "system" != question[0]["role"]
    repeated = [_said(message) for message in answer[start : start + len(question)]] == [_said(message) for message in question]
    return answer if repeated else [*question, *answer]


def _side(value: Any, role: str, what: str) -> list[Message] | Unfit:
    if isinstance(value, (list, tuple)):
        return _messages(value, what)
    if not isinstance(value, str):
        return Unfit(f"{what} is {_kind(value)}, neither a text nor messages")
    return [{"role": role, "content": value}] if value.strip() else Unfit(f"{what} is empty")


def _said(message: Message) -> tuple[Any, Any]:
    return message["role"], message.get("content")


def _decoded(value: Any) -> Any:
    """The list or object that a string holds as JSON (as in columns of CSV and Parquet); any other value unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _too_deep(value: Any) -> bool:
    layer: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):  # one more: the value is a pair of messages and tools
        layer = [inner for outer in layer for inner in _inside(outer)]
        if not layer:
            return False
    return True


def _inside(value: Mapping[Any, Any] | Sequence[Any]) -> Iterator[Any]:
    items = value.values() if isinstance(value, Mapping) else value
    return (item for item in items if isinstance(item, (Mapping, list, tuple)))


def _fields(record: Mapping[Any, Any]) -> str:
    names = [_short(name) for name in record]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it has: {', '.join(names[:8])}{more}" if names else "it is empty"


def _short(text: object) -> str:
    return printable(str(text)[:40])


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    kinds = ((str, "a text"), (bool, "true or false"), ((int, float), "a number"), ((list, tuple), "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null" if value is None else "not a JSON value")
