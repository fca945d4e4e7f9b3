"""How fast each worker is, for the line of progress."""

from __future__ import annotations

import os
import socket
import time
from collections import defaultdict

_MOST_NAMED = 4
"""Workers whose rates are shown one by one."""


def worker_name() -> str:
    """The name of the worker in this process, which begins with its machine's."""
    return f"{socket.gethostname()} {os.getpid()}"


class WorkerRates:
    """Counts what each worker has done since the beginning, in ``unit``; ``scale`` of what is counted are shown as
    one."""

    def __init__(self, unit: str, scale: float = 1.0) -> None:
        self._unit, self._scale = unit, scale
        self._began = time.monotonic()
        self._done: defaultdict[str, float] = defaultdict(float)

    def add(self, worker: str, amount: float) -> None:
        """Count what a worker has finished."""
        self._done[worker] += amount

    def __str__(self) -> str:
        """``box1 61 M/s, box2 58 M/s``; of many workers the slowest and the fastest."""
        seconds = max(1e-3, time.monotonic() - self._began)
        each = {name: done / seconds / self._scale for name, done in sorted(self._done.items())}
        if len(each) > _MOST_NAMED:
            return f"{len(each)} workers, {min(each.values()):.3g} to {max(each.values()):.3g} {self._unit}/s each"
        return ", ".join(f"{name.split()[0]} {rate:.3g} {self._unit}/s" for name, rate in each.items())
