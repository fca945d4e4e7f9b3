"""The worker's ear for its parent: stdin ends when it should finish what it is at, or when the parent is dead."""

from __future__ import annotations

import os
import threading


class Stop:
    """Set when stdin ends: the parent wants no more, or is dead."""

    def __init__(self) -> None:
        self._event = threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would be held when the interpreter ends
            pass
        self._event.set()

    @property
    def requested(self) -> bool:
        return self._event.is_set()
