"""Conversations as the model sees them: rendered with its own template, in a child process that nothing gets out of."""

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

from imatrix_runner.calibration import render_worker
from imatrix_runner.calibration.conversations import text_flaw
from imatrix_runner.calibration.documents import Conversation
from imatrix_runner.calibration.templates import ChatTemplate
from imatrix_runner.environment import Needs
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, UsageError, from_os_error
from imatrix_runner.models.bounded import printable
from imatrix_runner.process import Command, Outcome, Runner, relevant_lines
from imatrix_runner.scratch import scratch_folder

DATE = "2026-01-01"
"""What the clock of every template shows: some write today's date into each conversation, and the same inputs must give the
same bytes."""

_ROOT = Path(__file__).resolve().parents[2]
_TODO = "Change this record to what the template takes, or give another template with --chat-template-file FILE."
_LONGEST_WHY = 340
_FREE_BYTES = 64 << 20
_BYTES_PER_BYTE = 4


@dataclass(frozen=True)
class Limits:
    """``seconds`` and ``characters`` for one conversation, ``memory`` in bytes for the child beyond what it starts with (Linux
    only), and how many conversations may end the child before the template is given up."""

    seconds: float = 10.0
    characters: int = 16 << 20
    memory: int = 2 << 30
    failures: int = 3


@dataclass(frozen=True)
class Unrendered:
    """A conversation that the template makes no text of. ``why`` is a phrase, ``todo`` a sentence."""

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
) -> list[str | Unrendered]:
    """Each conversation's text (or why there is none), in order; ``on_progress`` hears how many are done.

    The texts are what transformers' ``apply_chat_template(…, tokenize=False)`` gives on the day ``date`` (YYYY-MM-DD), with
    ``generation_prompt`` as its ``add_generation_prompt``. All are held: at most 64 MiB and four times the size of the
    conversations.

    Raises :class:`UsageError` for what is no date; :class:`InvalidDataError` for a template that does not compile, writes
    without measure, or takes too long or ends its process for ``limits.failures`` conversations; ``InterruptedRunError`` once a
    stop is requested.
    """
    _check_date(date)
    limits = limits or Limits()
    results: list[str | Unrendered] = []
    if not conversations:
        return results
    failures = 0
    with scratch_folder() as folder:
        given = folder / "conversations.jsonl"
        total = _FREE_BYTES + _BYTES_PER_BYTE * _write(conversations, given)
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
            )
            answers = _Answers(len(results), on_progress)
            outcome = _run(request, folder / "request.json", runner, answers)
            if answers.stopped is not None:
                raise _stopped(answers.stopped, template, folder)
            if not answers.compiled:
                raise _never_began(outcome, answers, template, limits)
            results += _read(out)
            if len(results) < len(conversations):  # it died over the next one
                failures += 1
                why = _death(outcome, limits)
                if failures >= limits.failures:
                    raise _given_up(template, failures, why)
                results.append(Unrendered(why))
    return results


T = TypeVar("T")


class _Event(msgspec.Struct, frozen=True):
    """A line of the child: ``count`` conversations are ``done``, or why it ``stopped``."""

    event: Literal["ready", "compiled", "done", "stopped"]
    count: Annotated[int, msgspec.Meta(ge=0)] = 0
    kind: str = ""
    why: str = ""
    errno: int | None = None


class _Rendered(msgspec.Struct, frozen=True):
    """One conversation's text, or why there is none."""

    text: str = ""
    error: str | None = None


def _decoded(line: str, kind: type[T]) -> T:
    """Raises :class:`EngineError` for what the child would not write. Half a surrogate pair may be in a template's text."""
    try:
        return msgspec.convert(json.loads(line), kind)
    except (ValueError, RecursionError) as error:
        raise EngineError(
            "The answer of the process that renders conversations could not be read",
            f"it is not what that process writes: {line[:200]!r}",
            "Run the same command again; if it stays so, give another template with --chat-template-file FILE.",
        ) from error


class _Answers:
    """Follows what the child tells on stdout; ``before`` conversations were done by earlier ones."""

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
            self._hear(_decoded(line, _Event))

    def _hear(self, answer: _Event) -> None:
        self.ready = True
        self.compiled = self.compiled or answer.event in ("compiled", "done")
        if answer.event == "done" and self._on_progress is not None:
            self._on_progress(self._before + answer.count)
        elif answer.event == "stopped":
            self.stopped = answer


def _run(request: render_worker.Request, path: Path, runner: Runner, answers: _Answers) -> Outcome:
    with _disk(path):
        path.write_text(json.dumps(asdict(request)), encoding="ascii")
    # Where our own package lies: -m looks for modules in the current directory first, and that may hold a stranger's files.
    command = Command((sys.executable, "-m", render_worker.__name__, str(path)), cwd=_ROOT, needs=Needs.NOTHING)
    return runner.run(command, on_text=answers.feed)


def _write(conversations: Sequence[Conversation], path: Path) -> int:
    """One line for each; returns the bytes written."""
    with _disk(path), path.open("w", encoding="ascii", newline="\n") as handle:
        for each in conversations:
            value = {"messages": list(each.messages), "tools": list(each.tools)}
            handle.write(json.dumps(value, default=_inert, skipkeys=True) + "\n")
        return handle.tell()


def _inert(value: Any) -> Any:
    """For what is no JSON (a date in a Parquet column): the placeholder that transformers shows to templates."""
    return dict(value) if isinstance(value, Mapping) else f"<{type(value).__name__}>"


def _read(path: Path) -> list[str | Unrendered]:
    """The whole lines of the child's results; a last one may be torn."""
    results: list[str | Unrendered] = []
    if not path.exists():
        return results
    with _disk(path), path.open(encoding="ascii") as lines:
        for line in lines:
            if line.endswith("\n"):
                results.append(_result(_decoded(line, _Rendered)))
    return results


def _result(answer: _Rendered) -> str | Unrendered:
    if answer.error is not None:
        return Unrendered(printable(answer.error)[:_LONGEST_WHY])
    flaw = text_flaw(answer.text)
    return Unrendered(f"what the template makes of it {flaw}") if flaw else answer.text


def _death(outcome: Outcome, limits: Limits) -> str:
    """Why a child ended in the middle of a conversation."""
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
            "it is not a day of the calendar",
            "Give it as year, month and day: 2026-01-31.",
        ) from error


def _never_began(outcome: Outcome, answers: _Answers, template: ChatTemplate, limits: Limits) -> RunnerError:
    if answers.ready:
        return _broken(template, _death(outcome, limits))
    return EngineError(
        "The process that renders conversations did not start",
        "; ".join((outcome.ending(), *relevant_lines(outcome.tail, 3))),
        "Check the installation with: imatrix-runner doctor",
    )


def _stopped(answer: _Event, template: ChatTemplate, folder: Path) -> RunnerError:
    kind, why = answer.kind, printable(answer.why)[:_LONGEST_WHY]
    if kind == "disk":
        return from_os_error(OSError(answer.errno or 0, why), "rendering conversations", folder)
    if kind == "flood":
        return InvalidDataError(
            f"The chat template {printable(template.origin)} writes without measure",
            f"it made {why} of these conversations",
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
        f"{failures} conversations were given up; of the last, {why}",
        "Give another template with --chat-template-file FILE, or take one field as plain text with --field NAME.",
    )


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, "rendering conversations", path) from error
