"""Errors a user can act on.

Every error of ours says three things, each a sentence: *what* happened, *why*, and what to *do* about it (often the next
command to type). The class decides the process's exit code; the codes are a contract (README, "Exit codes").
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import ClassVar


class RunnerError(Exception):
    """Base of all expected failures; shown as three lines, never as a traceback."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(self, what: str, why: str, todo: str) -> None:
        super().__init__(what, why, todo)
        self.what = what
        self.why = why
        self.todo = todo

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"

    def sentence(self) -> str:
        """All of it on one line; a part that is empty leaves no mark."""
        return ". ".join(filter(None, ("; ".join(filter(None, (self.what, self.why))), self.todo)))


class UsageError(RunnerError):
    """The request itself is wrong: an unknown level, options that exclude each other."""

    exit_code = 2
    kind = "usage"


class ToolchainError(RunnerError):
    """llama.cpp's binaries, or an engine, are missing, do not run or could not be built."""

    exit_code = 3
    kind = "toolchain"


class DownloadError(RunnerError):
    """The network or a hub did not give what was asked for."""

    exit_code = 4
    kind = "download"


class EngineError(RunnerError):
    """A child process failed, died or hung while computing."""

    exit_code = 5
    kind = "engine"


class InvalidDataError(RunnerError):
    """An input or an output is not what it must be: wrong format, wrong model, damaged, unwritable."""

    exit_code = 6
    kind = "invalid-data"


class WorkspaceLockedError(RunnerError):
    """Another live process is writing to the workspace."""

    exit_code = 7
    kind = "locked"


class NoSpaceError(RunnerError):
    """The file system is, or would become, full."""

    exit_code = 8
    kind = "no-space"


class SomeLevelsFailedError(RunnerError):
    """The run is over; some levels are there, others failed."""

    exit_code = 100
    kind = "some-levels-failed"


class InterruptedRunError(RunnerError):
    """A signal ended the run; what was finished is kept and the same command continues."""

    exit_code = 130
    kind = "interrupted"


_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def from_os_error(error: OSError, doing: str, path: Path | str | None = None) -> RunnerError:
    """Translate an ``OSError`` met while ``doing`` something (a gerund phrase) into an error of ours.

    A full disk or quota becomes :class:`NoSpaceError`, everything else :class:`InvalidDataError`.
    """
    where = path if path is not None else error.filename
    reason = error.strerror or str(error)
    at = f"{where}: {reason}" if where else reason
    if error.errno in _FULL:
        return NoSpaceError(
            f"The disk is full while {doing}",
            at,
            "Free some space, or choose another disk with --work-dir, then run the same command again: it continues.",
        )
    if error.errno in _FORBIDDEN:
        return InvalidDataError(
            f"No permission while {doing}",
            at,
            "Check the owner and the mode of that path, or choose a writable place with --work-dir.",
        )
    return InvalidDataError(
        f"The file system refused while {doing}", at, "Check that the path exists and the disk is healthy, then try again."
    )
