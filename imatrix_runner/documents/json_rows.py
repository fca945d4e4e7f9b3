"""Rows of JSON lines, and of a JSON document that may not fit in memory.

The standard library's scanner reads a document value by value from a window of text. A streaming parser lets a value grow
without bound (for forty thousand opening brackets ijson takes 4 GB); here the window's limit or the scanner's own bounds it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any

from imatrix_runner.documents.documents import MAX_ROW, SHORTEN, TOO_LONG, TOO_MANY, BadRecord, Row, too_many
from imatrix_runner.documents.streams import bad_source, byte_lines
from imatrix_runner.safe_text import printable
from imatrix_runner.untrusted import NotUtf8Error, UnreadableError, from_json

_CORRECT = "Correct that line."
_SOMETHING = re.compile(r"[^ \t\n\r]")
_KINDS = ((dict, "an object"), (list, "a list"), (str, "a text"), (bool, "true or false"), ((int, float), "a number"))


def jsonl_rows(stream: io.BufferedReader, shown: str, *, strings: bool = False) -> Iterator[Row | BadRecord]:
    """One row for each line that is a JSON object; blank lines are skipped. ``strings``: a JSON string is a row as well, with
    the single field ``text``."""
    for number, line in byte_lines(stream, MAX_ROW):
        if line == b"":
            continue
        where = f"{shown}, line {number}"
        if line is None:
            yield BadRecord(where, TOO_LONG, SHORTEN)
        elif too_many(line):
            yield BadRecord(where, TOO_MANY, SHORTEN)
        else:
            yield _line(line, where, strings)


def _line(line: bytes, where: str, strings: bool = False) -> Row | BadRecord:
    try:
        if strings and line.startswith(b'"'):
            return Row(where, {"text": from_json(line, str)})
        return Row(where, from_json(line, dict[str, Any]))
    except NotUtf8Error as error:
        return BadRecord(where, str(error), "Convert the file to UTF-8, or correct that line.")
    except UnreadableError as error:
        return BadRecord(where, str(error), _CORRECT)


def is_jsonl(stream: IO[bytes], *, least: int = 2) -> bool:
    """Whether a file is JSON lines, whatever its name: the first line that is not blank is a complete JSON object, and at least
    ``least`` lines are not blank."""
    objects = 0
    for _, line in byte_lines(stream, MAX_ROW):
        if line == b"":
            continue
        if objects == 0 and (line is None or too_many(line) or not isinstance(_line(line, ""), Row)):
            return False
        objects += 1
        if objects >= least:
            return True
    return False


def single_object(blocks: Iterable[str]) -> dict[str, Any] | None:
    """The object, if the document is a single one of at most 16 MiB; else None."""
    window = _Window(blocks)
    try:
        value = window.value() if window.peek() == "{" else None
        return value if isinstance(value, dict) and not window.peek() else None
    except _BrokenError:
        return None


def lists_in(value: Mapping[str, Any]) -> list[str]:
    """The names of the fields that are lists of objects."""
    return [name for name, field in value.items() if isinstance(field, list) and field and isinstance(field[0], dict)]


def json_rows(blocks: Iterable[str], shown: str, *, strings: bool = False) -> Iterator[Row | BadRecord]:
    """One row for each object of a list, or of an object's only list of objects. Broken JSON ends the rows with a bad record.
    ``strings``: as for :func:`jsonl_rows`.

    Raises :class:`InvalidDataError` for an object with several such lists.
    """
    window = _Window(blocks)
    number = 0
    try:
        for number, item in enumerate(_items_of(window, shown), 1):
            where = f"{shown}, item {number}"
            if isinstance(item, dict):
                yield Row(where, item)
            elif strings and isinstance(item, str):
                yield Row(where, {"text": item})
            else:
                kind = next((name for kind, name in _KINDS if isinstance(item, kind)), "null")
                yield BadRecord(where, f"it is {kind}, not an object", "Correct or remove it.")
        if window.peek():
            raise window.broken("something follows the end of the document")
    except _BrokenError as error:
        where = f"{shown}, {f'after item {number}, ' if number else ''}line {error.line}"
        yield BadRecord(where, f"broken JSON at column {error.column}: {error.why}; the rest is not read", error.todo)


def _items_of(window: _Window, shown: str) -> Iterator[Any]:
    start = window.peek()
    if start == "[":
        yield from window.items()
        return
    if start != "{":
        raise window.broken("a list or an object is expected")
    found = ""
    for name in window.names():
        if window.peek() != "[":
            window.value()
            continue
        items = window.items()
        first = next(items, None)
        if not isinstance(first, dict):
            for _ in items:
                pass
            continue
        if found:
            several = f"{printable(found)[:60]!r} and {printable(name)[:60]!r}"
            raise bad_source(
                shown,
                f"it has several lists of objects: {several}",
                "Write the list you want to a separate file, for example with: jq .NAME FILE > records.json",
            )
        found = name
        yield first
        yield from items
    if not found:
        raise window.broken("it has no list of objects")


class _BrokenError(Exception):
    """Where and why a document cannot be read any further."""

    def __init__(self, line: int, column: int, why: str, todo: str) -> None:
        super().__init__(why)
        self.line, self.column, self.why, self.todo = line, column, why, todo


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class _Window:
    """A document's text from the current value on. It grows only for a long value, up to ``MAX_ROW`` characters."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self._blocks = iter(blocks)
        self._scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(parse_constant=_no_constant).raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 1  # of the window's first character

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            if found := _SOMETHING.search(self._text, self._at):
                self._at = found.start()
                return found[0]
            self._at = len(self._text)
            if not self._more(1):
                return ""

    def items(self) -> Iterator[Any]:
        """The values of the list that begins here."""
        yield from (self.value() for _ in self._members("]"))

    def names(self) -> Iterator[str]:
        """The names of the object that begins here; the caller reads each value."""
        for _ in self._members("}"):
            if self.peek() != '"':
                raise self.broken("a name in double quotes is expected")
            name = self.value()
            self._take(":")
            yield name

    def _members(self, end: str) -> Iterator[None]:
        self._at += 1
        if self.peek() == end:
            self._at += 1
            return
        while True:
            yield
            if self._take("," + end) == end:
                return

    def _take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            what = " or ".join(f"'{mark}'" for mark in expected)
            raise self.broken(f"{what} is expected" if found else "the file ends too early")
        self._at += 1
        return found

    def value(self) -> Any:
        """Read the complete value that begins here."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except RecursionError:
                raise self.broken("it is nested too deeply") from None
            except ValueError as error:
                # Broken, or its end is not in the window yet.
                why, place = (error.msg, error.pos) if isinstance(error, json.JSONDecodeError) else (str(error), self._at)
                behind = place - self._at
                if not self._more(len(self._text) - self._at):
                    raise self.broken(why, behind=behind) from None
                if too_many(self._text):
                    raise self.broken(TOO_MANY, SHORTEN) from None
            else:
                length = end - self._at
                # A number may continue in the next block: of "1e+" the scanner takes "1".
                if len(self._text) - end > 2 or not self._more(1):
                    self._at += length
                    return value

    def _more(self, least: int) -> bool:
        """Read at least ``least`` more characters if there are any, and drop those before the value; return whether any
        came."""
        if self._ended:
            return False
        self._line, self._column = self._place(self._at)
        held = [self._text[self._at :]]
        self._text, self._at = held[0], 0
        room = MAX_ROW - len(held[0])
        if room < 0:
            raise self.broken(TOO_LONG, SHORTEN)
        taken = 0
        while taken <= min(least, room):
            block = next(self._blocks, None)
            if block is None:
                self._ended = True
                break
            held.append(block)
            taken += len(block)
        self._text = "".join(held)
        return taken > 0

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column, in the document, of a position in the window."""
        lines = self._text.count("\n", 0, at)
        return self._line + lines, at - self._text.rfind("\n", 0, at) if lines else self._column + at

    def broken(self, why: str, todo: str = "Correct the file there.", *, behind: int = 0) -> _BrokenError:
        """The error at the current position, or ``behind`` characters after it."""
        return _BrokenError(*self._place(self._at + behind), printable(why), todo)
