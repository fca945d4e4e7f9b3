"""The managed cache: the folders of downloads, builds and finished toolchains, and how a finished one is published.

``toolchains/<key>/`` holds ``bin/`` (executables and, next to them, their shared libraries), ``converter/`` when the source
had one, and ``toolchain.json``. It is assembled in a hidden sibling and renamed, so a key that exists is complete.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import filelock
import platformdirs

from imatrix_runner.errors import RunnerError, ToolchainError, from_lock_error, from_os_error
from imatrix_runner.events import Sink, info
from imatrix_runner.files import read_json, sync_directory, sync_file, write_json
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.probe import Rejected, Toolchain, probe

RECORD = "toolchain.json"
ORIGIN = "managed cache"
_VERSION = 1


def cache_dir(env: Mapping[str, str] | None = None) -> Path:
    """The managed cache's root: ``IMATRIX_RUNNER_CACHE``, else the user's cache directory."""
    chosen = (os.environ if env is None else env).get("IMATRIX_RUNNER_CACHE")
    return Path(chosen).absolute() if chosen else Path(platformdirs.user_cache_dir("imatrix-runner"))


@dataclass(frozen=True)
class BuildRecord:
    """The content of ``toolchain.json``: where a managed toolchain comes from and how it was made.

    ``kind``: ``sdist``, ``directory``, ``git`` or ``release``; ``sha256`` is that of the archive, if it came as one.
    """

    key: str
    kind: str
    source: str
    version: str
    commit: str
    backend: str
    date: str
    sha256: str = ""
    flags: list[str] = field(default_factory=list)
    cmake: str = ""
    compiler: str = ""
    identity: str = ""
    format: int = _VERSION


@dataclass(frozen=True)
class Store:
    """The folders of one cache root."""

    root: Path

    @property
    def downloads(self) -> Path:
        return self.root / "downloads"

    @property
    def sources(self) -> Path:
        return self.root / "sources"

    @property
    def builds(self) -> Path:
        return self.root / "builds"

    @property
    def toolchains(self) -> Path:
        return self.root / "toolchains"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def bin(self, key: str) -> Path:
        """The folder of a managed toolchain that holds its binaries (and serves ``LLAMA_CPP_LIB_PATH``)."""
        return self.toolchains / key / "bin"

    def complete(self) -> list[tuple[Path, BuildRecord]]:
        """Return the finished toolchains with a readable ``toolchain.json``, newest first."""
        found = []
        for path in self.toolchains.glob(f"[!.]*/{RECORD}"):
            try:
                found.append((path.parent, read_json(path, BuildRecord)))
            except RunnerError:
                continue  # not a managed toolchain, or damaged: it must not be used
        return sorted(found, key=lambda entry: (entry[1].date, entry[1].key), reverse=True)

    @contextmanager
    def scratch(self, folder: Path, name: str) -> Iterator[Path]:
        """Yield an empty hidden directory in ``folder``, removed at the end unless it was renamed; only under the lock.

        A directory that a killed run left under that name is removed first.
        """
        path = folder / f".{name}.part"
        try:
            if path.exists():
                shutil.rmtree(path)
            path.mkdir(parents=True)
        except OSError as error:
            raise from_os_error(error, "preparing the tool cache", path) from error
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def locked(self, name: str, stop: Stop, sink: Sink) -> Iterator[None]:
        """Hold the cache's lock ``name``; while another process has it, say so once and wait (a stop ends the wait)."""
        path = self.root / f"{name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                sink(info(f"Another imatrix-runner is at work in {self.root}; waiting for it to finish."))
                while not lock.is_locked:
                    stop.check()
                    try:
                        lock.acquire(timeout=0.5)
                    except filelock.Timeout:
                        continue
        except (OSError, NotImplementedError) as error:
            raise from_lock_error(error, "locking the tool cache", path) from error
        try:
            yield
        finally:
            lock.release()

    def ready(self, key: str) -> Toolchain | None:
        """The finished toolchain of that key; None for one that does not run (another processor, a lost library)."""
        try:
            return probe(self.bin(key), ORIGIN)
        except Rejected:
            return None

    def adopt(self, assembled: Path, record: BuildRecord, backend: str) -> Toolchain:
        """Check that the ``assembled`` directory runs, then give it its name. Raises :class:`ToolchainError` if it does not
        run."""
        final = self.toolchains / record.key
        try:
            proved = _prove(assembled / "bin")
            if backend != "cpu" and backend not in proved.backends:
                raise ToolchainError(
                    f"The new toolchain has no {backend} backend",
                    f"its binaries offer only: {', '.join(proved.backends)}",
                    f"Check the log in {self.logs}, or build for the processor with: imatrix-runner tools build --backend cpu",
                )
            write_json(assembled / RECORD, replace(record, identity=proved.identity()))
            for path in assembled.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    sync_file(path)
            _rename_over(assembled, final)
        except OSError as error:
            raise from_os_error(error, "storing the toolchain", final) from error
        return _prove(final / "bin")


def _prove(directory: Path) -> Toolchain:
    try:
        return probe(directory, ORIGIN)
    except Rejected as rejected:
        raise ToolchainError(
            "The new toolchain does not run", rejected.why, "Build one for this machine with: imatrix-runner tools build"
        ) from rejected


def _rename_over(new: Path, final: Path) -> None:
    """Rename a directory over another one. Directories cannot be replaced in one step, so the old one is renamed first."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    new.replace(final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def now() -> str:
    """The time for a record, in a form that sorts."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def safe_name(text: str) -> str:
    """``text`` as part of a file name on every system."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("._")[:80] or "unknown"
