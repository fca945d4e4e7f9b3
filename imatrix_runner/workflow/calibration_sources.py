"""Opening what a calibration text is built from: files and folders, stdin, shipped parts, public sets, a hub's data sets."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from imatrix_runner.calibration.build import OpenedSource
from imatrix_runner.calibration.catalogue import set_names
from imatrix_runner.calibration.conversations import Unfit, content_of
from imatrix_runner.calibration.documents import BadRecord, Conversation, Record
from imatrix_runner.calibration.parts import Part, part_records, shipped_parts
from imatrix_runner.calibration.records import read_source, source_bytes, source_files, spool_stdin
from imatrix_runner.calibration.sources import ALL_PARTS, Wanted, parse_source
from imatrix_runner.errors import UsageError
from imatrix_runner.events import detail, info
from imatrix_runner.files import sha256
from imatrix_runner.models.bounded import printable
from imatrix_runner.models.hub import Hub, fetch_dataset, is_offline, parse_dataset
from imatrix_runner.workflow.calibration_sets import fetch_set
from imatrix_runner.workflow.context import Context

NOT_STATED = "not stated"
OURS = "MIT or CC0-1.0"


@dataclass
class SourceOpener:
    """Opens what users name. ``field_name`` is the one field to take of every record, if one was named.

    ``scratch`` is a folder for what cannot be read twice. ``paths`` collects the user's own files and folders.
    """

    context: Context
    scratch: Path
    field_name: str
    offline: bool
    paths: list[Path] = field(default_factory=list)

    def open(self, argument: str) -> OpenedSource:
        """The source that ``SOURCE[=WEIGHT]`` names. Raises errors of ours."""
        parts = shipped_parts()
        wanted = parse_source(argument, [part.name for part in parts], set_names())
        if wanted.kind == "part":
            return _shipped(wanted, [part for part in parts if wanted.text in (part.name, ALL_PARTS)])
        return self._open(wanted)

    def _open(self, wanted: Wanted) -> OpenedSource:
        if wanted.kind == "stdin":
            return self._stdin(wanted)
        if wanted.kind == "set":
            fetched = fetch_set(wanted.text, self.context, offline=self.offline)
            return self._files(wanted, "public set", [fetched.path], licence=fetched.licence, revision=fetched.origin)
        if wanted.kind == "hub":
            asked = parse_dataset(wanted.text)
            assert asked is not None
            found = fetch_dataset(Hub(self.context.stop, self.context.sink, offline=self.offline or is_offline()), asked)
            licence = found.licence or NOT_STATED
            return self._files(wanted, "data set", list(found.paths), licence=licence, revision=found.origin)
        self.paths.append(wanted.path)
        return self._files(wanted, "folder" if wanted.path.is_dir() else "file", [wanted.path], name=_last_name(wanted.path))

    def _stdin(self, wanted: Wanted) -> OpenedSource:
        if any(path.parent == self.scratch for path in self.paths):
            raise UsageError("- is named twice", "stdin can be read once", "Name it once.")
        spooled = spool_stdin(sys.stdin.buffer, self.scratch, lambda _: self.context.stop.check())
        self.paths.append(spooled)
        return self._files(wanted, "stdin", [spooled], name="stdin")

    def _files(
        self,
        wanted: Wanted,
        kind: str,
        paths: list[Path],
        *,
        licence: str = NOT_STATED,
        revision: str = "",
        name: str = "",
    ) -> OpenedSource:
        name = printable(name or wanted.text)
        records = partial(_read, paths, name, self.field_name, self._tell_skipped)
        n_bytes = sum(source_bytes(path) or 0 for path in paths)
        digest = _digest(paths, self.context.stop.check)
        return OpenedSource(name, kind, licence, digest, n_bytes, records, wanted.weight, revision)

    def _tell_skipped(self, name: str, skipped: Sequence[tuple[Path, str]]) -> None:
        counts = Counter(why for _, why in skipped)
        told = ", ".join(f"{count} {why}" for why, count in counts.most_common())
        self.context.sink(info(f"{name}: passed over {told}"))
        for path, why in skipped:
            self.context.sink(detail(f"{printable(str(path))}: passed over, {why}"))


def _shipped(wanted: Wanted, parts: Sequence[Part]) -> OpenedSource:
    """One part of the shipped text, or all of them."""
    text = "".join(part.text for part in parts).encode()

    def records(on_bytes: Callable[[int], None]) -> Iterator[Record | BadRecord]:
        for part in parts:
            on_bytes(len(part.text.encode()))
            yield from part_records(part.name)

    digest = hashlib.sha256(text).hexdigest()
    return OpenedSource(wanted.text, "shipped text", OURS, digest, len(text), records, wanted.weight)


def _read(
    paths: Sequence[Path],
    name: str,
    field_name: str,
    tell_skipped: Callable[[str, Sequence[tuple[Path, str]]], None],
    on_bytes: Callable[[int], None],
) -> Iterator[Record | BadRecord]:
    skipped: list[tuple[Path, str]] = []

    def interpret(row: Mapping[str, Any]) -> str | Conversation | Unfit:
        return content_of(row, field_name)

    for path in paths:
        shown = name if len(paths) == 1 else f"{name}, {path.name}"
        yield from read_source(
            path, interpret, on_bytes=on_bytes, on_skipped=lambda file, why: skipped.append((file, why)), name=shown
        )
    if skipped:
        tell_skipped(name, skipped)


def _last_name(path: Path) -> str:
    """What a manifest calls a user's path: its folders are nobody's business."""
    return path.name or path.resolve().name or str(path)


def _digest(paths: Sequence[Path], check: Callable[[], None]) -> str:
    """The SHA-256 of a file; of a folder or several files that of their names and hashes."""
    if len(paths) == 1 and not paths[0].is_dir():
        return sha256(paths[0], lambda _: check())
    digest = hashlib.sha256()
    for path in paths:
        for file in source_files(path):
            inside = file.relative_to(path).as_posix() if path.is_dir() else file.name
            digest.update(f"{inside}\0{sha256(file, lambda _: check())}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
