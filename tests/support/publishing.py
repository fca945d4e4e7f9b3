"""A finished workspace to publish, and what a loopback hub holds afterwards."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

from imatrix_runner.journal import Journal
from imatrix_runner.workspace import Workspace
from support.children import eventually, is_running
from support.command_line import Ran, Running, started
from support.hub_repository import Repository
from support.hub_server import HubServer, Request

TO = "me/Tiny-GGUF"
TOKEN = "hf_" + "x" * 34
LEVELS = ("Q8_0", "Q4_K_M")
RUN = ("--levels", ",".join(LEVELS), "-c", "128", "--chunks", "4", "-t", "1")


def environment(hub: HubServer) -> dict[str, str]:
    """For a command that publishes to the hub."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


def published(hub: HubServer, repo: str = TO) -> Repository:
    found = hub.find(repo)
    assert found is not None
    return found


def contents(repository: Repository) -> dict[str, str]:
    """The hash of every file that was uploaded, by name."""
    names = [name for name in repository.files if name != ".gitattributes"]
    return {name: hashlib.sha256(repository.content(name)).hexdigest() for name in sorted(names)}


def expected(workspace: Workspace) -> dict[str, str]:
    """The hashes of levels and imatrix, by name, as they are in the workspace."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in workspace.root.glob("*.gguf")}


def titles(repository: Repository) -> list[str]:
    return [commit.title for commit in repository.commits]


def stored_once(hub: HubServer) -> bool:
    """Whether every large file arrived once."""
    return len(hub.uploads.stored) == len({*hub.uploads.stored})


def finished_levels(workspace: Workspace) -> Mapping[str, Path]:
    journal = Journal(workspace.journal)
    return {name: workspace.root / record.output.name for name, record in journal.of_kind("level").items()}


class Killer:
    """Ends a publishing command by SIGKILL at one of the requests that its hub sees.

    Points are counted from 0: for each request one when it comes, which is then dropped, and one when it was done and not yet
    answered. ``commands``: what to kill, set once it runs. ``seen`` counts points, for as long as none is killed.
    """

    def __init__(self, hub: HubServer, point: int | None = None) -> None:
        self.point, self.seen = point, 0
        self.running: Running | None = None
        self._started = threading.Event()
        self._lock = threading.Lock()
        hub.on_request = self

    def watch(self, running: Running) -> None:
        self.running = running
        self._started.set()

    def __call__(self, _request: Request, _done: bool) -> bool:
        with self._lock:
            at, self.seen = self.seen, self.seen + 1
            if at != self.point:
                return True
            assert self._started.wait(60)
            assert self.running is not None
            os.kill(self.running.pid, signal.SIGKILL)
            assert eventually(lambda: not is_running(self.running.pid))  # type: ignore[union-attr]
            return False


def publish_and_kill(hub: HubServer, workspace: Workspace, folder: Path, point: int | None) -> tuple[Ran | None, int]:
    """``publish``, killed at a point; how it ended if it was not, and how many points it had."""
    return run_and_kill(hub, ("publish", workspace.root, "--to", TO, "-q"), folder, point)


def run_and_kill(hub: HubServer, words: tuple[str | Path, ...], folder: Path, point: int | None) -> tuple[Ran | None, int]:
    """The same for any command."""
    killer = Killer(hub, point)
    with started(*words, cwd=folder, env=environment(hub)) as running:
        killer.watch(running)
        if point is None:
            return running.finish(), killer.seen
        code = running.process.wait(120)
        return (None if code == -signal.SIGKILL else running.finish()), killer.seen
