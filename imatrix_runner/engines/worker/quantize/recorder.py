"""Records finished tensors after they are on the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from imatrix_runner.engines.pass_parts import LedgerEntry
from imatrix_runner.engines.worker.quantize.output_files import LevelOutput

_SYNC_SECONDS = 1.0


def _nothing() -> None:
    """For those that ask :attr:`Recorder.failed`."""


@dataclass
class _Waiting:
    entries: dict[LevelOutput, list[LedgerEntry]] = field(default_factory=dict)
    then: list[Callable[[], None]] = field(default_factory=list)


class Recorder:
    """Syncs written tensors to disk from time to time, then records them; in its own thread, because syncing blocks."""

    def __init__(self, on_failure: Callable[[], None] = _nothing) -> None:
        """``on_failure`` is called when a write failed."""
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._waiting = _Waiting()
        self._end = False
        self._awake = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, output: LevelOutput, entry: LedgerEntry) -> None:
        with self._lock:
            self._waiting.entries.setdefault(output, []).append(entry)

    def afterwards(self, then: Callable[[], None]) -> None:
        """Record now what was added, and call ``then`` after it is recorded."""
        with self._lock:
            self._waiting.then.append(then)
        self._awake.set()

    @property
    def failed(self) -> bool:
        """Whether a write failed: nothing more is recorded, so further computation would be lost."""
        return self._error is not None

    def finish(self) -> None:
        """Record everything that is left. Raises the error of a failed write."""
        self._end = True
        self._awake.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        last, pause = False, _SYNC_SECONDS
        while not last:
            self._awake.wait(pause)
            self._awake.clear()
            last = self._end
            began = time.monotonic()
            with self._lock:
                waiting, self._waiting = self._waiting, _Waiting()
            try:
                for output, entries in waiting.entries.items():
                    output.record(entries)
            except OSError as error:
                self._error = error
                self._on_failure()
                return
            for then in waiting.then:
                then()
            pause = max(_SYNC_SECONDS, 20 * (time.monotonic() - began))  # writers wait while a file is synced
