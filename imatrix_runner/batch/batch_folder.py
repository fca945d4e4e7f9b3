"""``FILE.batch/``, next to a list: its paths, the lock that admits one process, and what is appended to the list."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from imatrix_runner.errors import RunnerError, WorkspaceLockedError, from_lock_error, from_os_error
from imatrix_runner.files import encode_json, read_json, sync, write_json
from imatrix_runner.process import start_time


@dataclass(frozen=True)
class BatchFolder:
    """``FILE.batch/``, next to the list: the paths of one batch. Nothing is created by naming them."""

    root: Path

    @classmethod
    def of(cls, list_file: Path) -> BatchFolder:
        return cls(list_file.with_name(list_file.name + ".batch"))

    @property
    def journal(self) -> Path:
        return self.root / "journal.jsonl"

    @property
    def additions(self) -> Path:
        """What ``batch add`` appended to the list."""
        return self.root / "added.jsonl"

    @property
    def downloads(self) -> Path:
        """A hub's cache with what the batch downloaded."""
        return self.root / "downloads"

    @property
    def page(self) -> Path:
        return self.root / "batch.html"

    @property
    def state(self) -> Path:
        """What the page shows, as JSON, for ``batch status``."""
        return self.root / "state.json"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def owner(self) -> Path:
        return self.root / ".owner.json"

    @property
    def addition_lock(self) -> Path:
        return self.root / ".adding"


class BatchOwner(msgspec.Struct, frozen=True):
    """The process that works on a list. It is the same process only if its start time is."""

    pid: int
    created: float
    host: str
    command: str


def running_owner(folder: BatchFolder) -> BatchOwner | None:
    """The process that works on the list now; None if none does."""
    try:
        owner = read_json(folder.owner, BatchOwner, limit=1 << 20) if folder.owner.exists() else None
    except RunnerError:
        return None  # torn by a dying machine; it only serves to name the holder
    alive = owner is not None and owner.host == socket.gethostname() and start_time(owner.pid) == owner.created
    return owner if alive else None


@contextmanager
def hold_batch(folder: BatchFolder, command: str) -> Iterator[None]:
    """Hold a batch as the only process that works on it. Raises :class:`WorkspaceLockedError` if another one does."""
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.lock)
        lock.acquire(blocking=False)
    except Timeout as error:
        owner = running_owner(folder)
        who = f"process {owner.pid} runs: {owner.command}" if owner is not None else "another process works on it"
        raise WorkspaceLockedError(
            "This batch is running already",
            who,
            "Append models with: imatrix-runner batch add; see how far it is with: imatrix-runner batch status.",
        ) from error
    except (OSError, NotImplementedError) as error:
        raise from_lock_error(error, "opening the batch's folder", folder.root) from error
    try:
        write_json(folder.owner, BatchOwner(os.getpid(), start_time(os.getpid()) or 0.0, socket.gethostname(), command))
        yield
    finally:
        folder.owner.unlink(missing_ok=True)
        lock.release()


def append_addition(folder: BatchFolder, entries: Sequence[object]) -> None:
    """Append entries to the list of a batch, whether it runs or not; whole lines at a time."""
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.addition_lock, timeout=10), folder.additions.open("ab+") as handle:
            handle.seek(0, os.SEEK_END)
            if handle.tell():
                handle.seek(-1, os.SEEK_END)
                torn = handle.read(1) != b"\n"
                handle.seek(0, os.SEEK_END)
                handle.write(b"\n" if torn else b"")
            handle.write(b"".join(encode_json(entry) + b"\n" for entry in entries))
            handle.flush()
            sync(handle.fileno())
    except (OSError, Timeout) as error:
        failure = error if isinstance(error, OSError) else OSError(str(error))
        raise from_os_error(failure, "appending to the batch's list", folder.additions) from error
