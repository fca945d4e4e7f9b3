"""The render child, which renders conversations: ``python -m imatrix_runner.chat.render_worker REQUEST.json``.

A chat template is an untrusted program. It runs in Jinja's sandbox and a separate process, with bounds on time per
conversation, memory and output. Its inputs and the functions it may call are those of transformers' ``apply_chat_template``
(5.23), so that its output is what the model was trained on.

stdout carries JSON lines: ``{"event": "ready"}`` once the libraries are loaded, ``{"event": "compiled"}`` once the template is
compiled, ``{"event": "done", "count": n}`` at most five times a second, and ``{"event": "stopped", "kind": …, "why": …}`` if
rendering cannot continue (``syntax``, ``disk``, ``flood``). The results go to a file, one line per conversation:
``{"text": …}`` or ``{"error": …}``. A conversation that takes too long ends the process with code 1, and Python's faulthandler
writes to stderr, :data:`TIMED_OUT` first. Its timer is a C thread, so it also fires while one endless operation holds the
interpreter.

Only the standard library and Jinja are imported, because the process is restarted after every conversation that ended it.

With the engine ``llama.cpp`` the text is that of llama.cpp's own template engine instead, which ggufdoctor has compiled to
WebAssembly: another sandbox, with bounds of its own on steps and memory.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

TIMED_OUT = "Timeout ("
"""Beginning of the first line on stderr if a conversation took too long."""

_REPORT_SECONDS = 0.2
_LONGEST_WHY = 300
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Request:
    """``conversations``: a JSONL file of ``{"messages": […], "tools": […]}``, of which the first ``skip`` are skipped; ``out``:
    the file for the results. ``seconds`` and ``characters`` bound one conversation, ``memory`` (bytes) the growth of the
    process, ``total`` (bytes) the file of results. ``date`` (YYYY-MM-DD) is what ``strftime_now`` returns.
    ``generation_prompt``: the text ends where the model's answer begins. ``engine``: ``jinja``, as transformers has it, or
    ``llama.cpp``. A conversation may have ``variables``, further ones that templates ask for.
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
    engine: str = "jinja"


class _Refused(Exception):
    """llama.cpp's engine does not render the conversation; the message is a phrase."""


class _TooLong(Exception):
    """The text of a conversation has more characters than allowed."""


def main(path: str) -> int:
    """Run the request in the file ``path``; return 0 if every conversation has its line."""
    import jinja2

    request = Request(**json.loads(Path(path).read_bytes()))
    os.environ.clear()  # in case a template escapes the sandbox; the parent passes no secrets in the first place
    _report("ready")
    _start_clock(request)
    try:
        text = _in_llama_cpp(request) if request.engine == "llama.cpp" else _in_jinja(request)
    except jinja2.TemplateSyntaxError as error:
        return _stopped("syntax", f"line {error.lineno}: {_cut(error.message or '')}")
    except Exception as error:  # noqa: BLE001 - compiling evaluates constant parts of an untrusted program
        return _stopped("syntax", _why(error))
    _report("compiled")
    try:
        with Path(request.out).open("w", encoding="ascii", newline="\n") as out:
            return _render_all(request, text, out)
    except OSError as error:
        return _stopped("disk", str(error), errno=error.errno)


def _in_jinja(request: Request) -> Callable[[Mapping[str, Any]], str]:
    """Renders a conversation as transformers does."""
    _bound_memory(request.memory)
    environment = _environment(datetime.fromisoformat(request.date))
    plain = environment.from_string(request.template)
    with_tools = environment.from_string(request.with_tools) if request.with_tools else plain
    return lambda conversation: _render(with_tools if conversation["tools"] else plain, conversation, request)


def _in_llama_cpp(request: Request) -> Callable[[Mapping[str, Any]], str]:
    """Renders a conversation as llama.cpp's programs do. Its sandbox reserves gigabytes of addresses that it does not use, so
    their number is not bounded here."""
    from ggufdoctor.engines.llamacpp_engine import LlamaCppEngine

    engine = LlamaCppEngine()

    def text(conversation: Mapping[str, Any]) -> str:
        messages = [_as_given(message) for message in conversation["messages"]]
        tools = {"tools": conversation["tools"]} if conversation["tools"] else {}
        template = request.with_tools if request.with_tools and tools else request.template
        given = {"messages": messages, "add_generation_prompt": request.generation_prompt, **tools}
        done = engine.render(
            template, {"bos_token": "", "eos_token": "", **request.special, **given, **_variables(conversation)}
        )
        if done.text is None:
            trapped = "wasm: Trap" in done.error
            raise _Refused("it takes too many steps or too much memory" if trapped else done.error.removeprefix("render:"))
        if len(done.text) > request.characters:
            raise _TooLong
        return str(done.text)

    return text


def _render_all(request: Request, text: Callable[[Mapping[str, Any]], str], out: io.TextIOWrapper) -> int:
    reported, count = time.monotonic(), 0
    with Path(request.conversations).open(encoding="ascii") as lines:
        for number, line in enumerate(lines):
            if number < request.skip:
                continue
            conversation = json.loads(line)
            _start_clock(request)
            try:
                answer = {"text": text(conversation)}
            except Exception as error:  # noqa: BLE001 - an untrusted program may raise anything
                answer = {"error": _why(error)}
            faulthandler.cancel_dump_traceback_later()
            out.write(json.dumps(answer) + "\n")
            out.flush()
            count += 1
            if out.tell() > request.total:
                return _stopped("flood", f"more than {request.total} bytes")
            if time.monotonic() - reported >= _REPORT_SECONDS:
                reported = time.monotonic()
                _report("done", count=count)
    _report("done", count=count)
    return 0


def _render(template: jinja2.Template, conversation: Mapping[str, Any], request: Request) -> str:
    messages = [_as_given(message) for message in conversation["messages"]]
    variables = {"add_generation_prompt": request.generation_prompt, **request.special, **_variables(conversation)}
    try:
        return _text(template, messages, conversation["tools"], variables, request)
    except TypeError:
        # A few templates (DeepSeek V3, Functionary) write a call's arguments without encoding them: they expect JSON text.
        with_texts = [_with_text_arguments(message) for message in messages]
        if with_texts == messages:
            raise
        return _text(template, with_texts, conversation["tools"], variables, request)


def _variables(conversation: Mapping[str, Any]) -> Mapping[str, Any]:
    return conversation.get("variables") or {}


def _text(
    template: jinja2.Template, messages: list[dict[str, Any]], tools: list[Any], variables: Mapping[str, Any], request: Request
) -> str:
    import random

    random.seed(0)  # there is a filter `random`, and the same inputs must give the same bytes
    text, size = io.StringIO(), 0
    for block in template.generate(messages=messages, tools=tools or None, documents=None, **variables):
        size += len(block)
        if size > request.characters:
            raise _TooLong
        text.write(block)
    return text.getvalue()


def _as_given(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers passes it to a template: without nulls, and with its reasoning under the names templates
    use."""
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
    """Jinja set up as in transformers, except that the clock is fixed: the same inputs must give the same bytes."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """``{% generation %}``, which marks the model's output; here it renders its content, in its own scope."""

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
        """``namespace`` that refuses names which begin with an underscore."""

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
    """Start the timer for one conversation (or for compiling); it replaces an earlier timer."""
    faulthandler.dump_traceback_later(request.seconds, exit=True)


def _bound_memory(more: int) -> None:
    """On Linux, limit the address space to ``more`` bytes beyond what is mapped now. Elsewhere nothing enforces such a
    bound."""
    if sys.platform != "linux":
        return
    import resource

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = used + more if hard == resource.RLIM_INFINITY else min(used + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _why(error: Exception) -> str:
    """The error as a phrase for people."""
    from jinja2.exceptions import SecurityError, TemplateError

    if isinstance(error, _TooLong):
        return "the template's output for it is too long"
    if isinstance(error, MemoryError):
        return "the template needs too much memory for it"
    if isinstance(error, RecursionError):
        return "the template is nested too deeply, or calls itself without end"
    said = _cut(str(error)) or type(error).__name__
    if isinstance(error, _Refused):
        return f"llama.cpp's template engine does not render it: {said}"
    if type(error) is TemplateError:  # what `raise_exception` raises
        return f"the template refuses it: {said}"
    if isinstance(error, SecurityError):
        return f"the template violates its sandbox: {said}"
    line = max(_lines(error), default=0)
    return f"the template fails{f' in line {line}' if line else ''}: {said}"


def _lines(error: Exception) -> Iterator[int]:
    """Line numbers of the template in an error's traceback."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            yield step.tb_lineno
        step = step.tb_next


def _cut(text: str) -> str:
    """The text on one line, cut to the longest length of an error."""
    line = " ".join(text[: 4 * _LONGEST_WHY].split())
    return line if len(line) <= _LONGEST_WHY else f"{line[:_LONGEST_WHY]}…"


def _stopped(kind: str, why: str, errno: int | None = None) -> int:
    faulthandler.cancel_dump_traceback_later()
    _report("stopped", kind=kind, why=why, errno=errno)
    return 1


def _report(event: str, **facts: Any) -> None:
    """Write an event to stdout. Without a parent this fails, which ends the process."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
