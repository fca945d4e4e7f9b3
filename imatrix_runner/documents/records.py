"""Reads any local source as a stream of documents: text, Markdown, code, folders, JSON lines, JSON, CSV, Parquet.

Memory is bounded by single documents. An unusable record is reported with its place, and the stream continues; an unreadable
source raises an error.
"""

from __future__ import annotations

import codecs
import io
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from imatrix_runner.documents.csv_rows import csv_rows
from imatrix_runner.documents.documents import BadRecord, Conversation, DocumentRecord, Row
from imatrix_runner.documents.folders import CODE, DATA, MAX_FILE, PROSE, FolderEntry, documents, is_dataset, suffix
from imatrix_runner.documents.json_rows import is_jsonl, json_rows, jsonl_rows, lists_in, single_object
from imatrix_runner.documents.message_rows import joined
from imatrix_runner.documents.parquet_rows import parquet_rows
from imatrix_runner.documents.passages import WHOLE, code, passages
from imatrix_runner.documents.streams import BLOCK, bad_source, opened, text_blocks
from imatrix_runner.errors import UsageError, from_os_error
from imatrix_runner.files import discard
from imatrix_runner.safe_text import printable


class UnfitRow(Protocol):
    """Why a row is neither a text nor a conversation, and what to do about it."""

    @property
    def why(self) -> str: ...

    @property
    def todo(self) -> str: ...


Interpret = Callable[[Mapping[str, Any]], "str | Conversation | UnfitRow"]
"""Interprets a row's fields as a text or a conversation."""

Documents = Iterator[DocumentRecord | BadRecord]
Cut = Callable[[Iterable[str]], Iterator[tuple[str, int]]]


def _ignore_bytes(_bytes: int) -> None:
    """Default for ``on_bytes``: does nothing."""


def _ignore_skipped(_path: Path, _why: str) -> None:
    """Default for ``on_skipped``: does nothing."""


def read_source(
    path: Path,
    interpret: Interpret,
    *,
    on_bytes: Callable[[int], None] = _ignore_bytes,
    on_skipped: Callable[[Path, str], None] = _ignore_skipped,
    name: str | None = None,
    strings: bool = False,
) -> Documents:
    """The documents of a file or a folder.

    ``interpret`` interprets the rows of data files. ``on_bytes`` is called with the bytes of each read (:func:`source_bytes` in
    all) and may raise to stop. ``on_skipped`` is called for each skipped file of a folder, with a short reason (``binary``,
    ``too large``). ``name`` is shown instead of the path; ``strings``: as for :func:`~.json_rows.jsonl_rows`. Raises
    :class:`InvalidDataError` for a source that is unreadable, does not have the format that its name says, or has no records.
    """
    reader = _Reader(interpret, on_bytes, on_skipped, strings)
    shown = printable(name or str(path))
    empty = True
    for document in reader.folder(path, shown) if path.is_dir() else reader.file(path, shown):
        empty = False
        yield document
    if empty:
        why = "it contains no text or source code" if path.is_dir() else "it is empty"
        raise bad_source(shown, why, "Leave it out, or give another file or folder.")


def source_files(path: Path) -> Iterator[Path]:
    """The files that :func:`read_source` reads, in order. Raises :class:`InvalidDataError`."""
    if not path.is_dir():
        yield path
        return
    _, entries = _listed(path, printable(str(path)))
    yield from (entry.path for entry in entries if not entry.why)


def source_bytes(path: Path) -> int | None:
    """The sum that ``on_bytes`` of :func:`read_source` reaches; None if it is unknown."""
    try:
        if path.is_dir():
            return sum(entry.size for entry in documents(path, dataset=is_dataset(path)) if not entry.why)
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def spool_stdin(stream: IO[bytes], folder: Path, on_bytes: Callable[[int], None] = _ignore_bytes) -> Path:
    """Copy ``stream`` to a file in ``folder``, because a source is read twice, with a suffix that fits its content.

    ``on_bytes`` is called with the size of every block and may raise to stop. Raises :class:`UsageError` for a terminal,
    :class:`InvalidDataError` for data that is not text, ``NoSpaceError``.
    """
    if stream.isatty():
        raise UsageError(
            "Nothing is piped to stdin",
            "the source - reads stdin, and stdin is a terminal",
            "For example: cat notes.txt | imatrix-runner calibration build -o calibration.txt -",
        )
    part = folder / "stdin.part"
    try:
        with part.open("wb") as target:
            while block := stream.read(BLOCK):
                target.write(block)
                on_bytes(len(block))
        return part.replace(part.with_suffix(_suffix_of(part)))
    except OSError as error:
        discard(part)
        raise from_os_error(error, "copying stdin to a file", part) from error
    except BaseException:
        discard(part)
        raise


def _suffix_of(path: Path) -> str:
    """The suffix that fits a file's content."""
    if _is_parquet(path):
        return ".parquet"
    with opened(path, "stdin", _ignore_bytes) as stream:
        head = _head(stream)
        if is_jsonl(stream, least=1):
            return ".jsonl"
    return ".json" if head.startswith((b"[{", b'{"')) else ".txt"


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4) == b"PAR1"


def _listed(folder: Path, shown: str) -> tuple[bool, Iterator[FolderEntry]]:
    """Whether ``folder`` is a data set, and its entries. Raises :class:`RunnerError` if it cannot be read."""

    def entries() -> Iterator[FolderEntry]:
        try:
            yield from documents(folder, dataset=dataset)
        except OSError as error:
            raise from_os_error(error, "reading a folder", shown) from error

    try:
        dataset = is_dataset(folder)
    except OSError as error:
        raise from_os_error(error, "reading a folder", shown) from error
    return dataset, entries()


@dataclass(frozen=True)
class _Reader:
    """Reads files and folders; reports bytes read and files skipped."""

    interpret: Interpret
    on_bytes: Callable[[int], None]
    on_skipped: Callable[[Path, str], None]
    strings: bool

    def folder(self, folder: Path, shown: str) -> Documents:
        dataset, entries = _listed(folder, shown)
        for entry in entries:
            name = f"{shown}/{printable(entry.inside)}"
            if entry.why:
                self.on_skipped(entry.path, entry.why)
            elif dataset:
                empty = True
                for document in self.file(entry.path, name):
                    empty = False
                    yield document
                if empty:
                    self.on_skipped(entry.path, "empty")
            else:
                yield from self._written(entry.path, name)

    def file(self, path: Path, shown: str) -> Documents:
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise bad_source(
                    shown,
                    "it is a pipe or a device, and a source is read more than once",
                    "Pipe it to stdin instead and give - as the source.",
                )
            kind = ".parquet" if _is_parquet(path) else suffix(path)
        except OSError as error:
            raise from_os_error(error, "opening a source of calibration text", shown) from error
        if kind in DATA:
            return self._interpreted(joined(self._rows(kind, path, shown), self._stands_alone))
        return self._text(path, shown, code if kind in CODE else passages)

    def _stands_alone(self, fields: Mapping[str, Any]) -> bool:
        """Whether a row that is one message is a document by itself, as when ``--field`` names its text."""
        return isinstance(self.interpret(fields), (str, Conversation))

    def _text(self, path: Path, shown: str, cut: Cut) -> Documents:
        with opened(path, shown, self.on_bytes) as stream:
            for text, line in cut(text_blocks(stream, path, shown)):
                yield DocumentRecord(text, f"{shown}, line {line}")

    def _written(self, path: Path, shown: str) -> Documents:
        """The documents of a file in a folder: the whole file, or the passages or blocks of a long one."""
        try:
            with path.open("rb") as handle:
                data = handle.read(MAX_FILE + 1)
        except OSError as error:
            self.on_skipped(path, f"unreadable: {error.strerror}")
            return
        self.on_bytes(len(data))
        try:
            text = data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError:
            self.on_skipped(path, "binary" if b"\0" in data else "not UTF-8")
            return
        if "\0" in text or not text.strip() or len(data) > MAX_FILE:
            self.on_skipped(path, "binary" if "\0" in text else "too large" if text.strip() else "empty")
        elif len(data) <= WHOLE:
            yield DocumentRecord(text.strip("\n"), shown)
        else:
            for block, line in (passages if suffix(path) in PROSE else code)([text]):
                yield DocumentRecord(block, f"{shown}, line {line}")

    def _rows(self, kind: str, path: Path, shown: str) -> Iterator[Row | BadRecord]:
        if kind == ".parquet":
            yield from parquet_rows(path, shown, self.on_bytes)
        elif kind in (".csv", ".tsv"):
            with opened(path, shown, self.on_bytes) as stream:
                blocks = text_blocks(stream, path, shown, strict=False)
                yield from csv_rows(blocks, shown, delimiter="\t" if kind == ".tsv" else "")
        elif _holds_lines(kind, path, shown):
            with opened(path, shown, self.on_bytes) as stream:
                yield from jsonl_rows(stream, shown, strings=self.strings)
        else:
            yield from self._document(path, shown)

    def _document(self, path: Path, shown: str) -> Iterator[Row | BadRecord]:
        """The rows of a JSON document: those of its list, or the document itself if it is one record."""
        with opened(path, shown, _ignore_bytes) as stream:
            value = single_object(text_blocks(stream, path, shown, strict=False))
        if value is not None and (not lists_in(value) or isinstance(self.interpret(value), (str, Conversation))):
            self.on_bytes(path.stat().st_size)
            yield Row(shown, value)
            return
        with opened(path, shown, self.on_bytes) as stream:
            yield from json_rows(text_blocks(stream, path, shown, strict=False), shown, strings=self.strings)

    def _interpreted(self, rows: Iterable[Row | BadRecord]) -> Documents:
        for row in rows:
            if isinstance(row, BadRecord):
                yield row
                continue
            content = self.interpret(row.fields)
            if not isinstance(content, (str, Conversation)):
                yield BadRecord(row.where, content.why, content.todo)
            elif flaw := _flaw(content):
                yield BadRecord(row.where, flaw, "Correct or remove that record.")
            else:
                yield DocumentRecord(content, row.where)


def _flaw(content: str | Conversation) -> str:
    """Why a document cannot be written into a text file; empty if it can."""
    waiting: list[Any] = [content] if isinstance(content, str) else [content.messages, content.tools]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += (*value, *value.values())
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, str):
            if "\0" in value:
                return "it contains NUL characters"
            try:
                value.encode()
            except UnicodeEncodeError:
                return "it contains bytes that are not UTF-8, or half a surrogate pair"
    return ""


def _holds_lines(kind: str, path: Path, shown: str) -> bool:
    """Whether a JSON file is JSON lines, judging by its content, because suffixes are unreliable."""
    with opened(path, shown, _ignore_bytes) as stream:
        if kind == ".json":
            return is_jsonl(stream)
        return not _head(stream).startswith(b"[")


def _head(stream: io.BufferedReader) -> bytes:
    """The beginning of a file, without white space and byte order mark; the stream's position stays."""
    return b"".join(stream.peek(1).removeprefix(codecs.BOM_UTF8)[:BLOCK].split())
