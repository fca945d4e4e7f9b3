"""The journal of a batch: what was begun, finished, failed, made and removed, one JSON line each, in ``FILE.batch/``.

Lines are only appended, and their order is the order of events: no decision depends on a clock, so one that is set back changes
nothing. A line that a kill cut short is dropped. One process writes at a time; readers need no lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from imatrix_runner.batch.schedule import Stage
from imatrix_runner.errors import InvalidDataError, RunnerError, from_os_error
from imatrix_runner.files import Stamp, encode_json, open_to_continue, sync
from imatrix_runner.untrusted import UnreadableError, from_json

Role = Literal["download", "converted", "level"]
"""What a file of a batch is: downloaded, converted from that, or a level."""

_MOST_BYTES = 256 << 20
_MOST_LINE = 1 << 20


class BatchBegan(msgspec.Struct, frozen=True, tag_field="event", tag="began"):
    """A command began to work on the list. ``at`` is the time of day, for people; ``version``: of the journal's format."""

    command: str
    at: str
    version: Literal[1] = 1


class StageBegan(msgspec.Struct, frozen=True, tag_field="event", tag="stage-began"):
    """A stage of a model began. ``levels``: those that it makes or publishes. ``entry``: fingerprint of the list's entry.
    ``compute_lane``: the number of the worker that computes it, where there are several; else None."""

    model: str
    entry: str
    stage: Stage
    levels: tuple[str, ...] = ()
    compute_lane: int | None = None


class StageDone(msgspec.Struct, frozen=True, tag_field="event", tag="stage-done"):
    """A stage ended well. ``seconds`` by a clock that is never set; ``n_bytes``: what the stage had to read or send; ``names``
    of the levels that it made, which for mixes differ from the ``levels`` that were asked for."""

    model: str
    entry: str
    stage: Stage
    levels: tuple[str, ...]
    seconds: float
    n_bytes: int
    names: tuple[str, ...] = ()


class PlannedLevel(msgspec.Struct, frozen=True):
    """A level as the plan has it; ``n_bytes`` 0 where its size is not known before it is made."""

    name: str
    n_bytes: int


class ModelPrepared(msgspec.Struct, frozen=True, tag_field="event", tag="prepared"):
    """A model is on the disk and planned. ``source``: bytes of the GGUF that levels are made from; ``converted``: whether that
    was converted here; ``working``: bytes of the files of a measurement."""

    model: str
    entry: str
    workspace: str
    source: int
    converted: bool
    levels: tuple[PlannedLevel, ...]
    working: int = 0


class ThreeLines(msgspec.Struct, frozen=True):
    """The three lines of an error."""

    kind: str
    what: str
    why: str
    do: str

    @classmethod
    def of(cls, error: RunnerError) -> ThreeLines:
        return cls(error.kind, error.what, error.why, error.todo)


class LevelFailed(msgspec.Struct, frozen=True, tag_field="event", tag="level-failed"):
    """A level could not be made; the model's other levels go on."""

    model: str
    entry: str
    level: str
    error: ThreeLines


class ModelFailed(msgspec.Struct, frozen=True, tag_field="event", tag="failed"):
    """A model could go no further. The next command tries it again."""

    model: str
    entry: str
    stage: Stage | Literal["check"]
    error: ThreeLines


class ModelRetried(msgspec.Struct, frozen=True, tag_field="event", tag="retried"):
    """A model whose failure may have passed is tried again by the same command."""

    model: str
    entry: str


class ModelDone(msgspec.Struct, frozen=True, tag_field="event", tag="done"):
    """Everything that was asked for is done. ``url``: where it was published; empty if it was not."""

    model: str
    entry: str
    url: str = ""


class FileIntended(msgspec.Struct, frozen=True, tag_field="event", tag="intended"):
    """Nothing was at ``path`` when a stage began that makes a file, or a folder, there."""

    model: str
    role: Role
    path: str


class FileMade(msgspec.Struct, frozen=True, tag_field="event", tag="file"):
    """A file that this batch downloaded or made, as it was then. ``level``: as it was asked for."""

    model: str
    role: Role
    path: str
    stamp: Stamp
    level: str = ""


class FileRemoved(msgspec.Struct, frozen=True, tag_field="event", tag="removed"):
    """A file of this batch was removed."""

    model: str
    path: str


class WatchBegan(msgspec.Struct, frozen=True, tag_field="event", tag="watch-began"):
    """The first look at an owner's models. ``there``: those that it found, which are not new; ``oldest``: what was created
    before is not new either, because the listing was longer than what is read of it (empty: it was read whole)."""

    place: str
    there: tuple[str, ...]
    oldest: str = ""


class WatchLooked(msgspec.Struct, frozen=True, tag_field="event", tag="looked"):
    """A look at a place. ``at`` is the time of day, for people; ``listed``: models there; ``added``: those that were appended
    to the list; ``problem``: why it could not be looked at, empty if it could."""

    place: str
    at: str
    listed: int = 0
    added: tuple[str, ...] = ()
    problem: str = ""


BatchEvent: TypeAlias = (
    BatchBegan
    | StageBegan
    | StageDone
    | ModelPrepared
    | LevelFailed
    | ModelFailed
    | ModelRetried
    | ModelDone
    | FileIntended
    | FileMade
    | FileRemoved
    | WatchBegan
    | WatchLooked
)


@dataclass
class ModelHistory:
    """What the journal says of a model. Stages, levels and failures are those of its current entry in the list; files are all
    that the batch ever made for it and has not removed, by path."""

    entry: str = ""
    running: dict[Stage, StageBegan] = field(default_factory=dict)
    compute_lane: int | None = None
    """The one that computed it last, by this or an earlier command."""
    downloaded: bool = False
    prepared: ModelPrepared | None = None
    made: set[str] = field(default_factory=set)
    names: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    """The names of the levels that were made, by the levels that were asked for together."""
    published: set[str] = field(default_factory=set)
    failed_levels: dict[str, ThreeLines] = field(default_factory=dict)
    failure: ModelFailed | None = None
    done: ModelDone | None = None
    seconds: float = 0.0
    intended: dict[str, Role] = field(default_factory=dict)
    files: dict[str, FileMade] = field(default_factory=dict)

    def files_of(self, role: Role, level: str = "") -> list[FileMade]:
        return [file for file in [*self.files.values()] if file.role == role and level in ("", file.level)]


@dataclass
class BatchHistory:
    """The whole journal, folded. ``stages``: every finished stage, in order, from which speeds are taken. ``watched``: the
    first looks at owners; ``looks``: the last look at each place, and ``found``: how many models it has brought in all."""

    models: dict[str, ModelHistory] = field(default_factory=dict)
    stages: list[StageDone] = field(default_factory=list)
    began: BatchBegan | None = None
    begun: int = 0
    watched: dict[str, WatchBegan] = field(default_factory=dict)
    looks: dict[str, WatchLooked] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)

    def of(self, model: str) -> ModelHistory:
        return self.models.setdefault(model, ModelHistory())

    def add(self, event: BatchEvent) -> None:
        """Take in the next event."""
        if isinstance(event, BatchBegan):
            self.began = event
            self.begun += 1
            for model in self.models.values():
                model.running.clear()  # of a process that was killed
                if model.failure is not None or model.failed_levels:  # is tried again
                    model.failure, model.failed_levels, model.done = None, {}, None
            return
        if isinstance(event, WatchBegan):
            self.watched[event.place] = event
            return
        if isinstance(event, WatchLooked):
            self.looks[event.place] = event
            self.found[event.place] = self.found.get(event.place, 0) + len(event.added)
            return
        history = self.of(event.model)
        if isinstance(event, FileIntended):
            history.intended[event.path] = event.role
        elif isinstance(event, FileMade):
            history.files[event.path] = event
        elif isinstance(event, FileRemoved):
            history.files.pop(event.path, None)
            history.intended.pop(event.path, None)
        else:
            if event.entry != history.entry:
                kept = history
                history = self.models[event.model] = ModelHistory(event.entry, intended=kept.intended, files=kept.files)
            self._advance(history, event)

    def _advance(
        self,
        history: ModelHistory,
        event: StageBegan | StageDone | ModelPrepared | LevelFailed | ModelFailed | ModelRetried | ModelDone,
    ) -> None:
        if isinstance(event, StageBegan):
            history.running[event.stage] = event
            if event.compute_lane is not None:
                history.compute_lane = event.compute_lane
        elif isinstance(event, StageDone):
            self.stages.append(event)
            history.running.pop(event.stage, None)
            history.seconds += event.seconds
            history.downloaded |= event.stage == "download"
            if event.stage == "make":
                history.made |= {*event.levels}
                history.names[event.levels] = event.names
            elif event.stage == "publish":
                history.published |= {*event.levels}
        elif isinstance(event, ModelPrepared):
            history.prepared = event
        elif isinstance(event, LevelFailed):
            history.failed_levels[event.level] = event.error
        elif isinstance(event, ModelFailed):
            history.failure = event
            if event.stage != "check":
                history.running.pop(event.stage, None)
        elif isinstance(event, ModelRetried):
            history.failure = None
        else:
            history.done = event


class BatchJournal:
    """Appends events durably and keeps them folded; safe to use from several threads of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history = BatchHistory()
        self._lock = threading.Lock()
        self._file = open_to_continue(path, "opening the batch's journal")
        try:
            events, end = _events(path, self._file.read(_MOST_BYTES + 1))
        except BaseException:
            self._file.close()
            raise
        for event in events:
            self.history.add(event)
        self._file.seek(end)
        self._file.truncate()

    def append(self, *events: BatchEvent) -> None:
        with self._lock:
            try:
                for event in events:
                    self._file.write(encode_json(event) + b"\n")
                self._file.flush()
                sync(self._file.fileno())
            except OSError as error:
                raise from_os_error(error, "writing the batch's journal", self.path) from error
            for event in events:
                self.history.add(event)

    def close(self) -> None:
        self._file.close()


def read_history(path: Path) -> BatchHistory:
    """What a journal says, without writing to it. Raises :class:`InvalidDataError` for one that cannot be read."""
    history = BatchHistory()
    try:
        data = b""
        if path.exists():
            with path.open("rb") as handle:
                data = handle.read(_MOST_BYTES + 1)
    except OSError as error:
        raise from_os_error(error, "reading the batch's journal", path) from error
    for event in _events(path, data)[0]:
        history.add(event)
    return history


def _events(path: Path, data: bytes) -> tuple[list[BatchEvent], int]:
    """The events of a journal's bytes, and where its last whole line ends."""
    if len(data) > _MOST_BYTES:
        raise _unreadable(path, f"it is larger than {_MOST_BYTES >> 20} MiB")
    end = data.rfind(b"\n") + 1
    events = []
    for number, line in enumerate(data[:end].splitlines(), start=1):
        if len(line) > _MOST_LINE:
            raise _unreadable(path, f"line {number} is too long")
        try:
            events.append(_decode(line))
        except UnreadableError as error:
            raise _unreadable(path, f"line {number}: {error}") from error
    return events, end


_decode: Callable[[bytes], BatchEvent] = lambda line: from_json(line, BatchEvent)  # type: ignore[arg-type]  # noqa: E731


def _unreadable(path: Path, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{path} cannot be read",
        why,
        "Move it away: finished work is found again, but files that the batch made before are no longer removed by it.",
    )
