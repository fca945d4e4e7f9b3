"""The files of a pass: made in their final size before the work begins, filled at any place, in any order."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from imatrix_runner.engines.base import LEDGER_NAME, PassLevel
from imatrix_runner.engines.embedded.headers import Layout, Place
from imatrix_runner.engines.embedded.ledger import Entry, Head, Ledger, read
from imatrix_runner.engines.embedded.refusal import Refusal
from imatrix_runner.files import sync

MAGIC = b"GGUF"
_NOT_POSSIBLE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class OutputFile:
    """One file of an output. Until it is finished it begins with four zeros instead of ``GGUF``, so that nobody takes it for
    whole; llama-quantize does the same."""

    def __init__(self, path: Path, layout: Layout, *, fresh: bool) -> None:
        self.path = path
        if fresh:
            path.unlink(missing_ok=True)
        self._file: IO[bytes] = path.open("x+b" if fresh else "r+b", buffering=0)
        self._lock = threading.Lock()
        try:
            if fresh:
                _reserve(self._file.fileno(), layout.size)
            # Also when it was begun before: power may have gone before its header was on the disk.
            self.write(len(MAGIC), memoryview(layout.header)[len(MAGIC) :])
        except OSError:
            self.close()
            if fresh:
                path.unlink()  # what cannot be had whole takes no space from others
            raise

    def write(self, offset: int, data: memoryview) -> None:
        with self._lock:
            self._file.seek(offset)
            while data:
                data = data[self._file.write(data) :]

    def finish(self) -> None:
        """All data is there: let it be a GGUF, durably."""
        self.sync()
        self.write(0, memoryview(MAGIC))
        self.sync()

    def sync(self) -> None:
        sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _reserve(descriptor: int, size: int) -> None:
    """Have the file system set the space aside now; where it cannot, the file only gets its size."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise
    os.ftruncate(descriptor, size)


@dataclass(eq=False)
class Output:
    """One level's files, places and ledger, and how it fares. ``spoiled``: the tensor that ended it, and why."""

    level: PassLevel
    files: list[OutputFile]
    places: dict[str, Place]
    ledger: Ledger
    kept: int
    spoiled: tuple[str, str] | None = None
    computed: int = 0
    copied: int = 0

    @classmethod
    def open(cls, level: PassLevel, layouts: Sequence[Layout], places: dict[str, Place], head: Head) -> Output:
        """Continue what lies there of the same fingerprint, or begin. Raises ``OSError``."""
        folder = level.job.out.parent
        folder.mkdir(parents=True, exist_ok=True)
        paths = file_names(level, len(layouts))
        known = read(folder / LEDGER_NAME)
        whole = all(path.is_file() and path.stat().st_size == layout.size for path, layout in zip(paths, layouts, strict=True))
        fresh = known is None or known[0] != head or not whole
        if fresh:
            (folder / LEDGER_NAME).unlink(missing_ok=True)
        files: list[OutputFile] = []
        try:
            for path, layout in zip(paths, layouts, strict=True):
                files.append(OutputFile(path, layout, fresh=fresh))
            ledger = Ledger(folder / LEDGER_NAME, head)
        except OSError:
            for file in files:
                file.close()
                if fresh:
                    file.path.unlink(missing_ok=True)
            raise
        return cls(level, files, places, ledger, len(ledger.entries))

    def write(self, place: Place, offset: int, data: memoryview) -> None:
        """Part of a tensor, ``offset`` bytes from its beginning."""
        self.files[place.file].write(place.offset + offset, data)

    def record(self, entries: Sequence[Entry]) -> None:
        """These tensors are written: force them to the disk, then say so."""
        for index in {entry.file for entry in entries}:
            self.files[index].sync()
        self.ledger.append(entries)

    def finish(self) -> None:
        """Every tensor is recorded: let the files be GGUFs."""
        if missing := len(self.places) - len(self.ledger.entries):
            raise Refusal.failed(f"{self.level.name} is not whole", f"{missing} tensors were not written", "Report it.")
        for file in self.files:
            file.finish()

    def close(self) -> None:
        for file in self.files:
            file.close()
        self.ledger.close()

    def give_up(self) -> None:
        """The pass cannot begin: where nothing is done yet, take no space from others."""
        if not self.ledger.entries:
            self.close()
            for path in (*(file.path for file in self.files), self.level.job.out.parent / LEDGER_NAME):
                path.unlink(missing_ok=True)


def file_names(level: PassLevel, count: int) -> list[Path]:
    """llama-quantize's names: with ``--keep-split`` a number behind the stem, even for one shard."""
    out = level.job.out
    if not level.job.options.keep_split:
        return [out]
    return [out.with_name(f"{out.stem}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]
