"""Texts in labelled parts, such as the shipped one. A line ``=== part: fiction ===`` begins a part and ends the one before."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from imatrix_runner.documents.documents import DocumentRecord
from imatrix_runner.documents.passages import passages
from imatrix_runner.errors import UsageError, from_os_error
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.safe_text import printable

_LABEL = re.compile(r"^=== part: ([A-Za-z0-9][\w .-]{0,63}?) ===[ \t\r]*$", re.ASCII | re.MULTILINE)
_SCENES = "---"


@dataclass(frozen=True)
class TextPart:
    """A part of a text: its name, its text without surrounding blank lines, and the number of its first line."""

    name: str
    text: str
    line: int = 1


def parse_parts(text: str) -> tuple[TextPart, ...]:
    """The labelled parts of a text, in order; empty without labels. Text before the first label belongs to no part."""
    labels = list(_LABEL.finditer(text))
    ends = [*(label.start() for label in labels), len(text)][1:]
    return tuple(_part(label[1], text, label.end(), end) for label, end in zip(labels, ends, strict=True))


def _part(name: str, text: str, start: int, end: int) -> TextPart:
    while start < end and text[start] in "\r\n":
        start += 1
    return TextPart(name, text[start:end].rstrip("\r\n"), text.count("\n", 0, start) + 1)


def shipped_parts() -> tuple[TextPart, ...]:
    """The parts of the shipped text. Raises :class:`InvalidDataError` if the installation lacks it."""
    path = resource(CALIBRATION_TEXT)
    try:
        return parse_parts(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise from_os_error(error, "reading the shipped text", path) from error


def part_records(name: str) -> Iterator[DocumentRecord]:
    """The documents of a shipped part: its scenes, else its passages. Raises :class:`UsageError` for an unknown part."""
    parts = {part.name: part for part in shipped_parts()}
    if name not in parts:
        near = get_close_matches(name, parts, n=1)
        raise UsageError(
            f"No shipped part {printable(name)[:60]!r} found",
            f"did you mean {near[0]}?" if near else f"the parts are {', '.join(parts)}",
            "List the shipped parts with: imatrix-runner calibration list",
        )
    part = parts[name]
    return (
        DocumentRecord(text, f"{CALIBRATION_TEXT}, line {part.line + line - 1}") for text, line in part_documents(part.text)
    )


def part_documents(text: str) -> Iterator[tuple[str, int]]:
    """The documents of a part's text, each with the number of its first line.

    A line ``---`` between blank lines separates scenes. Scenes stay whole, because half a dialogue loses who speaks to whom.
    """
    scenes = list(_scenes(text.split("\n")))
    return iter(scenes) if len(scenes) > 1 else passages([text])


def _scenes(lines: list[str]) -> Iterable[tuple[str, int]]:
    start = 0
    for number in range(len(lines) + 1):
        if number < len(lines) and not _separates_scenes(lines, number):
            continue
        scene = "\n".join(lines[start:number])
        if scene.strip():
            before = len(scene) - len(scene.lstrip("\n"))
            yield scene.strip("\n"), start + before + 1
        start = number + 1


def _separates_scenes(lines: list[str], number: int) -> bool:
    around = lines[max(number - 1, 0) : number] + lines[number + 1 : number + 2]
    return lines[number].strip() == _SCENES and not any(line.strip() for line in around)
