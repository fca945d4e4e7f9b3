"""Running something that blocks without listening, such as a library's download, so that a stop is heard at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1
_FAREWELL_SECONDS = 2.0


def in_background(work: Callable[[], T], check: Callable[[], None]) -> T:
    """Run ``work`` in a thread and return what it returns; meanwhile call ``check``, whose exception ends the waiting.

    The thread then gets two seconds to notice for itself and clean up; being a daemon it never keeps the process alive.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread, whatever it is
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([future], timeout=_POLL_SECONDS).done:
        try:
            check()
        except BaseException:
            wait([future], timeout=_FAREWELL_SECONDS)
            raise
    return future.result()
