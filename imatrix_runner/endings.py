"""How a child process ended, in words: its exit code, the signal or the Windows status that killed it, and what that means."""

from __future__ import annotations

import signal

_SIGNALS = {
    "SIGILL": "illegal instruction: this processor does not have it, or it was built wrongly",
    "SIGSEGV": "segmentation fault",
    "SIGBUS": "bus error: a mapped file shrank, or its disk failed",
    "SIGFPE": "arithmetic error",
    "SIGABRT": "the program aborted",
    "SIGKILL": "by the kernel when memory ran out, or by another program",
    "SIGTERM": "another program ended it",
    "SIGXCPU": "the limit on processor time, ulimit -t",
    "SIGXFSZ": "the limit on file sizes, ulimit -f",
    "SIGSYS": "a forbidden system call: a sandbox",
    "SIGTRAP": "breakpoint",
}
_STATUS = {
    0xC0000005: "access violation",
    0xC000001D: "illegal instruction: this processor does not have it, or it was built wrongly",
    0xC0000094: "division by zero",
    0xC00000FD: "stack overflow",
    0xC0000135: "a DLL it needs is missing",
    0xC0000139: "a DLL it needs is of another version",
    0xC0000374: "damaged heap",
    0xC0000409: "the program aborted",
}
_CRASHES = frozenset({"SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT", "SIGTRAP"})
_MISSING = frozenset({0xC0000135, 0xC0000139})
_FIRST_STATUS = 0x80000000
_LAST_SIGNAL = 255


def signal_name(returncode: int) -> str:
    """``SIGSEGV``, ``signal 200``; empty for a child that no signal ended."""
    if returncode >= 0 or _status(returncode):
        return ""
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"signal {-returncode}"


def crashed(returncode: int) -> bool:
    """Whether the program itself is at fault: it crashed or aborted, and nothing outside ended it."""
    status = _status(returncode)
    return signal_name(returncode) in _CRASHES or (status != 0 and status not in _MISSING)


def ending(returncode: int) -> str:
    """One phrase: ``exit code 1``, ``killed by SIGSEGV (segmentation fault)``, ``exit code 0xC0000005 (access violation)``."""
    if name := signal_name(returncode):
        meaning = _SIGNALS.get(name)
        return f"killed by {name} ({meaning})" if meaning else f"killed by {name}"
    if status := _status(returncode):
        meaning = _STATUS.get(status)
        return f"exit code 0x{status:X}" + (f" ({meaning})" if meaning else "")
    return f"exit code {returncode}"


def _status(returncode: int) -> int:
    """The Windows status behind an exit code, signed or not; 0 for any other."""
    return returncode & 0xFFFFFFFF if returncode >= _FIRST_STATUS or returncode < -_LAST_SIGNAL else 0
