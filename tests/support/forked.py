"""The command line in processes that are forked, from one that has imported all of it.

A start is half a second of imports, which most tests are not about. Python's own fork server (:mod:`multiprocessing`) imports
once for each process that runs tests. What a fork starts in turn, a worker or a program of llama.cpp, is started for real.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

import imatrix_runner

_SERVER = get_context("forkserver")
_OURS = (module.name for module in pkgutil.walk_packages(imatrix_runner.__path__, "imatrix_runner."))
_SERVER.set_forkserver_preload(["gguf", *(name for name in _OURS if not name.endswith("__main__"))])


class Forked:
    """``imatrix-runner ARGUMENTS`` in a fork with a session, a directory and an environment of its own, and no input.

    What tests need of :class:`subprocess.Popen`, under the same names. ``dies_after``: SIGKILL ends it right after it renamed
    its file of this number (:func:`_die_after`).
    """

    def __init__(self, arguments: tuple[str, ...], *, cwd: Path, env: Mapping[str, str], dies_after: int | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="imatrix-runner-forked-")
        self._outputs = [Path(self._folder.name, name) for name in ("out", "err")]
        self._process = _SERVER.Process(target=_run, args=(arguments, cwd, dict(env), self._outputs, dies_after))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return self._process.exitcode

    def communicate(self, *, timeout: float | None = None) -> tuple[bytes, bytes]:
        self.wait(timeout)
        out, err = (path.read_bytes() for path in self._outputs)
        return out, err

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """After its end: forget what it printed."""
        self._process.close()
        self._folder.cleanup()


def _run(arguments: tuple[str, ...], cwd: Path, env: Mapping[str, str], outputs: list[Path], dies_after: int | None) -> None:
    """In the fork."""
    from imatrix_runner.cli.main import main

    os.setsid()
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if dies_after is not None:
        _die_after(dies_after)
    main(arguments)


def _die_after(count: int) -> None:
    """Have SIGKILL end this process right after it renamed its file of this number.

    Everything that lasts is a rename (of the journal, of a finished file), so the moments between two renames are all the
    states that a kill can leave behind. Counted are renames below the current directory, but not those of owner files: they
    serve a living process only.
    """
    done, rename, folder = 0, Path.replace, Path.cwd()

    def replace(self: Path, target: Path) -> Path:
        nonlocal done
        result = rename(self, target)
        if target.name != ".owner.json" and folder in target.parents:
            done += 1
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = replace  # type: ignore[method-assign, assignment]
