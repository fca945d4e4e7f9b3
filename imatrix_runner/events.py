"""The events of a running job: the vocabulary shared by the code that computes and the code that displays.

Engines, downloads and builds emit these values into a :data:`Sink`; the command line renders them (live, plain, quiet).
They are tagged so that a child process can send them as JSON lines: ``{"type": "progress", ...}``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

Status = Literal["done", "skipped", "failed"]


class Started(msgspec.Struct, frozen=True, tag_field="type", tag="started"):
    """A step begins. ``step`` identifies it in the events that follow; ``title`` is for people."""

    step: str
    title: str
    total: float | None = None
    unit: str = ""


class Progress(msgspec.Struct, frozen=True, tag_field="type", tag="progress"):
    """``done`` of ``total`` units of a step; ``note`` is a short remark such as a running perplexity."""

    step: str
    done: float
    total: float | None = None
    note: str = ""


class Finished(msgspec.Struct, frozen=True, tag_field="type", tag="finished"):
    """A step is over; ``detail`` is one line for people."""

    step: str
    status: Status
    detail: str = ""
    seconds: float = 0.0


class Notice(msgspec.Struct, frozen=True, tag_field="type", tag="notice"):
    """One line for the user; a ``detail`` is shown only with ``-v``."""

    level: Literal["detail", "info", "warning"]
    text: str


class Metric(msgspec.Struct, frozen=True, tag_field="type", tag="metric"):
    """A measured figure of a step."""

    step: str
    name: str
    value: float


class Saved(msgspec.Struct, frozen=True, tag_field="type", tag="saved"):
    """A file now exists, verified, under its final name."""

    path: str
    what: str
    bytes: int = 0


Event = Started | Progress | Finished | Notice | Metric | Saved
Sink = Callable[[Event], None]


def detail(text: str) -> Notice:
    return Notice("detail", text)


def info(text: str) -> Notice:
    return Notice("info", text)


def warning(text: str) -> Notice:
    return Notice("warning", text)


def no_effect(options: Sequence[str], why: str) -> str:
    """The sentence about options that are accepted and change nothing; ``why`` may end without a full stop."""
    return f"{', '.join(options)} {'has' if len(options) == 1 else 'have'} no effect: {why}"


def ignore(_event: Event) -> None:
    """A sink that drops every event."""
