"""Stop signal of the worker: end of file on stdin means that the parent wants it to finish, or died."""

from __future__ import annotations

import os
import threading


class StdinStop:
    """Set at the end of file on stdin."""

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
