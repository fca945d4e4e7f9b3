"""The workspace's memory: which step made which file from what.

``journal.json`` holds one record per step. A record's ``inputs`` are named fingerprints (``{"source": "sha256:…",
"levels flags": "…"}``): when the same names carry the same values and the outputs still carry their stamps, the step need
not run again; when one differs, its *name* is what the user is told. The file is replaced atomically after every step.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import Stamp, changed_ns, publish, read_json, sha256, stamp, write_json
from imatrix_runner.untrusted import UnreadableError, as_type, first_non_finite

VERSION = 1


T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """A file a step made, by name inside the workspace."""

    name: str
    stamp: Stamp
    sha256: str = ""


@dataclass(frozen=True)
class Record:
    """One finished step. ``facts`` is what later steps and reports want to know about it, JSON values only."""

    inputs: dict[str, str]
    outputs: list[Output]
    reason: str
    seconds: float
    finished: str
    command: str = ""
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def output(self) -> Output:
        """The first or only file of the step. Raises :class:`InvalidDataError` where the journal names none."""
        if not self.outputs:
            raise _unreadable("The journal", "a step names no file that it made")
        return self.outputs[0]

    def facts_as(self, kind: type[T]) -> T:
        """The facts, or those among them that ``kind`` has fields for. Raises :class:`InvalidDataError` for other types."""
        try:
            return as_type(self.facts, kind, str_keys=True)
        except UnreadableError as error:
            raise _unreadable("The journal", f"what a step remembered is not what this program wrote: {error}") from error

    @classmethod
    def now(
        cls,
        inputs: Mapping[str, str],
        outputs: list[Output],
        reason: str,
        seconds: float,
        *,
        command: str = "",
        facts: dict[str, object] | None = None,
    ) -> Record:
        """A record of a step that ended this moment."""
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(dict(inputs), outputs, reason, seconds, finished, command, facts or {})


class _Inputs(dict[str, str]):
    """A record's inputs as they were read: one that is looked up and is not there is a fault of the file."""

    def __init__(self, path: Path, step: str, values: Mapping[str, str]) -> None:
        super().__init__(values)
        self._path, self._step = path, step

    def __missing__(self, name: str) -> str:
        raise _unreadable(str(self._path), f"its step {self._step!r} has no input {name!r}")


@dataclass(frozen=True)
class Hashed:
    """A content hash and the stamp under which it was computed; ``changed_ns`` as :func:`changed_ns`, 0 if not known."""

    stamp: Stamp
    sha256: str
    changed_ns: int = 0


@dataclass(frozen=True)
class _Document:
    version: int
    steps: dict[str, Record] = field(default_factory=dict)
    hashes: dict[str, Hashed] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


class Journal:
    """Reads and appends records; safe to use from several threads of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        document = read_json(path, _Document) if path.exists() else _Document(VERSION)
        if document.version != VERSION:
            raise InvalidDataError(
                f"{path} was written by another version of imatrix-runner",
                f"journal version {document.version}, this program knows {VERSION}",
                "Use the program that wrote it, or move the journal away: finished files will be made again.",
            )
        self._steps = {
            step: replace(record, inputs=_Inputs(path, step, record.inputs)) for step, record in document.steps.items()
        }
        self._hashes = dict(document.hashes)
        self._facts = dict(document.facts)

    def __getitem__(self, step: str) -> Record:
        return self._steps[step]

    def get(self, step: str) -> Record | None:
        return self._steps.get(step)

    def steps(self) -> Mapping[str, Record]:
        return dict(self._steps)

    def record(self, step: str, record: Record) -> None:
        """Keep what a step came to. Raises :class:`InvalidDataError` for facts with NaN or infinity: JSON has neither."""
        if place := first_non_finite(record.facts):
            raise InvalidDataError(
                f"The figures of {step} cannot be kept",
                f"{place} is NaN or infinite",
                "The model file is damaged or overflows: make it again, or choose another type.",
            )
        with self._lock:
            self._steps[step] = record
            self._save()

    def conclude(self, step: str, record: Record, files: Sequence[tuple[Path, Path]]) -> None:
        """Record a step and give its files, ``(part, final)`` each, their names.

        In this order: a rename keeps the stamp, so a kill in between leaves a step to be made again, never a file that no
        record explains. What the step made before goes; a final name taken by anything else is refused.
        """
        before = self.get(step)
        for output in before.outputs if before is not None else ():
            if is_intact(output, self.path.parent):
                (self.path.parent / output.name).unlink()
        if taken := next((final for _, final in files if final.exists()), None):
            raise InvalidDataError(
                f"{taken} is in the way",
                "it appeared meanwhile, and files of yours are never overwritten",
                "Move it away, then run the same command again.",
            )
        self.record(step, record)
        for part, final in files:
            publish(part, final)

    def known_hash(self, path: Path) -> str | None:
        """The hash recorded for ``path``, if the file still carries the stamp it had then."""
        entry = self._hashes.get(str(path.absolute()))
        if entry is None or entry.stamp != stamp(path) or entry.changed_ns not in (0, changed_ns(path)):
            return None
        return entry.sha256

    def remember_hash(self, path: Path, at: Stamp, digest: str) -> None:
        with self._lock:
            self._hashes[str(path.absolute())] = Hashed(at, digest, changed_ns(path))
            self._save()

    def hashes(self) -> Mapping[str, Hashed]:
        """Every content hash that was ever remembered, by absolute path; the files may be gone or changed since."""
        return dict(self._hashes)

    def still_there(self, step: str, *, save: bool) -> bool:
        """Whether the files of a step are what they were: by stamp, or (a copied or restored workspace) by content.

        With ``save`` new stamps are kept, so that the content need not be read again.
        """
        record = self.get(step)
        if record is None:
            return False
        fresh: list[Output] = []
        for output in record.outputs:
            path = self.path.parent / output.name
            if not path.is_file():
                return False
            now, known = stamp(path), output.sha256 or self._hash_under(output.stamp)
            if now != output.stamp and (now.size != output.stamp.size or sha256(path) != known):
                return False
            fresh.append(replace(output, stamp=now, sha256=known))
        if save and [_written(output) for output in fresh] != [_written(output) for output in record.outputs]:
            self.record(step, replace(record, outputs=fresh))
        return True

    def _hash_under(self, at: Stamp) -> str:
        """The content of the file that carried a stamp, where it was hashed for another purpose; empty if it was not."""
        return next((hashed.sha256 for hashed in self._hashes.values() if hashed.stamp == at), "")

    def fact(self, name: str) -> str | None:
        return self._facts.get(name)

    def remember(self, **facts: str) -> None:
        with self._lock:
            if any(self._facts.get(name) != value for name, value in facts.items()):
                self._facts.update(facts)
                self._save()

    def _save(self) -> None:
        write_json(self.path, _Document(VERSION, self._steps, self._hashes, self._facts))


def _unreadable(what: str, why: str) -> InvalidDataError:
    return InvalidDataError(f"{what} cannot be read", why, "Move it away: finished files will be made again.")


def _written(output: Output) -> tuple[object, ...]:
    """An output as the journal's file has it: stamps are equal where only one of them has a sample."""
    return (*vars(output.stamp).values(), output.sha256)


def differences(record: Record, inputs: Mapping[str, str]) -> list[str]:
    """The names of the inputs that are no longer what they were, in the order of ``inputs``."""
    return _changed(record.inputs, inputs)


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names = [*now, *(name for name in before if name not in now)]
    return [name for name in names if before.get(name) != now.get(name)]


def describe_change(name: str, before: str | None, now: str | None) -> str:
    """``options: Q4_K_M -> Q4_K_M --pure``, with hashes shortened."""
    return f"{name}: {_short(before)} -> {_short(now)}"


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Every input that is no longer what it was, by name, with both values."""
    return [describe_change(name, before.get(name), now.get(name)) for name in _changed(before, now)]


def _short(value: str | None) -> str:
    if not value:
        return "none"
    return value[:19] if value.startswith("sha256:") else value


def outputs_intact(record: Record, directory: Path) -> bool:
    """Whether every output of a step is still the file it was."""
    return all(is_intact(output, directory) for output in record.outputs)


def is_intact(output: Output, directory: Path) -> bool:
    """Whether an output is still the file it was."""
    path = directory / output.name
    return path.is_file() and stamp(path) == output.stamp
