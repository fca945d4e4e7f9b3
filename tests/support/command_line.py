"""The real command line in processes of its own, and what may befall them.

They are forked from one that has imported everything (:mod:`support.forked`), unless a test asks for :data:`PROGRAM`, the start
that users know.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from support.children import eventually, is_running
from support.forked import Forked

PROGRAM = (sys.executable, "-m", "imatrix_runner")
_OURS = ("IMATRIX_RUNNER_CACHE", "IMATRIX_RUNNER_LLAMA_CPP")


@dataclass(frozen=True)
class Ran:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.out)
        return document


RunCommand = Callable[..., Ran]
"""What the fixture ``runner`` gives: arguments as typed, ``env``, ``cwd``, ``seconds`` and ``program`` by name."""


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without any setting, token or hub of the developer's, plus ``extra``."""
    strange = ("IMATRIX_RUNNER_", "LLAMA_", "HF_", "HUGGING")
    kept = {name: value for name, value in os.environ.items() if name in _OURS or not name.startswith(strange)}
    # llama.cpp's bare programs would fork a debugger on an assertion, and leave it hanging.
    return {"GGML_NO_BACKTRACE": "1", **kept, **(extra or {})}


def each_tenth(turn: int) -> tuple[str, ...] | None:
    """The ``program`` for one of many starts: of ten, one is real and the others are forks."""
    return PROGRAM if turn % 10 == 0 else None


def run_command(
    *arguments: str | Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    seconds: float = 300,
    program: tuple[str, ...] | None = None,
    dies_after: int | None = None,
) -> Ran:
    """Run ``imatrix-runner ARGUMENTS`` to its end. Fails if it takes longer than ``seconds``."""
    with started(*arguments, cwd=cwd, env=env, program=program, dies_after=dies_after) as running:
        return running.finish(seconds)


class Process(Protocol):
    """What is used of :class:`subprocess.Popen`."""

    pid: int

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...
    def communicate(self, *, timeout: float | None = None) -> tuple[bytes, bytes]: ...


class Running:
    """A command line that is running, in a session of its own."""

    def __init__(self, process: Process) -> None:
        self.process = process

    @property
    def pid(self) -> int:
        return self.process.pid

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def finish(self, seconds: float = 120) -> Ran:
        out, err = self.process.communicate(timeout=seconds)
        assert self.process.returncode is not None
        return Ran(self.process.returncode, out.decode(), err.decode())

    def wait_for(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Wait until ``condition`` holds while the command runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended first: {self.finish()}"
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.002)

    def kill_alone(self) -> list[psutil.Process]:
        """SIGKILL to the command itself; its children, who live on, are returned."""
        children = self.descendants()
        self.process.kill()
        self.process.wait()
        return children

    def kill_tree(self) -> bool:
        """SIGKILL to the command and all it started, at one moment; false if it had ended before."""
        if self.process.poll() is not None:
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGSTOP)  # so that it cannot start another while we look
        family = self.descendants()
        for process in (*family, self.process):
            process.kill()
        self.process.wait()
        wait_gone(family)
        return self.process.returncode == -signal.SIGKILL


@contextmanager
def started(
    *arguments: str | Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    program: tuple[str, ...] | None = None,
    dies_after: int | None = None,
) -> Iterator[Running]:
    """Start ``imatrix-runner ARGUMENTS``; whatever is left of it at the end is killed. It is a fork, or what ``program`` says.
    ``dies_after``: a fork is killed by SIGKILL right after it renamed its file of this number."""
    words, surroundings = tuple(map(str, arguments)), clean_environment(env)
    if program is None:
        # A fork's interpreter has read its own settings long ago.
        assert not any(name.startswith("PYTHON") for name in env or ())
        forked = Forked(words, cwd=cwd, env=surroundings, dies_after=dies_after)
        with closing(forked), _ended(Running(forked)) as running:
            yield running
        return
    assert dies_after is None
    with (
        subprocess.Popen(
            [*program, *words],
            cwd=cwd,
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process,
        _ended(Running(process)) as running,
    ):
        yield running


@contextmanager
def _ended(running: Running) -> Iterator[Running]:
    try:
        yield running
    finally:
        running.kill_tree()


def wait_gone(processes: list[psutil.Process]) -> None:
    """Wait until processes are over."""
    assert eventually(lambda: not any(is_running(process.pid) for process in processes)), f"{processes} are still there"
