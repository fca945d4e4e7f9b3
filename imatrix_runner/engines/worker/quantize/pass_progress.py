"""Progress of a pass: elements quantised, once for each type."""

from __future__ import annotations

import threading
import time

from imatrix_runner.engines.protocol import Send
from imatrix_runner.engines.worker.quantize.work_list import Work
from imatrix_runner.events import Progress

_PROGRESS_SECONDS = 0.2


class PassProgress:
    """Sends progress at intervals. ``total``: elements of ``count`` works together."""

    def __init__(self, send: Send, step: str, total: float, count: int) -> None:
        self._send, self._step = send, step
        self._done, self._total = 0.0, total
        self._numbers: dict[str, int] = {}
        self._count = count
        self._lock = threading.Lock()
        self._reported = 0.0

    def slabs(self, work: Work, count: int) -> None:
        """Count slabs of a work as done."""
        with self._lock:
            number = self._numbers.setdefault(work.name, len(self._numbers) + 1)
            self._done += count * work.slab_cost
            now = time.monotonic()
            if now - self._reported < _PROGRESS_SECONDS:
                return
            self._reported = now
            self._send(Progress(self._step, self._done, self._total, f"{number}/{self._count} {work.name}"))
