"""Temporary folders whose names identify their process, so that those of a killed process can be removed later."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imatrix_runner.errors import from_os_error
from imatrix_runner.process import start_time

PREFIX = "imatrix-runner-"
# imatrix-runner-<machine>-<pid>-<start of that process in ms>-<random>
_NAME = re.compile(re.escape(PREFIX) + r"([0-9a-f]{8})-(\d{1,10})-(\d{1,15})-\w+")
_SAME_SECONDS = 5.0
"""The start of a process is computed from the time of boot, which moves when the clock is set."""


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder that only this user can read, in ``parent`` or the system's place for temporary files; gone at the end.

    Raises :class:`RunnerError` if it cannot be made. If it cannot be removed, it is left for :func:`remove_abandoned`.
    """
    where = parent if parent is not None else Path(tempfile.gettempdir())
    name = f"{PREFIX}{_machine()}-{os.getpid()}-{round(1000 * (start_time(os.getpid()) or 0))}-"
    try:
        folder = Path(tempfile.mkdtemp(prefix=name, dir=where))
    except OSError as error:
        raise from_os_error(error, "making a temporary folder", where) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path | None = None) -> int:
    """Remove the scratch folders in ``parent`` whose process has ended; return how many were removed.

    Folders of other users and machines (containers may share the place) are left alone, and so are those that cannot be
    removed.
    """
    removed = 0
    with suppress(OSError):
        for entry in (parent if parent is not None else Path(tempfile.gettempdir())).iterdir():
            match = _NAME.fullmatch(entry.name)
            if match is None or match[1] != _machine() or entry.is_symlink() or not _is_own(entry):
                continue
            began = start_time(int(match[2]))
            if began is None or abs(1000 * began - int(match[3])) > 1000 * _SAME_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)
                removed += 1
    return removed


def _is_own(folder: Path) -> bool:
    return not hasattr(os, "geteuid") or folder.lstat().st_uid == os.geteuid()


@functools.cache
def _machine() -> str:
    """Return an id of the scope of process numbers: this machine, and on Linux its PID namespace."""
    namespace = Path("/proc/self/ns/pid")
    number = namespace.stat().st_ino if namespace.exists() else 0
    return hashlib.sha256(f"{socket.gethostname()} {number}".encode()).hexdigest()[:8]
