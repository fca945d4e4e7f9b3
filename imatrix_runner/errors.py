"""Errors a user can act on.

Every :class:`RunnerError` says three things, each a sentence: *what* happened, *why*, and what to *do* about it (often the next
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
        # The text may quote a name from a file, which could hold control characters for a terminal or break a document.
        self.what, self.why, self.todo = (_shown(text) for text in (what, why, todo))
        super().__init__(self.what, self.why, self.todo)

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"

    def sentence(self) -> str:
        """Return the three parts on one line, without empty ones."""
        return ". ".join(filter(None, ("; ".join(filter(None, (self.what, self.why))), self.todo)))


def _shown(text: str) -> str:
    """Return the text without control characters and lone surrogates; line breaks stay."""
    return text if text.isprintable() else "".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in text)


class UsageError(RunnerError):
    """The request itself is wrong: an unknown level, options that exclude each other."""

    exit_code = 2
    kind = "usage"


class ToolchainError(RunnerError):
    """llama.cpp's binaries, or an engine, are missing, do not run or could not be built."""

    exit_code = 3
    kind = "toolchain"


class DownloadError(RunnerError):
    """The network or a hub did not deliver what was requested."""

    exit_code = 4
    kind = "download"


class UploadError(RunnerError):
    """A hub did not take what was to be published."""

    exit_code = 4
    kind = "upload"


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
    """The run finished; some levels were made, others failed."""

    exit_code = 100
    kind = "some-levels-failed"


class InterruptedRunError(RunnerError):
    """A signal ended the run; what was finished is kept and the same command continues."""

    exit_code = 130
    kind = "interrupted"


_CONTINUES = "then run the same command again: it continues."
_UNLOCKABLE = ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP")

# errno's name -> class, what happened ("… while doing"), and what to do.
_KNOWN: tuple[tuple[tuple[str, ...], type[RunnerError], str, str], ...] = (
    (
        ("ENOSPC",),
        NoSpaceError,
        "The disk is full",
        f"Free some space, or choose another disk with --work-dir, {_CONTINUES}",
    ),
    (
        ("EDQUOT",),
        NoSpaceError,
        "The disk quota is used up",
        f"Remove files, ask for a larger quota, or choose another disk with --work-dir, {_CONTINUES}",
    ),
    (
        ("EACCES", "EPERM"),
        InvalidDataError,
        "No permission",
        "Check the owner and the mode of that path, or choose a writable place with --work-dir.",
    ),
    (
        ("EROFS",),
        InvalidDataError,
        "The file system is read-only",
        "Mount it for writing (a damaged disk is often mounted read-only), or choose a writable place with --work-dir.",
    ),
    (
        ("EFBIG",),
        InvalidDataError,
        "The file is too large for this file system",
        "Choose another disk with --work-dir (FAT32 holds 4 GiB per file), or raise the limit that `ulimit -f` shows.",
    ),
    (
        ("ENAMETOOLONG",),
        InvalidDataError,
        "The name is too long for this file system",
        "Give the model's file or folder a shorter name, or choose a shorter path with --work-dir.",
    ),
    (
        ("EIO", "ENXIO", "EREMOTEIO"),
        InvalidDataError,
        "The disk reported an input/output error",
        f"Check the disk and the system's log, or choose another disk with --work-dir, {_CONTINUES}",
    ),
    (
        ("ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN"),
        InvalidDataError,
        "The network file system lost the connection or the file",
        f"Mount it again, {_CONTINUES}",
    ),
    (
        ("EMFILE", "ENFILE"),
        InvalidDataError,
        "Too many files are open",
        f"Raise the limit that `ulimit -n` shows, or close other programs, {_CONTINUES}",
    ),
    (
        ("ELOOP",),
        InvalidDataError,
        "A symbolic link is in the way",
        "Remove the link, or choose another place with --work-dir.",
    ),
    (
        ("ENOLCK",),
        InvalidDataError,
        "The file system cannot lock files",
        "Choose a local disk with --work-dir (for the cache: IMATRIX_RUNNER_CACHE), or mount it with locks (NFS: rpc.statd).",
    ),
)
_BY_NUMBER = {getattr(errno, name): entry for entry in _KNOWN for name in entry[0] if hasattr(errno, name)}


def from_os_error(error: OSError, doing: str, path: Path | str | None = None) -> RunnerError:
    """Translate an ``OSError`` raised while ``doing`` something (a gerund phrase) into a :class:`RunnerError`.

    A full disk or a used-up quota becomes :class:`NoSpaceError`, everything else :class:`InvalidDataError`.
    """
    where = path if path is not None else error.filename
    reason = error.strerror or str(error)
    at = f"{where}: {reason}" if where else reason
    if error.errno in _BY_NUMBER:
        _, kind, what, todo = _BY_NUMBER[error.errno]
        return kind(f"{what} while {doing}", at, todo)
    return InvalidDataError(
        f"The file system refused while {doing}", at, "Check that the path exists and the disk is healthy, then try again."
    )


def from_lock_error(error: OSError | NotImplementedError, doing: str, path: Path) -> RunnerError:
    """The same for taking a lock; "not supported" then refers to the locking."""
    number = error.errno if isinstance(error, OSError) else errno.ENOSYS
    if number in {getattr(errno, name) for name in _UNLOCKABLE if hasattr(errno, name)}:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return from_os_error(OSError(errno.ENOLCK, reason), doing, path)
    assert isinstance(error, OSError)
    return from_os_error(error, doing, path)
