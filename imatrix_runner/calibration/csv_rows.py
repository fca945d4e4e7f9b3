"""Rows of CSV and TSV files of any size."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence

from imatrix_runner.calibration.documents import BadRecord
from imatrix_runner.calibration.rows import MAX_ROW, MAX_VALUES, SHORTEN, TOO_LONG, TOO_MANY, Row
from imatrix_runner.calibration.streams import bad_source
from imatrix_runner.models.bounded import printable

_DELIMITERS = ",\t;|"
_MOST_COLUMNS = 1000
_MEND = "Mend that line: quotes stand around a field that holds the delimiter, and are doubled inside it."
_NAME = "Give the file a first line that names its columns, such as: prompt,response"


def csv_rows(blocks: Iterable[str], shown: str, *, delimiter: str = "") -> Iterator[Row | BadRecord]:
    """One row for each record after the header line; a record's place is the line it begins in. Blank lines are passed over.

    ``delimiter`` empty: the header tells it. Raises :class:`InvalidDataError` for a header that names no columns.
    """
    # The csv module knows one limit for the whole process; nothing else here reads CSV.
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
            if lines.are_many:
                yield BadRecord(where, "a quoted field there does not end where it should; the rest is not read", _MEND)
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
            yield BadRecord(where, f"it has {len(cells)} fields, and the header line {len(header)}", _MEND)
        else:
            yield Row(where, dict(zip(header, cells, strict=True)))


def _header(cells: Sequence[str], shown: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) > _MOST_COLUMNS:
        raise bad_source(shown, f"its first line has {len(names)} fields, too many for the names of columns", _NAME)
    twice = next((name for name in names if name and names.count(name) > 1), "")
    if twice:
        raise bad_source(shown, f"two of its columns are named {printable(twice)[:60]!r}", _NAME)
    return names


def _delimiter(line: str) -> str:
    """The mark that parts the most names in a header line; a comma where there is none."""
    bare = "".join(line.split('"')[::2])
    return max(_DELIMITERS, key=bare.count)


class _RefusedError(Exception):
    """A record that would take more memory than any document may."""


class _Lines(Iterator[str]):
    """Lines for :mod:`csv`, which would gather one record without end if its quotes asked for it."""

    def __init__(self, blocks: Iterable[str]) -> None:
        self.delimiter = ""
        self.began = 1
        self._blocks = iter(blocks)
        self._lines: list[str] = []  # whole lines at hand, the next one last
        self._rest = ""  # the beginning of the line after them
        self._number = 0
        self._size = self._fields = 0  # of the record that goes on

    def begin(self) -> None:
        """A record begins."""
        self.began = self._number + 1
        self._size = self._fields = 0

    @property
    def are_many(self) -> bool:
        """Whether a long record goes over several lines: nobody knows where the next one begins, if it is broken."""
        return self._number > self.began and self._size > 1 << 20

    def peek(self) -> str:
        """The next line that is not blank, without taking it."""
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
        """Pass over the rest of a line."""
        self._rest = ""
        self._number += 1
        for block in self._blocks:
            _, end, self._rest = block.partition("\n")
            if end:
                return
