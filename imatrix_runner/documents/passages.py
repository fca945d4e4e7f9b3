"""Cuts long texts into passages of about a chunk's length, at natural boundaries. Pure, and in bounded memory.

The input is any sequence of strings whose concatenation is the text, with ``\\n`` for line ends: lines, blocks of a file, or
the whole. The output keeps every character except blank lines around passages and the newlines between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PASSAGE = 2_000
"""Bytes after which a passage ends with its paragraph: about 512 tokens of English."""

SECTION = 500
"""Bytes after which a Markdown heading begins a new passage."""

WHOLE = 16 << 10
"""Bytes up to which a paragraph, a fenced block or a file of code stays whole."""

LINE = 64 << 10
"""Bytes up to which a line stays whole."""

_HEADING = re.compile(r"#{1,6}[ \t]+\S")
_FENCE = re.compile(r"[ \t]*(?P<marks>`{3,}(?=[^`]*$)|~{3,})(?P<rest>.*)")


def passages(lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Prose or Markdown as passages, each with the number of its first line.

    Paragraphs are collected until they have :data:`PASSAGE` bytes. A heading begins a new passage after :data:`SECTION` bytes.
    Fenced code stays whole. A paragraph or fenced block longer than :data:`WHOLE` is cut at line ends, a line longer than
    :data:`LINE` at spaces. More than two blank lines between paragraphs become two.
    """
    held = _Held()
    paragraph = blanks = 0  # bytes of the current paragraph or fenced block; blank lines after the last one
    fence = ""  # the marks that opened the current fenced block
    tight = True  # whether that block is still short enough to stay whole
    for line, number in _numbered(lines):
        blank = line.isspace()
        if blank and not (fence and tight and held.size):
            if held.size >= PASSAGE:
                yield held.give()
            paragraph = 0
            blanks += 1
            continue
        was = fence
        if "```" in line or "~~~" in line:
            fence = _fenced(was, line, begins=not paragraph)
        opens, closes = bool(fence and not was), bool(was and not fence)
        tight = tight or opens
        if opens:
            paragraph = 0
        count = _bytes(line)
        begins = held.size >= PASSAGE if opens else held.size >= SECTION and not (paragraph or was) and _HEADING.match(line)
        if begins or (paragraph and paragraph + count > WHOLE):
            tight = tight and not (paragraph and was)
            yield held.give()
            paragraph = blanks = 0
            if blank:
                continue
        held.take("\n" * min(blanks, 2) + line if held.size else line, number, count)
        blanks = 0
        paragraph = 0 if closes else paragraph + count
        if closes and held.size >= PASSAGE:
            yield held.give()
    if held.size:
        yield held.give()


def code(lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    """A file of source code or configuration: whole, or in blocks of at most :data:`WHOLE` bytes (longer lines alone).

    Blocks end at blank lines before a line without indentation, where functions and sections end in most languages; without
    such, at line ends. Each block comes with the number of its first line.
    """
    held, section = _Held(), _Held()  # complete sections, and the current one
    after_blank = False
    for line, number in _numbered(lines):
        blank = line.isspace()
        if after_blank and not blank and line[0] not in " \t":
            held.take_all(section)
        after_blank = blank
        count = _bytes(line)
        if held.size and held.size + section.size + count > WHOLE:
            yield held.give()
        if section.size and section.size + count > WHOLE:
            yield section.give()
        if section.size or not blank:
            section.take(line, number, count)
    held.take_all(section)
    if held.size:
        yield held.give()


class _Held:
    """The lines of the current passage, their size in bytes, and the number of the first."""

    def __init__(self) -> None:
        self.size = 0
        self._first = 0
        self._lines: list[str] = []

    def take(self, line: str, number: int, size: int) -> None:
        self._first = self._first if self._lines else number
        self._lines.append(line)
        self.size += size

    def take_all(self, other: _Held) -> None:
        """Append the lines of ``other``, which is empty from then on."""
        if other.size:
            self._first = self._first if self._lines else other._first
            self._lines += other._lines
            self.size += other.size
            other._lines, other.size = [], 0

    def give(self) -> tuple[str, int]:
        """Return the passage and the number of its first line, and start an empty one."""
        text = "".join(self._lines).rstrip("\n")
        self._lines, self.size = [], 0
        return text, self._first


def _numbered(blocks: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Lines with their ends and numbers; one longer than :data:`LINE` comes in several parts."""
    number, rest = 1, ""
    for block in blocks:
        lines = (rest + block).split("\n")
        rest = lines.pop()
        for line in lines:
            if 4 * len(line) >= LINE and _bytes(line) >= LINE:
                for part in _parts(line + "\n"):
                    yield part, number
            else:
                yield line + "\n", number
            number += 1
        if 4 * len(rest) > LINE and _bytes(rest) > LINE:
            *whole, rest = _parts(rest)
            for part in whole:
                yield part, number
    if rest:
        for part in _parts(rest):
            yield part, number


def _parts(line: str) -> list[str]:
    """Split a line into parts of at most :data:`LINE` bytes, after a space, or between characters if none is near."""
    data, parts, start = line.encode(), [], 0
    while len(data) - start > LINE:
        cut = data.rfind(b" ", start + LINE // 2, start + LINE) + 1
        if not cut:
            cut = start + LINE
            while data[cut] & 0xC0 == 0x80:
                cut -= 1
        parts.append(data[start:cut].decode())
        start = cut
    return [*parts, data[start:].decode()]


def _fenced(fence: str, line: str, *, begins: bool) -> str:
    """The marks of the fenced block that is open after ``line``; empty if none is. Bare tildes open one only where a paragraph
    begins, because elsewhere they underline a title."""
    match = _FENCE.match(line.rstrip())
    if match is None:
        return fence
    marks = match["marks"]
    if fence:
        return "" if marks.startswith(fence) and not match["rest"] else fence
    return marks if marks[0] == "`" or begins or match["rest"] else ""


def _bytes(line: str) -> int:
    return len(line) if line.isascii() else len(line.encode())
