"""Requests to stop, and the signals that make them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from imatrix_runner.errors import InterruptedRunError


class Stop:
    """A request to end soon. Long computations call :meth:`check` between units of work; the ``Runner`` ends children."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._signal = 0

    def request(self, signum: int = 0) -> None:
        self._signal = self._signal or signum
        self._event.set()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise :class:`InterruptedRunError` once a stop was requested."""
        if self._event.is_set():
            name = signal.Signals(self._signal).name if self._signal else "a request to stop"
            raise InterruptedRunError(
                f"Stopped by {name}", "what was finished is kept", "Run the same command again: it continues."
            )


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into ``stop``; a second SIGINT raises ``KeyboardInterrupt`` at once, and
    later ones are ignored until the cleanup has finished.

    Only the main thread can install handlers; elsewhere this does nothing. A signal that was ignored before stays ignored, as
    ``nohup`` and a shell's background jobs expect.
    """

    def handler(signum: int, _frame: FrameType | None) -> None:
        if stop.requested and signum == signal.SIGINT:
            # Only once: another interrupt during the cleanup would leave children running.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt
        stop.request(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back that a library replaces when it starts. Does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
