"""The journal of a workspace: which step made which file from which inputs.

``journal.json`` holds one record per step. A record's ``inputs`` are named fingerprints (``{"model file": "sha256:…",
"options": "Q4_K_M"}``): when the same names carry the same values and the outputs still carry their stamps, the step need not
run again; when one differs, its *name* is shown to the user. The file is replaced atomically after every step.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import msgspec

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import Stamp, changed_ns, publish, read_json, remove_empty, sha256, stamp, write_json
from imatrix_runner.steps import Kind, name_in
from imatrix_runner.untrusted import UnreadableError, as_type, first_non_finite

if TYPE_CHECKING:
    from typing_extensions import Unpack

VERSION = 1

T = TypeVar("T")

_LONG = 200
"""A mix has the type of every tensor among its options."""

_THEN = " && "
"""The separator of shell commands that each need the one before; inside quotes it is text."""


@dataclass(frozen=True)
class StepOutput:
    """A file a step made, by name inside the workspace."""

    name: str
    stamp: Stamp
    sha256: str = ""


@dataclass(frozen=True)
class StepRecord:
    """One finished step. ``facts`` are values that later steps and reports use, JSON values only: each kind of step
    has a type for them, which :meth:`now` takes and :meth:`facts_as` gives back. ``command`` is the line for a shell that does
    the step again: what :func:`command_line` makes of commands."""

    inputs: dict[str, str]
    outputs: list[StepOutput]
    reason: str
    seconds: float
    finished: str
    command: str = ""
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def output(self) -> StepOutput:
        """The first or only file of the step. Raises :class:`InvalidDataError` where the journal names none."""
        if not self.outputs:
            raise _unreadable("The journal", "a step names no file that it made")
        return self.outputs[0]

    @property
    def commands(self) -> tuple[tuple[str, ...], ...]:
        """The words of each command that does the step again, one after another."""
        return commands_in(self.command)

    def facts_as(self, kind: type[T]) -> T:
        """The facts, or those among them that ``kind`` has fields for. Raises :class:`InvalidDataError` for other types."""
        try:
            return as_type(self.facts, kind, str_keys=True)
        except UnreadableError as error:
            raise _unreadable("The journal", f"the facts of a step are not what this program writes: {error}") from error

    def inputs_as(self, kind: type[T]) -> T:
        """Return the inputs as ``kind``. Raises :class:`InvalidDataError` for other types."""
        try:
            return as_type(self.inputs, kind)
        except UnreadableError as error:
            raise _unreadable("The journal", f"a step's inputs are not what this program writes: {error}") from error

    @classmethod
    def now(
        cls,
        inputs: Mapping[str, str],
        outputs: list[StepOutput],
        reason: str,
        seconds: float,
        *,
        commands: Sequence[Sequence[str]] = (),
        facts: object = None,
    ) -> StepRecord:
        """Return the record of a step that has just ended. ``commands``, run in order, repeat it; ``facts`` is a struct or a
        dataclass."""
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        plain: dict[str, Any] = msgspec.to_builtins(facts, str_keys=True) if facts is not None else {}
        return cls(dict(inputs), outputs, reason, seconds, finished, command_line(commands), plain)


def command_line(commands: Sequence[Sequence[str]]) -> str:
    """Return the shell line that runs the commands in order."""
    return _THEN.join(map(shlex.join, commands))


def commands_in(line: str) -> tuple[tuple[str, ...], ...]:
    """Split a line of :func:`command_line` into its commands; empty for a line that is not valid shell syntax."""
    commands: list[tuple[str, ...]] = []
    begun = ""
    for part in line.split(_THEN) if line else ():
        begun += part
        try:
            commands.append(tuple(shlex.split(begun)))
            begun = ""
        except ValueError:  # it was split inside a quoted word
            begun += _THEN
    return () if begun else tuple(commands)


class _Inputs(dict[str, str]):
    """A record's inputs as read from the file; looking up one that is missing raises :class:`InvalidDataError`."""

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
    steps: dict[str, StepRecord] = field(default_factory=dict)
    hashes: dict[str, Hashed] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


class WorkspaceFacts(TypedDict, total=False):
    """The facts that a journal holds in addition to its steps; all values are text.

    ``source``: what was named as the model, ``hub`` its repository and commit, ``source_at`` the same as an absolute path or a
    hub id with its revision, ``source_content`` and ``source_bytes`` what it holds; ``model_file`` is the fingerprint of the
    GGUF that levels are made from, which for a checkpoint is another file. ``levels`` were asked for by ``command``, which is
    ``finished`` or not; ``measuring`` names the ``evaluate`` at work or interrupted. ``quantized_by``, ``repo``, ``licence``,
    ``target`` (JSON) and ``min_speed`` (tokens/s) are for reports; ``described`` keeps a source's description (JSON) for when
    its files are gone, ``set_aside`` how a text was cut (JSON). ``original`` is ``released`` when the files that a model was
    converted from may be gone; ``released`` are the levels whose files were removed after they were published (JSON).
    """

    model: str
    source: str
    hub: str
    source_at: str
    source_content: str
    source_bytes: str
    model_file: str
    dequantised: str
    levels: str
    command: str
    finished: str
    measuring: str
    quantized_by: str
    repo: str
    licence: str
    target: str
    min_speed: str
    described: str
    set_aside: str
    original: str
    released: str


FactName = Literal[
    "model",
    "source",
    "hub",
    "source_at",
    "source_content",
    "source_bytes",
    "model_file",
    "dequantised",
    "levels",
    "command",
    "finished",
    "measuring",
    "quantized_by",
    "repo",
    "licence",
    "target",
    "min_speed",
    "described",
    "set_aside",
    "original",
    "released",
]
"""The names of :class:`WorkspaceFacts`."""


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

    def __getitem__(self, step: str) -> StepRecord:
        return self._steps[step]

    def get(self, step: str) -> StepRecord | None:
        return self._steps.get(step)

    def steps(self) -> Mapping[str, StepRecord]:
        return dict(self._steps)

    def of_kind(self, kind: Kind) -> Mapping[str, StepRecord]:
        """The records of all steps of a kind, by the names in their ids, in the order in which they were first finished."""
        named = ((name_in(step, kind), record) for step, record in self._steps.items())
        return {name: record for name, record in named if name is not None}

    def record(self, step: str, record: StepRecord) -> None:
        """Store the record of a step. Raises :class:`InvalidDataError` for facts with NaN or infinity: JSON has neither."""
        if place := first_non_finite(record.facts):
            raise InvalidDataError(
                f"The figures of {step} cannot be stored",
                f"{place} is NaN or infinite",
                "The model file is damaged or overflows: make it again, or choose another type.",
            )
        with self._lock:
            self._steps[step] = record
            self._save()

    def conclude(self, step: str, record: StepRecord, files: Sequence[tuple[Path, Path]]) -> None:
        """Record a step and give its files, ``(part, final)`` each, their names.

        In this order: a rename keeps the stamp, so a kill in between leaves a step to be repeated, never a file without a
        record. Earlier outputs of the step are replaced; a final name taken by any other file is refused.
        """
        root, before = self.path.parent, self.get(step)
        for output in before.outputs if before is not None else ():
            if is_intact(output, root):
                (root / output.name).unlink()
                remove_empty(root / output.name, root)
        if taken := next((final for _, final in files if final.exists()), None):
            raise InvalidDataError(
                f"{taken} is in the way",
                "it appeared during the run, and your files are never overwritten",
                "Move it away, then run the same command again.",
            )
        self.record(step, record)
        for part, final in files:
            publish(part, final)

    def finish_renames(self, step: str, folder: Path) -> bool:
        """Go on with the renames of :meth:`conclude` after a kill; ``folder``: where the files were made. Returns whether all
        files of the step have their names now. Nothing is renamed unless all are there, in one place or the other."""
        record, root = self.get(step), self.path.parent
        waiting: list[tuple[Path, Path]] = []
        for output in record.outputs if record is not None else ():
            part, final = folder / Path(output.name).name, root / output.name
            if is_intact(output, root):
                continue
            inside = final.is_relative_to(root) and ".." not in final.parts
            if final.exists() or not inside or not part.is_file() or stamp(part) != output.stamp:
                return False
            waiting.append((part, final))
        for part, final in waiting:
            publish(part, final)
        return bool(waiting)

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
        """Whether the files of a step are unchanged: by stamp, or (a copied or restored workspace) by content.

        With ``save`` the new stamp of every unchanged file is stored, even if another file changed, so that the content need
        not be read again.
        """
        record = self.get(step)
        if record is None:
            return False
        found = [self._stamped_anew(output) for output in record.outputs]
        fresh = [now or output for now, output in zip(found, record.outputs, strict=True)]
        if save and [_written(output) for output in fresh] != [_written(output) for output in record.outputs]:
            self.record(step, replace(record, outputs=fresh))
        return all(found)

    def _stamped_anew(self, output: StepOutput) -> StepOutput | None:
        """Return an output with the current stamp and hash of its file, or None if the file is gone or changed."""
        path = self.path.parent / output.name
        if not path.is_file():
            return None
        now, known = stamp(path), output.sha256 or self._hash_under(output.stamp)
        if now != output.stamp and (now.size != output.stamp.size or sha256(path) != known):
            return None
        return replace(output, stamp=now, sha256=known)

    def _hash_under(self, at: Stamp) -> str:
        """Return the known hash of the file that had this stamp; empty if it was never hashed."""
        return next((hashed.sha256 for hashed in self._hashes.values() if hashed.stamp == at), "")

    def fact(self, name: FactName) -> str | None:
        return self._facts.get(name)

    def remember(self, **facts: Unpack[WorkspaceFacts]) -> None:
        with self._lock:
            known = {name: str(value) for name, value in facts.items()}
            if any(self._facts.get(name) != value for name, value in known.items()):
                self._facts.update(known)
                self._save()

    def _save(self) -> None:
        write_json(self.path, _Document(VERSION, self._steps, self._hashes, self._facts))


def _unreadable(what: str, why: str) -> InvalidDataError:
    return InvalidDataError(f"{what} cannot be read", why, "Move it away: finished files will be made again.")


def _written(output: StepOutput) -> tuple[object, ...]:
    """Return an output as it is stored, to compare: two stamps also count as equal if only one has a sample."""
    return (*vars(output.stamp).values(), output.sha256)


def differences(record: StepRecord, inputs: Mapping[str, str]) -> list[str]:
    """Return the names of the inputs that changed, in the order of ``inputs``."""
    return _changed(record.inputs, inputs)


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names = [*now, *(name for name in before if name not in now)]
    return [name for name in names if before.get(name) != now.get(name)]


def describe_change(name: str, before: str | None, now: str | None) -> str:
    """``options: Q4_K_M -> Q4_K_M --pure``, with hashes shortened, and without the long part that both begin with."""
    return f"{name}: {' -> '.join(_differing(_short(before), _short(now)))}"


def _differing(before: str, now: str) -> tuple[str, str]:
    """Both texts; of long ones only what follows the words that they have in common, with the option that these end with."""
    if max(len(before), len(now)) <= _LONG:
        return before, now
    old, new = before.split(" "), now.split(" ")
    common = next((at for at, words in enumerate(zip(old, new, strict=False)) if words[0] != words[1]), min(len(old), len(new)))
    if common and new[common - 1].startswith("--") and common < len(new):
        common -= 1
    return (" ".join(("…", *old[common:])), " ".join(("…", *new[common:]))) if common else (before, now)


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Describe every changed input by name, with both values."""
    return [describe_change(name, before.get(name), now.get(name)) for name in _changed(before, now)]


def _short(value: str | None) -> str:
    if not value:
        return "none"
    return value[:19] if value.startswith("sha256:") else value


def outputs_intact(record: StepRecord, directory: Path) -> bool:
    """Whether every output of a step is unchanged."""
    return all(is_intact(output, directory) for output in record.outputs)


def is_intact(output: StepOutput, directory: Path) -> bool:
    """Whether the file of an output is unchanged."""
    path = directory / output.name
    return path.is_file() and stamp(path) == output.stamp
