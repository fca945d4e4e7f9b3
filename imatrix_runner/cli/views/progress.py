"""Shows a job's events: progress bars on a terminal, plain lines in a pipe, or nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imatrix_runner.events import Event, Finished, Metric, Notice, Progress, Saved, Sink, Started, ignore
from imatrix_runner.files import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_PLAIN_SECONDS = 10.0


@dataclass(frozen=True)
class Listener:
    """A sink for events, and a console on the same stream for other output (a plan)."""

    sink: Sink
    console: Console


@contextmanager
def listening(*, quiet: bool, verbose: bool) -> Iterator[Listener]:
    """Yield the listener that suits stderr. First removes the temporary folders of killed commands."""
    from imatrix_runner.cli.views.console import stderr_console
    from imatrix_runner.scratch import remove_abandoned

    remove_abandoned()
    console = stderr_console(quiet=quiet)
    if quiet:
        yield Listener(ignore, console)
    elif console.is_terminal:
        with _Live(console, verbose=verbose) as live:
            yield Listener(live, console)
    else:
        yield Listener(_Plain(verbose=verbose), console)


def human_count(value: float, unit: str) -> str:
    """``12`` chunks, ``1.50 GiB``, ``2.9 M`` weights."""
    if unit == "B":
        return human_bytes(value)
    if unit == "weights":
        return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"
    return f"{value:.0f}"


class _Step:
    """A running step, with what is needed for its rate and ETA."""

    def __init__(self, started: Started) -> None:
        self.title, self.unit, self.total = started.title, started.unit, started.total
        self.began = time.monotonic()
        self.first: float | None = None
        self.shown = self.began

    def rate(self, done: float) -> float | None:
        if self.first is None:
            self.first = done
        seconds = time.monotonic() - self.began
        return (done - self.first) / seconds if seconds > 1 and done > self.first else None

    def figures(self, progress: Progress) -> str:
        total = progress.total or self.total
        parts = [f"{human_count(progress.done, self.unit)}" + (f"/{human_count(total, self.unit)}" if total else "")]
        rate = self.rate(progress.done)
        if rate is not None and self.unit == "chunks":
            parts.append(f"{rate:.2f} chunks/s")
        if rate is not None and self.unit == "B":
            parts.append(f"{human_bytes(rate)}/s")
        if rate and total:
            parts.append(f"ETA {human_seconds((total - progress.done) / rate)}")
        return ", ".join([*parts, *([progress.note] if progress.note else [])])


class _Plain:
    """Lines for logs: the start of a step, its progress every ten seconds, its end."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._steps: dict[str, _Step] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __call__(self, event: Event) -> None:
        with self._lock:
            line = self._line(event)
            if line and not self._closed:
                try:
                    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the one place that prints
                except BrokenPipeError:
                    self._closed = True  # the reader has gone (``| head``): work continues without output

    def _line(self, event: Event) -> str:
        if isinstance(event, Started):
            self._steps[event.step] = _Step(event)
            return f"{event.title} ..."
        if isinstance(event, Progress) and (step := self._steps.get(event.step)):
            figures = step.figures(event)
            if time.monotonic() - step.shown < _PLAIN_SECONDS:
                return ""
            step.shown = time.monotonic()
            return f"{step.title}: {figures}"
        return _line_of(event, self._steps, verbose=self._verbose)


def _line_of(event: Event, steps: dict[str, _Step], *, verbose: bool) -> str:
    """The line for an event that is the same on a terminal and in a pipe; empty if it has none."""
    if isinstance(event, Finished):
        step = steps.pop(event.step, None)
        title = step.title if step else event.step
        took = f" in {human_seconds(event.seconds)}" if event.seconds else ""
        return f"{title}: {event.status}{took}" + (f" ({event.detail})" if event.detail else "")
    if isinstance(event, Notice):
        if event.level == "detail" and not verbose:
            return ""
        return f"Warning: {event.text}" if event.level == "warning" else event.text
    if isinstance(event, Saved) and verbose:
        return f"Saved {event.path} ({event.what}, {human_bytes(event.bytes)})"
    if isinstance(event, Metric) and verbose:
        return ""
    return ""


class _Live:
    """Progress bars; a finished step becomes a line above them."""

    def __init__(self, console: Console, *, verbose: bool) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._verbose = verbose
        self._bars: Bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._steps: dict[str, _Step] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Sink:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Started):
                self._steps[event.step] = _Step(event)
                self._tasks[event.step] = self._bars.add_task(event.title, total=event.total, figures="")
            elif isinstance(event, Progress) and (step := self._steps.get(event.step)):
                total = event.total or step.total
                self._bars.update(self._tasks[event.step], completed=event.done, total=total, figures=step.figures(event))
            elif line := _line_of(event, self._steps, verbose=self._verbose):
                if isinstance(event, Finished) and (task := self._tasks.pop(event.step, None)) is not None:
                    self._bars.remove_task(task)
                self._print(event, line)

    def _print(self, event: Event, line: str) -> None:
        from rich.text import Text

        style = ""
        if isinstance(event, Notice) and event.level == "warning":
            style = "yellow"
        elif isinstance(event, Finished):
            line, style = ("✓ " + line, "green") if event.status == "done" else ("✗ " + line, "red")
        self._bars.console.print(Text(line, style=style))
