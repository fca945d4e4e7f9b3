"""Renders conversations with the model's chat template, in a sandboxed child process."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from imatrix_runner.chat import render_worker
from imatrix_runner.chat.templates import ChatTemplate
from imatrix_runner.documents.conversations import text_flaw
from imatrix_runner.documents.documents import Conversation
from imatrix_runner.environment import ChildNeeds
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, UsageError, from_os_error
from imatrix_runner.process import Command, Outcome, Runner, relevant_lines
from imatrix_runner.safe_text import printable
from imatrix_runner.scratch import scratch_folder

DATE = "2026-01-01"
"""The date that templates see. Some write today's date into each conversation, and the same inputs must give the same bytes."""

_ROOT = Path(__file__).resolve().parents[2]
_TODO = "Change this record to what the template accepts, or give another template with --chat-template-file FILE."
_LONGEST_WHY = 340
_FREE_BYTES = 64 << 20
_BYTES_PER_BYTE = 4


@dataclass(frozen=True)
class Limits:
    """``seconds`` and ``characters`` bound one conversation, ``memory`` (bytes, Linux only) the growth of the child. After
    ``failures`` conversations that ended the child, rendering fails."""

    seconds: float = 10.0
    characters: int = 16 << 20
    memory: int = 2 << 30
    failures: int = 3


@dataclass(frozen=True)
class Unrendered:
    """A conversation that could not be rendered. ``why`` is a phrase, ``todo`` a sentence."""

    why: str
    todo: str = _TODO


def render(
    template: ChatTemplate,
    conversations: Sequence[Conversation],
    runner: Runner,
    *,
    date: str = DATE,
    generation_prompt: bool = False,
    on_progress: Callable[[int], None] | None = None,
    limits: Limits | None = None,
    variables: Sequence[Mapping[str, Any]] = (),
    in_llama_cpp: bool = False,
) -> list[str | Unrendered]:
    """The text of each conversation, or why it has none, in order; ``on_progress`` is called with the number done.

    The texts equal those of transformers' ``apply_chat_template(…, tokenize=False)`` on the day ``date`` (YYYY-MM-DD), with
    ``generation_prompt`` as its ``add_generation_prompt``. All are held in memory; the child's results are bounded by 64 MiB
    plus four times the size of the conversations. ``variables``: for each conversation,
    further ones that templates may ask for (``enable_thinking``); none if empty. ``in_llama_cpp``: the texts are those of
    llama.cpp's own engine, which the extra ``publish`` has.

    Raises :class:`UsageError` for an invalid date; :class:`InvalidDataError` for a template that does not compile, exceeds the
    bound on output, or times out or ends its process for ``limits.failures`` conversations; ``InterruptedRunError`` once a stop
    is requested.
    """
    _check_date(date)
    limits = limits or Limits()
    results: list[str | Unrendered] = []
    if not conversations:
        return results
    failures = 0
    with scratch_folder() as folder:
        given = folder / "conversations.jsonl"
        total = _FREE_BYTES + _BYTES_PER_BYTE * _write(conversations, variables, given)
        while len(results) < len(conversations):
            out = folder / f"results-{len(results)}.jsonl"
            request = render_worker.Request(
                template=template.source,
                with_tools=template.with_tools,
                special=template.special,
                date=date,
                conversations=str(given),
                skip=len(results),
                out=str(out),
                seconds=limits.seconds,
                characters=limits.characters,
                memory=limits.memory,
                total=total,
                generation_prompt=generation_prompt,
                engine="llama.cpp" if in_llama_cpp else "jinja",
            )
            replies = _Replies(len(results), on_progress)
            outcome = _run(request, folder / "request.json", runner, replies)
            if replies.stopped is not None:
                raise _stopped(replies.stopped, template, folder)
            if not replies.compiled:
                raise _never_began(outcome, replies, template, limits)
            results += _read(out)
            if len(results) < len(conversations):  # the next one ended the child
                failures += 1
                why = _death(outcome, limits)
                if failures >= limits.failures:
                    raise _given_up(template, failures, why)
                results.append(Unrendered(why))
    return results


T = TypeVar("T")


class _Event(msgspec.Struct, frozen=True):
    """A line from the child: ``count`` conversations are ``done``, or the reason why it ``stopped``."""

    event: Literal["ready", "compiled", "done", "stopped"]
    count: Annotated[int, msgspec.Meta(ge=0)] = 0
    kind: str = ""
    why: str = ""
    errno: int | None = None


class _Rendered(msgspec.Struct, frozen=True):
    """The text of one conversation, or the error."""

    text: str = ""
    error: str | None = None


def _decoded(line: str, kind: type[T]) -> T:
    """A line of the child, decoded with :mod:`json`, because a text may contain half a surrogate pair.

    Raises :class:`EngineError` for an unexpected line.
    """
    try:
        return msgspec.convert(json.loads(line), kind)
    except (ValueError, RecursionError) as error:
        raise EngineError(
            "The output of the process that renders conversations could not be read",
            f"unexpected line: {line[:200]!r}",
            "Run the same command again; if that fails as well, give another template with --chat-template-file FILE.",
        ) from error


class _Replies:
    """Reads the child's events from stdout; ``before`` conversations were done by earlier children."""

    def __init__(self, before: int, on_progress: Callable[[int], None] | None) -> None:
        self._before, self._on_progress = before, on_progress
        self._rest = ""
        self.ready = False
        self.compiled = False
        self.stopped: _Event | None = None

    def feed(self, stream: str, text: str) -> None:
        if stream != "stdout":
            return
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._handle(_decoded(line, _Event))

    def _handle(self, reply: _Event) -> None:
        self.ready = True
        self.compiled = self.compiled or reply.event in ("compiled", "done")
        if reply.event == "done" and self._on_progress is not None:
            self._on_progress(self._before + reply.count)
        elif reply.event == "stopped":
            self.stopped = reply


def _run(request: render_worker.Request, path: Path, runner: Runner, replies: _Replies) -> Outcome:
    with _disk(path):
        path.write_text(json.dumps(asdict(request)), encoding="ascii")
    # Runs in the folder of this package: -m looks for modules in the current directory first, which may hold untrusted files.
    command = Command((sys.executable, "-m", render_worker.__name__, str(path)), cwd=_ROOT, needs=ChildNeeds.NOTHING)
    return runner.run(command, on_text=replies.feed)


def _write(conversations: Sequence[Conversation], variables: Sequence[Mapping[str, Any]], path: Path) -> int:
    """Write one line per conversation; return the number of bytes."""
    with _disk(path), path.open("w", encoding="ascii", newline="\n") as handle:
        for number, each in enumerate(conversations):
            value: dict[str, Any] = {"messages": list(each.messages), "tools": list(each.tools)}
            if variables:
                value["variables"] = dict(variables[number])
            handle.write(json.dumps(value, default=_inert, skipkeys=True) + "\n")
        return handle.tell()


def _inert(value: Any) -> Any:
    """A placeholder, as in transformers, for a value that JSON cannot express, such as a date from a Parquet column."""
    return dict(value) if isinstance(value, Mapping) else f"<{type(value).__name__}>"


def _read(path: Path) -> list[str | Unrendered]:
    """The complete lines of the child's results; the last line may be torn."""
    results: list[str | Unrendered] = []
    if not path.exists():
        return results
    with _disk(path), path.open(encoding="ascii") as lines:
        for line in lines:
            if line.endswith("\n"):
                results.append(_result(_decoded(line, _Rendered)))
    return results


def _result(rendered: _Rendered) -> str | Unrendered:
    if rendered.error is not None:
        return Unrendered(printable(rendered.error)[:_LONGEST_WHY])
    flaw = text_flaw(rendered.text)
    return Unrendered(f"the template's output for it {flaw}") if flaw else rendered.text


def _death(outcome: Outcome, limits: Limits) -> str:
    """Why the child ended in the middle of a conversation."""
    if outcome.hung or any(line.startswith(render_worker.TIMED_OUT) for line in outcome.tail):
        return f"the template took longer than {limits.seconds:g} s"
    last = f" ({outcome.tail[-1][:200]})" if outcome.tail and outcome.returncode > 0 else ""
    return f"the template ended the process that ran it: {outcome.ending()}{last}"


# -- errors --------------------------------------------------------------------------------------------------------------------


def _check_date(date: str) -> None:
    try:
        datetime.date.fromisoformat(date)
    except ValueError as error:
        raise UsageError(
            f"{printable(date)[:40]!r} is not a date",
            "the calendar has no such day",
            "Give it as year, month and day: 2026-01-31.",
        ) from error


def _never_began(outcome: Outcome, replies: _Replies, template: ChatTemplate, limits: Limits) -> RunnerError:
    if replies.ready:
        return _broken(template, _death(outcome, limits))
    return EngineError(
        "The process that renders conversations did not start",
        "; ".join((outcome.ending(), *relevant_lines(outcome.tail, 3))),
        "Check the installation with: imatrix-runner doctor",
    )


def _stopped(reply: _Event, template: ChatTemplate, folder: Path) -> RunnerError:
    kind, why = reply.kind, printable(reply.why)[:_LONGEST_WHY]
    if kind == "disk":
        return from_os_error(OSError(reply.errno or 0, why), "rendering conversations", folder)
    if kind == "flood":
        return InvalidDataError(
            f"The chat template {printable(template.origin)} writes too much",
            f"its output for these conversations has {why}",
            "Give another template with --chat-template-file FILE.",
        )
    return _broken(template, why)


def _broken(template: ChatTemplate, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"The chat template {printable(template.origin)} cannot be compiled",
        why,
        "Correct it, or give another one with --chat-template-file FILE.",
    )


def _given_up(template: ChatTemplate, failures: int, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"The chat template {printable(template.origin)} cannot be used",
        f"{failures} conversations failed; for the last one, {why}",
        "Give another template with --chat-template-file FILE, or take one field as plain text with --field NAME.",
    )


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, "rendering conversations", path) from error
