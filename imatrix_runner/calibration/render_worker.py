"""The child that renders conversations: ``python -m imatrix_runner.calibration.render_worker REQUEST.json``.

A chat template comes from whoever published the model, and it is a program. It gets Jinja's sandbox, a process of its own, a
time for each conversation and bounds on memory and output; nothing it does to that process reaches ours. What it is given, and
the functions it may call, are those of transformers' ``apply_chat_template`` (5.23), so that it writes what the model was
trained on.

stdout carries JSON lines: ``{"event": "ready"}`` once the libraries are loaded, ``{"event": "compiled"}`` once the template
is, ``{"event": "done", "count": n}`` at most five times a second, and ``{"event": "stopped", "kind": …, "why": …}`` when
nothing more can be done (``syntax``, ``disk``, ``flood``). The results go to a file, one line for each conversation:
``{"text": …}`` or ``{"error": …}``. A conversation that takes too long ends the process with code 1 and what Python's
faulthandler writes to stderr, :data:`TIMED_OUT` first: its clock is a thread in C, which also fires while one endless operation
holds the interpreter.

Only the standard library and Jinja are loaded: this process is started anew after every conversation that ended it.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

TIMED_OUT = "Timeout ("
"""How the first line on stderr begins when a conversation took too long."""

_REPORT_SECONDS = 0.2
_LONGEST_WHY = 300
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Request:
    """``conversations``: a JSONL file of ``{"messages": […], "tools": […]}``, of which the first ``skip`` are left out;
    ``out``: the file for the results. ``seconds`` and ``characters`` bound one conversation, ``memory`` (bytes) what the
    process may take beyond what it starts with, ``total`` (bytes) the file of results. ``date`` (YYYY-MM-DD) is what
    ``strftime_now`` tells. ``generation_prompt``: the text ends where the model's answer begins.
    """

    template: str
    with_tools: str
    special: Mapping[str, str]
    date: str
    conversations: str
    skip: int
    out: str
    seconds: float
    characters: int
    memory: int
    total: int
    generation_prompt: bool = False


class _TooLong(Exception):
    """One conversation's text has more characters than are allowed."""


def main(path: str) -> int:
    """Do what the file at ``path`` asks for; 0 when every conversation has its line."""
    import jinja2

    request = Request(**json.loads(Path(path).read_bytes()))
    os.environ.clear()  # should a template ever get out; secrets were not in it from the start
    _bound_memory(request.memory)
    _tell("ready")
    _start_clock(request)
    try:
        environment = _environment(datetime.fromisoformat(request.date))
        plain = environment.from_string(request.template)
        with_tools = environment.from_string(request.with_tools) if request.with_tools else plain
    except jinja2.TemplateSyntaxError as error:
        return _stopped("syntax", f"line {error.lineno}: {_cut(error.message or '')}")
    except Exception as error:  # noqa: BLE001 - compiling runs the constant parts of a stranger's program
        return _stopped("syntax", _why(error))
    _tell("compiled")
    try:
        with Path(request.out).open("w", encoding="ascii", newline="\n") as out:
            return _render_all(request, plain, with_tools, out)
    except OSError as error:
        return _stopped("disk", str(error), errno=error.errno)


def _render_all(request: Request, plain: jinja2.Template, with_tools: jinja2.Template, out: io.TextIOWrapper) -> int:
    reported, count = time.monotonic(), 0
    with Path(request.conversations).open(encoding="ascii") as lines:
        for number, line in enumerate(lines):
            if number < request.skip:
                continue
            conversation = json.loads(line)
            template = with_tools if conversation["tools"] else plain
            _start_clock(request)
            try:
                answer = {"text": _render(template, conversation, request)}
            except Exception as error:  # noqa: BLE001 - a stranger's program may raise anything
                answer = {"error": _why(error)}
            faulthandler.cancel_dump_traceback_later()
            out.write(json.dumps(answer) + "\n")
            out.flush()
            count += 1
            if out.tell() > request.total:
                return _stopped("flood", f"more than {request.total} bytes")
            if time.monotonic() - reported >= _REPORT_SECONDS:
                reported = time.monotonic()
                _tell("done", count=count)
    _tell("done", count=count)
    return 0


def _render(template: jinja2.Template, conversation: Mapping[str, Any], request: Request) -> str:
    messages = [_as_given(message) for message in conversation["messages"]]
    try:
        return _text(template, messages, conversation["tools"], request)
    except TypeError:
        # A few templates (DeepSeek V3, Functionary) write a call's arguments without making JSON of them: they want its text.
        with_texts = [_with_text_arguments(message) for message in messages]
        if with_texts == messages:
            raise
        return _text(template, with_texts, conversation["tools"], request)


def _text(template: jinja2.Template, messages: list[dict[str, Any]], tools: list[Any], request: Request) -> str:
    import random

    random.seed(0)  # there is a filter `random`, and the same inputs must give the same bytes
    text, size = io.StringIO(), 0
    for piece in template.generate(
        messages=messages,
        tools=tools or None,
        documents=None,
        add_generation_prompt=request.generation_prompt,
        **request.special,
    ):
        size += len(piece)
        if size > request.characters:
            raise _TooLong
        text.write(piece)
    return text.getvalue()


def _as_given(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it to a template: without nulls, and its reasoning under the names templates use."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    def changed(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [changed(call) for call in calls]} if calls else message


def _environment(day: datetime) -> jinja2.Environment:
    """Jinja as transformers sets it up, but for the clock, which stands still: the same inputs must give the same bytes."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks what the model wrote; here it only stands for its content (in a scope of its own)."""

        tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> Any:
            return caller()

    class Dict:
        """``dict`` without the attributes of a type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class Namespace(jinja2.utils.Namespace):
        """``namespace`` without names that mean something to Python."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the keywords
            own, values = args[0], dict(*args[1:], **kwargs)
            for name in values:
                _refuse_private(name)
            jinja2.utils.Namespace.__init__(own, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            super().__setitem__(name, value)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:  # noqa: A002 - templates may name it
        return day.strftime(format)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Namespace)
    return environment


def _refuse_private(name: Any) -> None:
    from jinja2.exceptions import SecurityError

    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name[:40]!r}")


def _start_clock(request: Request) -> None:
    """From now on one conversation's time runs (or the compiler's); an earlier clock is stopped."""
    faulthandler.dump_traceback_later(request.seconds, exit=True)


def _bound_memory(more: int) -> None:
    """Linux: no more than ``more`` bytes beyond what is mapped now. Elsewhere nothing enforces such a bound."""
    if sys.platform != "linux":
        return
    import resource

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = used + more if hard == resource.RLIM_INFINITY else min(used + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _why(error: Exception) -> str:
    """One phrase for people."""
    from jinja2.exceptions import SecurityError, TemplateError

    if isinstance(error, _TooLong):
        return "the template makes too long a text of it"
    if isinstance(error, MemoryError):
        return "the template needs too much memory for it"
    if isinstance(error, RecursionError):
        return "the template is nested too deeply, or calls itself without end"
    said = _cut(str(error)) or type(error).__name__
    if type(error) is TemplateError:  # what `raise_exception` raises
        return f"the template refuses it: {said}"
    if isinstance(error, SecurityError):
        return f"the template does what its sandbox forbids: {said}"
    line = max(_lines(error), default=0)
    return f"the template fails{f' in line {line}' if line else ''}: {said}"


def _lines(error: Exception) -> Iterator[int]:
    """The lines of the template that an error came through."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            yield step.tb_lineno
        step = step.tb_next


def _cut(text: str) -> str:
    """On one line, and no longer than an error should be."""
    line = " ".join(text[: 4 * _LONGEST_WHY].split())
    return line if len(line) <= _LONGEST_WHY else f"{line[:_LONGEST_WHY]}…"


def _stopped(kind: str, why: str, errno: int | None = None) -> int:
    faulthandler.cancel_dump_traceback_later()
    _tell("stopped", kind=kind, why=why, errno=errno)
    return 1


def _tell(event: str, **facts: Any) -> None:
    """To a parent that is gone this fails, and so ends a process that nobody waits for."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
