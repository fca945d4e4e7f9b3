"""Real child processes for tests: written as Python snippets, waited for with limits instead of sleeps."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable

import psutil

from imatrix_runner.process import Command


def python(code: str, *arguments: object) -> Command:
    """A command that runs ``code`` (its common indentation removed) with this interpreter."""
    return Command((sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)))


def is_running(pid: int) -> bool:
    """Whether a process still computes or waits; one that only awaits being reaped does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def eventually(condition: Callable[[], bool], *, seconds: float = 20) -> bool:
    """Whether ``condition`` becomes true within ``seconds``; returns as soon as it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
