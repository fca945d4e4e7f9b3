"""A first signal asks, a second Ctrl-C insists, and nobody else's handlers are touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

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


# Interrupts itself in code compiled from text, as dataclasses have it, and once more while that is reported.
INTERRUPTED = """
    import signal, sys
    from imatrix_runner.cli import main
    def interrupt(*_arguments, **_options):
        exec("signal.raise_signal(signal.SIGINT)", {"signal": signal})
    main.cli.main = interrupt
    if "again" in sys.argv:
        main._tell = interrupt
    import atexit
    atexit.register(signal.raise_signal, signal.SIGINT)  # and while the interpreter shuts down
    main.main([])
"""


@pytest.mark.skipif(os.name == "nt", reason="there Ctrl-C is no signal that a process can send to itself")
@pytest.mark.parametrize("again", [(), ("again",)])
def test_however_often_ctrl_c_is_pressed_the_code_is_130(again: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(textwrap.dedent(INTERRUPTED))
    argv = [sys.executable, "-m", "interrupted", *again]  # with -c the interpreter ends in another way
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert done.returncode == 130, done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_an_insisting_user_does_not_interrupt_the_tearing_down() -> None:
    with stop_on_signals(Stop()), pytest.raises(KeyboardInterrupt):  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)  # would replace what ends the children
            torn_down = True
    assert torn_down
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
