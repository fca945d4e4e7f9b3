"""Output files of a pass: created with their final size before the work begins, then written in any order."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from imatrix_runner.engines.files.ledger import Ledger, LedgerHead, part_ledger, part_ledgers, read
from imatrix_runner.engines.jobs import LEDGER_NAME, PassLevel
from imatrix_runner.engines.pass_parts import LedgerEntry
from imatrix_runner.engines.shards import shard_paths
from imatrix_runner.engines.worker.quantize.gguf_headers import FileLayout, TensorPlace
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.files import open_to_overwrite, sync
from imatrix_runner.models.gguf_file import MAGIC

_MOST_FILES = 1 << 16
_WRITES_AT = hasattr(os, "pwrite")

_NOT_POSSIBLE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class OutputFile:
    """One file of an output. Until it is finished it begins with four zeros instead of ``GGUF``, so that no program takes it
    for complete; llama-quantize does the same."""

    def __init__(self, path: Path, layout: FileLayout | None, *, fresh: bool) -> None:
        """``layout``: None for a file whose space and header are not this worker's concern."""
        self.path = path
        if fresh:
            path.unlink(missing_ok=True)
        shared = layout is None and not fresh
        self._file: IO[bytes] = open_to_overwrite(path) if shared else path.open("x+b" if fresh else "r+b", buffering=0)
        self._lock = threading.Lock()
        try:
            if fresh and layout is not None:
                _reserve(self._file.fileno(), layout.size)
            # Also for a continued file: a loss of power may have come before its header was on disk.
            if layout is not None:
                self.write(len(MAGIC), memoryview(layout.header)[len(MAGIC) :])
        except OSError:
            self.close()
            if fresh:
                path.unlink()  # free the space of an incomplete file
            raise

    def write(self, offset: int, data: memoryview) -> None:
        if _WRITES_AT:
            while data:
                done = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[done:], offset + done
            return
        with self._lock:
            self._file.seek(offset)
            while data:
                data = data[self._file.write(data) :]

    def finish(self) -> None:
        """Write the magic number after all data is on disk, and sync."""
        self.sync()
        self.write(0, memoryview(MAGIC))
        self.sync()

    def sync(self) -> None:
        sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def allow_open_files() -> None:
    """Raise this process's limit on open files as far as the system lets it, to 65536 at most: systems begin with 256 or 1024,
    and many levels in many shards need more."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a lower limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _reserve(descriptor: int, size: int) -> None:
    """Allocate the file's space now; if the file system cannot, only set its size."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise
    os.ftruncate(descriptor, size)


@dataclass(eq=False)
class LevelOutput:
    """One level's files, places and ledger, and its state. ``spoiled``: the tensor that the level failed on, and why.

    An output that another worker prepared has no ``places``. One that is only written to a scratch file has neither files nor
    a ledger."""

    level: PassLevel
    files: list[OutputFile]
    places: dict[str, TensorPlace]
    ledger: Ledger | None
    kept: int
    spoiled: tuple[str, str] | None = None
    computed: int = 0
    copied: int = 0

    @classmethod
    def open(
        cls, level: PassLevel, layouts: Sequence[FileLayout], places: dict[str, TensorPlace], head: LedgerHead
    ) -> LevelOutput:
        """Continue the files with the same ledger head, or create new ones. Raises ``OSError``."""
        folder = level.job.out.parent
        folder.mkdir(parents=True, exist_ok=True)
        paths = file_names(level, len(layouts))
        known = read(folder / LEDGER_NAME)
        whole = all(path.is_file() and path.stat().st_size == layout.size for path, layout in zip(paths, layouts, strict=True))
        fresh = known is None or known[0] != head or not whole
        if fresh:
            for other in (folder / LEDGER_NAME, *part_ledgers(folder)):
                other.unlink(missing_ok=True)
            for other in folder.glob("*.gguf"):  # unfinished shards of another number, for example
                other.unlink()
        files: list[OutputFile] = []
        try:
            for path, layout in zip(paths, layouts, strict=True):
                files.append(OutputFile(path, layout, fresh=fresh))
            ledger = Ledger(folder / LEDGER_NAME, head)
            ledger.take_in(part_ledgers(folder))
        except OSError:
            for file in files:
                file.close()
                if fresh:
                    file.path.unlink(missing_ok=True)
            raise
        return cls(level, files, places, ledger, len(ledger.entries))

    @classmethod
    def join(cls, level: PassLevel, head: LedgerHead, name: str) -> LevelOutput:
        """Open files that another worker prepared, and a partial ledger next to its ledger. Raises ``OSError``, and
        :class:`Refusal` if the files are not there."""
        folder = level.job.out.parent
        known = read(folder / LEDGER_NAME)
        if known is None or known[0] != head:
            why = f"{folder} does not hold its unfinished files"
            raise Refusal.invalid(
                f"{level.name} cannot be written here", why, "If the folder is not shared by all machines, give --no-shared-fs."
            )
        files: list[OutputFile] = []
        try:
            for path in sorted(folder.glob("*.gguf")):
                files.append(OutputFile(path, None, fresh=False))
            ledger = Ledger(part_ledger(folder, name), head)
        except OSError:
            for file in files:
                file.close()
            raise
        return cls(level, files, {}, ledger, 0)

    @property
    def entries(self) -> Mapping[str, LedgerEntry]:
        """What the ledger records, by the tensor's name in the model."""
        return self.ledger.entries if self.ledger is not None else {}

    def write(self, place: TensorPlace, offset: int, data: memoryview) -> None:
        """Write part of a tensor, ``offset`` bytes from its beginning."""
        self.files[place.file].write(place.offset + offset, data)

    def record(self, entries: Sequence[LedgerEntry]) -> None:
        """Sync written tensors to disk, then add them to the ledger."""
        for index in {entry.file for entry in entries}:
            self.files[index].sync()
        assert self.ledger is not None
        self.ledger.append(entries)

    def finish(self) -> None:
        """Complete the files after every tensor was recorded. Raises :class:`Refusal` if one is missing."""
        if missing := len(self.places) - len(self.entries):
            raise Refusal.failed(f"{self.level.name} is incomplete", f"{missing} tensors were not written", "Report it.")
        for file in self.files:
            file.finish()

    def close(self) -> None:
        for file in self.files:
            file.close()
        if self.ledger is not None:
            self.ledger.close()

    def give_up(self) -> None:
        """Remove the files, if nothing is done yet, because the pass cannot begin."""
        if not self.entries:
            self.close()
            for path in (*(file.path for file in self.files), self.level.job.out.parent / LEDGER_NAME):
                path.unlink(missing_ok=True)


def file_names(level: PassLevel, count: int) -> list[Path]:
    """llama.cpp's file names of shards: with ``--keep-split`` they have a number even if there is only one."""
    out = level.job.out
    return list(shard_paths(out, count)) if level.job.options.keep_split or level.job.shards else [out]
