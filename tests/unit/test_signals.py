"""A first signal asks, a second Ctrl-C insists, and nobody else's handlers are touched."""

from __future__ import annotations

import signal
import threading

import pytest

from imatrix_runner.errors import InterruptedRunError
from imatrix_runner.signals import Stop, stop_on_signals


def test_two_interrupts_the_first_asks_the_second_insists() -> None:
    stop = Stop()
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals(stop):
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # only Ctrl-C insists
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(InterruptedRunError, match="Stopped by SIGINT"):
        stop.check()


def test_outside_the_main_thread_handlers_are_left_alone() -> None:
    seen: list[object] = []
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with stop_on_signals(Stop()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
