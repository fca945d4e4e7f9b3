"""``work/<model>/``: the paths of one model's files, and the lock that admits one writer."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from imatrix_runner.errors import InvalidDataError, RunnerError, WorkspaceLockedError, from_lock_error
from imatrix_runner.files import read_json, write_json
from imatrix_runner.process import end_tree, is_marked, start_time
from imatrix_runner.untrusted import whole_number


@dataclass(frozen=True)
class Workspace:
    """The paths of one model's folder. Nothing is created by naming them."""

    root: Path
    model: str

    @property
    def journal(self) -> Path:
        return self.root / "journal.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def parts(self) -> Path:
        """The checkpoint of an unfinished imatrix, and ranges that are not in it yet."""
        return self.root / ".imatrix-parts"

    @property
    def texts(self) -> Path:
        """The two parts of a calibration text when some of it was set aside as held-out text."""
        return self.root / "texts"

    @property
    def partial(self) -> Path:
        """Unverified levels while they are written, each in a folder."""
        return self.root / ".partial"

    @property
    def evaluation(self) -> Path:
        """Token scores, and the reference while levels are measured."""
        return self.root / ".evaluation"

    @property
    def mixes(self) -> Path:
        """Measured costs of rounding tensors, from which mixes are chosen."""
        return self.root / ".mixes"

    @property
    def covariances(self) -> Path:
        """Covariances of weights' inputs, for rounding with error feedback."""
        return self.root / ".covariances"

    def kept_recipe(self, level: str) -> Path:
        """The recipe of a mix, as it was chosen."""
        return self.mixes / f"{level}.recipe.json"

    @property
    def cost_map(self) -> Path:
        return self.root / "mix.json"

    @property
    def baselines(self) -> Path:
        """A workspace of its own for levels made without imatrix, while they are measured."""
        return self.root / ".twins"

    def ledger(self, level: str) -> Path:
        """The ledger of a finished level: how each tensor was made, so that other levels may copy it."""
        return self.root / ".ledgers" / f"{level}.jsonl"

    @property
    def imatrix(self) -> Path:
        """Where a generated imatrix goes."""
        return self.root / "imatrix.gguf"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def owner(self) -> Path:
        return self.root / ".owner.json"

    def log(self, step: str) -> Path:
        return self.logs / f"{step}.log"

    def level_file(self, level: str) -> Path:
        return self.root / f"{self.model}-{level}.gguf"

    def modelfile(self, level: str) -> Path:
        """What Ollama makes a model of the level from."""
        return self.root / f"{self.model}-{level}.Modelfile"

    def name_of(self, path: Path) -> str:
        """Return a file's name in the journal: relative if it is in the workspace, so that the folder can be moved."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def find_imatrix(self) -> Path | None:
        """Return the imatrix of the workspace, by the documented order of names. Its content, not its name, decides the
        format."""
        names = ("imatrix.dat", "imatrix.gguf", f"{self.model}.imatrix", f"{self.model}-imatrix.gguf")
        return next((self.root / name for name in names if (self.root / name).is_file()), None)


@dataclass(frozen=True)
class Owner:
    """Who holds a workspace. A process is the same only if its start time is: pids are reused.

    ``workspace`` is the identity of the folder that is held (:func:`identity`): in a copy of that folder the file is ignored.
    """

    pid: int
    created: float
    host: str
    command: str
    started: str
    children: dict[str, float] = field(default_factory=dict)
    workspace: str = ""

    @property
    def alive(self) -> bool:
        return self.host == socket.gethostname() and start_time(self.pid) == self.created


def identity(workspace: Workspace) -> str:
    """Return an id that a copy of this folder does not share, and that survives renaming."""
    status = workspace.root.stat()
    return f"{status.st_dev:x}:{status.st_ino:x}"


def read_owner(workspace: Workspace) -> Owner | None:
    """Return the last recorded owner, which may have died; None if there is none, if the file cannot be read, or if it came
    with a copy of another workspace."""
    try:
        owner = read_json(workspace.owner, Owner, limit=1 << 20) if workspace.owner.exists() else None
    except RunnerError:
        return None  # torn by a dying machine; it only serves to name the holder
    return owner if owner is not None and owner.workspace in ("", identity(workspace)) else None


class Hold:
    """A held workspace; records its running children in the owner file, so that a successor can end orphans.

    ``mark`` is in those children's environment: a number in a file alone must not end a process.
    """

    def __init__(self, workspace: Workspace, owner: Owner, orphans: int) -> None:
        self.mark = owner.workspace
        self._workspace, self._owner = workspace, owner
        self._lock = threading.Lock()
        self.orphans = orphans

    def on_child(self, pid: int, alive: bool) -> None:
        with self._lock:
            children = {key: value for key, value in self._owner.children.items() if key != str(pid)}
            if alive and (created := start_time(pid)) is not None:
                children[str(pid)] = created
            self._owner = replace(self._owner, children=children)
            write_json(self._workspace.owner, self._owner)


@contextmanager
def hold(workspace: Workspace, command: str) -> Iterator[Hold]:
    """Hold a workspace as its only writer. The kernel releases a dead owner's lock; the children it left running are ended.

    Raises :class:`WorkspaceLockedError` if a live process holds it.
    """
    try:
        workspace.root.mkdir(parents=True, exist_ok=True)
        _refuse_links(workspace)
        lock = FileLock(workspace.lock)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise _locked(workspace) from error
    except (OSError, NotImplementedError) as error:
        raise from_lock_error(error, "opening the workspace", workspace.root) from error
    try:
        before = read_owner(workspace)
        mark = identity(workspace)
        orphans = _end_orphans(before, mark) if before is not None else 0
        owner = Owner(
            os.getpid(),
            start_time(os.getpid()) or 0.0,
            socket.gethostname(),
            command,
            time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            workspace=mark,
        )
        write_json(workspace.owner, owner)
        yield Hold(workspace, owner, orphans)
    finally:
        workspace.owner.unlink(missing_ok=True)
        lock.release()


def _refuse_links(workspace: Workspace) -> None:
    """Raise :class:`InvalidDataError` for a link to a file where logs, unfinished files or notes are written. A workspace may
    come out of an archive, and what is appended to its log would end up in the user's file. Links to folders are allowed:
    only files with the workspace's own names are made in them."""
    for folder, folders, files in os.walk(workspace.root):
        if Path(folder) == workspace.root:
            folders[:] = [name for name in folders if name.startswith(".") or name == workspace.logs.name]
            files = [name for name in files if name.startswith(".")]
        for link in (Path(folder, name) for name in files if Path(folder, name).is_symlink()):
            raise InvalidDataError(
                "A symbolic link lies where the workspace is written",
                f"{link} leads to {os.readlink(link)}, and that file would be changed",  # noqa: PTH115 - as it is written
                "Remove it, and look for others if the workspace came from elsewhere; then run the same command again.",
            )


def _end_orphans(owner: Owner, mark: str) -> int:
    """End the children of a dead owner that still run. The file may come from anywhere, so each must also carry the mark of
    this workspace, which only a program that was started for it does."""
    if owner.host != socket.gethostname():
        return 0
    children = [(whole_number(pid), created) for pid, created in owner.children.items()]
    orphans = [pid for pid, created in children if pid is not None and start_time(pid) == created and is_marked(pid, mark)]
    for pid in orphans:
        end_tree(pid)
    return len(orphans)


def _locked(workspace: Workspace) -> WorkspaceLockedError:
    owner = read_owner(workspace)
    who = f"process {owner.pid} on {owner.host} since {owner.started}: {owner.command}" if owner else "another process"
    return WorkspaceLockedError(
        f"The workspace {workspace.root} is in use",
        f"{who} is writing to it",
        "Wait until it ends (imatrix-runner status shows it), or use another --work-dir.",
    )
