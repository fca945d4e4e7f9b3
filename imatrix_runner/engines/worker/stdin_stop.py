"""The worker's stdin: numbers of units of work that the parent orders; its end means that it should finish."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TypeVar

UnitT = TypeVar("UnitT")


class StdinStop:
    """Set at the end of file on stdin. Until then each line is the number of a unit of work."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._orders: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        rest = b""
        while data := os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._orders.put(int(line))
        self._event.set()
        self._orders.put(None)

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def end(self) -> None:
        """Order no further unit, as at the end of file."""
        self._event.set()
        self._orders.put(None)

    def units(self, units: Sequence[UnitT], *, ordered: bool) -> Iterator[UnitT]:
        """All units in their order; with ``ordered`` those that the parent orders, as it orders them, until it ends."""
        if not ordered:
            yield from units
            return
        while not self.requested and (number := self._orders.get()) is not None:
            yield units[number]
