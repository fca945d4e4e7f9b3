"""The worker on a machine of the cluster: does units of work with an engine of its own, in child processes.

It runs inside a process of Ray's, and knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from imatrix_runner.cluster.node_facts import NodeFacts
from imatrix_runner.cluster.shared_files import AbsentFileError, SharedFile
from imatrix_runner.engines.embedded.bindings import UnusableBindings, find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.errors import InterruptedRunError, RunnerError, from_os_error
from imatrix_runner.events import ignore
from imatrix_runner.models.hub import fetch_model, hub_id_in_cache
from imatrix_runner.models.model import HubId
from imatrix_runner.process import Runner
from imatrix_runner.scratch import remove_abandoned, scratch_folder
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.store import cache_dir


class Standing(Protocol):
    """A worker's side of a task, kept between its units, so that a model is loaded once."""

    def run(self, number: int) -> Any:
        """Do one unit and return its result. Two may run at once, in threads. Raises :class:`RunnerError`."""
        ...

    def close(self) -> None:
        """End children; nothing else is asked for afterwards."""
        ...


class Task(Protocol):
    """Work in units that are known by number; sent to every worker."""

    def open(self, node: Node) -> Standing: ...


@dataclass(frozen=True)
class Problem:
    """A unit that could not be done: the parts of the error, and its exit code."""

    exit_code: int
    what: str
    why: str
    todo: str
    host: str

    @classmethod
    def of(cls, error: RunnerError) -> Problem:
        return cls(error.exit_code, error.what, error.why, error.todo, socket.gethostname())


@dataclass(frozen=True)
class Stopped:
    """A unit that was ended by a request to stop."""


@dataclass(frozen=True)
class Absent:
    """A unit that could not be begun because a file is not on the machine, and ``why`` nothing else brought it there."""

    file: SharedFile
    why: str


@dataclass(frozen=True)
class ResultInFile:
    """A result with a file in the worker's scratch folder. The driver fetches it in blocks; then it is removed."""

    value: Any
    path: Path
    size: int


@dataclass
class Node:
    """What a task may use on this machine: ``threads`` to compute with, an empty folder ``scratch``."""

    engine: EmbeddedEngine
    scratch: Path
    threads: int
    shares: bool
    stop: Stop
    partial: dict[int, float] = field(default_factory=dict)

    def local(self, file: SharedFile) -> Path:
        """Where a file of the driver's is here. Raises :class:`AbsentFileError` if it is not."""
        sent = self._sent(file)
        if sent.is_file():
            return sent
        if self.shares and file.is_at(file.path):
            return file.path
        if (hub_id := hub_id_in_cache(file.path)) is not None:
            return self._fetched(file, hub_id)
        raise AbsentFileError(file)

    def _fetched(self, file: SharedFile, hub_id: HubId) -> Path:
        """The same file from the hub, in this machine's own cache. Raises :class:`AbsentFileError` if it cannot be had."""
        try:
            paths = fetch_model(hub_id, stop=self.stop, sink=ignore).files
        except InterruptedRunError:
            raise
        except RunnerError as error:
            raise AbsentFileError(file, f"the hub: {error}") from error
        found = next((path for path in paths if path.name == file.path.name and file.is_at(path)), None)
        if found is None:
            raise AbsentFileError(file, f"the hub's {hub_id} is another file")
        return found

    def locals(self, files: Sequence[SharedFile]) -> list[Path]:
        """Where files of one folder are here, together. Raises :class:`AbsentFileError` for one that is not, or not there."""
        found = [self.local(file) for file in files]
        if len({path.parent for path in found}) > 1:
            raise AbsentFileError(next(file for file, path in zip(files, found, strict=True) if path == file.path))
        return found

    def note(self, number: int, done: float) -> None:
        """Keep how much of a unit is done, in the unit's own measure, for :meth:`NodeWorker.news`."""
        self.partial[number] = done

    def receive(self, file: SharedFile, place: int, block: bytes) -> None:
        """Take a block of a file that the driver sends, and give the file its name after the last."""
        final = self._sent(file)
        part = final.with_name(f"{final.name}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("r+b" if place else "wb") as handle:
                handle.seek(place)
                handle.write(block)
            if place + len(block) >= file.size:
                if not file.is_at(part):
                    raise AbsentFileError(file)
                part.replace(final)
        except OSError as error:
            raise from_os_error(error, f"receiving {file.path.name}", part) from error

    def _sent(self, file: SharedFile) -> Path:
        """The file keeps its name, which ends up in metadata, and its neighbours."""
        key = hashlib.sha256(f"{file.nonce} {file.path.parent}".encode()).hexdigest()[:16]
        return self.scratch / "files" / key / file.path.name


class NodeWorker:
    """One worker. Ray calls its methods; :meth:`compute` in two threads, the others in threads of their own."""

    def __init__(self, threads: int, shares: bool) -> None:
        """``shares``: a file at the driver's path may be taken for the driver's."""
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to the number of processors that the worker asked for
        remove_abandoned()
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._scratch = self._stack.enter_context(scratch_folder())
        self._threads, self._shares = threads, shares
        self._stop = Stop()
        self._node: Node | None = None
        self._standing: tuple[str, Standing] | None = None

    def facts(self) -> NodeFacts:
        """Prove the machine's library and tell what it is."""
        try:
            bindings = find(os.environ, cache_dir())
        except UnusableBindings as unusable:
            return NodeFacts.unusable(unusable.why)
        engine = EmbeddedEngine(bindings, Runner(self._stop), cache_dir())
        self._node = Node(engine, self._scratch, self._threads, self._shares, self._stop)
        return NodeFacts.of(engine)

    def compute(self, key: str, task: Task, number: int) -> Any:
        """Do one unit of the task ``key``; returns its result, :class:`Absent`, :class:`Stopped` or a :class:`Problem`."""
        try:
            self._stop.check()
            return self._open(key, task).run(number)
        except AbsentFileError as absent:
            return Absent(absent.file, absent.why)
        except InterruptedRunError:
            return Stopped()
        except RunnerError as error:
            self._close()  # its children may have ended; the next unit begins anew
            return Problem.of(error)
        finally:
            if self._node is not None:
                self._node.partial.pop(number, None)

    def receive(self, file: SharedFile, place: int, block: bytes) -> Problem | None:
        """Take a block of a file; see :meth:`Node.receive`."""
        try:
            self._required().receive(file, place, block)
        except RunnerError as error:
            return Problem.of(error)
        return None

    def fetch(self, file: ResultInFile, place: int, size: int) -> bytes | Problem:
        """Some bytes of a result's file, which is removed with the last of them."""
        try:
            with file.path.open("rb", buffering=0) as handle:
                handle.seek(place)
                block = handle.read(size)
            if place + size >= file.size:
                file.path.unlink()
        except OSError as error:
            return Problem.of(from_os_error(error, f"reading {file.path.name}", file.path))
        return block

    def news(self) -> dict[int, float]:
        """How much of each unit in work is done, in the unit's own measure."""
        return dict(self._node.partial) if self._node is not None else {}

    def stop(self) -> None:
        """Let the units in work end at their next batch."""
        self._stop.request()

    def finish(self) -> None:
        """End children and remove what was written outside shared folders."""
        self._stop.request()
        self._close()
        self._stack.close()

    def _required(self) -> Node:
        if self._node is None:  # after a restart
            self.facts()
        if self._node is None:
            raise RunnerError("The worker cannot compute", "its library was not proven", "See: imatrix-runner doctor")
        return self._node

    def _open(self, key: str, task: Task) -> Standing:
        with self._lock:
            if self._standing is None or self._standing[0] != key:
                if self._standing is not None:
                    self._standing[1].close()
                    self._standing = None
                self._standing = (key, task.open(self._required()))
            return self._standing[1]

    def _close(self) -> None:
        with self._lock:
            if self._standing is not None:
                self._standing[1].close()
                self._standing = None
