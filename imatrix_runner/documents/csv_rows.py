"""Rows of CSV and TSV files of any size."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence

from imatrix_runner.documents.documents import MAX_ROW, MAX_VALUES, SHORTEN, TOO_LONG, TOO_MANY, BadRecord, Row
from imatrix_runner.documents.streams import bad_source
from imatrix_runner.safe_text import printable

_DELIMITERS = ",\t;|"
_MOST_COLUMNS = 1000
_MEND = "Correct that line: a field that contains the delimiter is quoted, and quotes inside it are doubled."
_NAME = "Give the file a header line that names its columns, such as: prompt,response"


def csv_rows(blocks: Iterable[str], shown: str, *, delimiter: str = "") -> Iterator[Row | BadRecord]:
    """One row for each record after the header line, with the line in which it begins as its place. Blank lines are skipped.

    ``delimiter`` empty: detect it from the header. Raises :class:`InvalidDataError` for an unusable header.
    """
    # The csv module has one limit for the whole process; nothing else in this program reads CSV.
    csv.field_size_limit(max(MAX_ROW, csv.field_size_limit()))
    lines = _Lines(blocks)
    header: list[str] = []
    try:
        delimiter = delimiter or _delimiter(lines.peek())
    except _RefusedError as error:
        raise bad_source(shown, f"its header line cannot be read: {error}", _NAME) from error
    lines.delimiter = delimiter
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin()
        try:
            cells = next(reader, None)
        except (csv.Error, _RefusedError) as error:
            refused = isinstance(error, _RefusedError)
            why = str(error) if refused else f"it is not CSV: {printable(str(error))}"
            if not header:
                raise bad_source(shown, f"its header line cannot be read: {why}", _NAME) from error
            where = f"{shown}, line {lines.began}"
            if lines.is_long_multiline:
                yield BadRecord(where, "a quoted field is not closed; the rest of the file is not read", _MEND)
                return
            yield BadRecord(where, why, SHORTEN if refused else _MEND)
            continue
        if cells is None:
            return
        if not cells or (len(cells) == 1 and not cells[0].strip()):
            continue
        where = f"{shown}, line {lines.began}"
        if not header:
            header = _header(cells, shown)
        elif len(cells) != len(header):
            yield BadRecord(where, f"it has {len(cells)} fields, and the header line has {len(header)}", _MEND)
        else:
            yield Row(where, dict(zip(header, cells, strict=True)))


def _header(cells: Sequence[str], shown: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) > _MOST_COLUMNS:
        raise bad_source(shown, f"its first line has {len(names)} fields, and at most {_MOST_COLUMNS} columns are read", _NAME)
    twice = next((name for name in names if name and names.count(name) > 1), "")
    if twice:
        raise bad_source(shown, f"two of its columns are named {printable(twice)[:60]!r}", _NAME)
    return names


def _delimiter(line: str) -> str:
    """The most frequent delimiter of a header line, outside quotes; a comma if there is none."""
    bare = "".join(line.split('"')[::2])
    return max(_DELIMITERS, key=bare.count)


class _RefusedError(Exception):
    """A record that exceeds the bounds on size or number of values."""


class _Lines(Iterator[str]):
    """Lines for :mod:`csv`, with bounds on a record: an unclosed quote would otherwise make one record of the whole file."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self.delimiter = ""
        self.began = 1
        self._blocks = iter(blocks)
        self._lines: list[str] = []  # complete lines, the next one last
        self._rest = ""  # the beginning of the line after them
        self._number = 0
        self._size = self._fields = 0  # of the current record

    def begin(self) -> None:
        """Begin a new record."""
        self.began = self._number + 1
        self._size = self._fields = 0

    @property
    def is_long_multiline(self) -> bool:
        """Whether the record spans several lines and 1 MiB. If it is broken, the beginning of the next one is unknown."""
        return self._number > self.began and self._size > 1 << 20

    def peek(self) -> str:
        """The next line that is not blank, without consuming it."""
        while (line := self._line()) is not None and not line.strip():
            self._number += 1
        if line is not None:
            self._lines.append(line)
        return line or ""

    def __next__(self) -> str:
        line = self._line()
        if line is None:
            raise StopIteration
        self._number += 1
        self._size += len(line)
        self._fields += line.count(self.delimiter)
        if self._size > MAX_ROW:
            raise _RefusedError(TOO_LONG)
        if self._fields > MAX_VALUES:
            raise _RefusedError(TOO_MANY)
        return line + "\n"

    def _line(self) -> str | None:
        while not self._lines:
            held, size = [self._rest], len(self._rest)
            for block in self._blocks:
                held.append(block)
                size += len(block)
                if "\n" in block or size > MAX_ROW:
                    break
            else:
                if not size:
                    return None
                held.append("\n")  # the last line has no end
            *whole, self._rest = "".join(held).split("\n")
            self._lines = whole[::-1]
            if len(self._rest) > MAX_ROW:
                self._drop()
                raise _RefusedError(TOO_LONG)
        return self._lines.pop()

    def _drop(self) -> None:
        """Skip the rest of a line."""
        self._rest = ""
        self._number += 1
        for block in self._blocks:
            _, end, self._rest = block.partition("\n")
            if end:
                return
