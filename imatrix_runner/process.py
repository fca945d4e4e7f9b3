"""Child processes: the only room that starts, watches and ends other programs."""

from __future__ import annotations

import codecs
import errno
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Literal

import psutil

from imatrix_runner.endings import crashed, ending, signal_name
from imatrix_runner.environment import Needs, child_environment, find_program, neutral_directory
from imatrix_runner.errors import EngineError, from_os_error
from imatrix_runner.signals import Stop

Stream = Literal["stdout", "stderr"]
OnText = Callable[[Stream, str], object]

GRACE_SECONDS = 5.0
MARK_VARIABLE = "IMATRIX_RUNNER_CHILD_OF"
_POLL_SECONDS = 0.2
_TAIL_LINES = 200
_MAX_CAPTURED = 4 << 20


@dataclass(frozen=True)
class Command:
    """A program to run: ``argv`` as a list (never a shell string), ``needs`` of our environment, and ``env`` to add to it.

    Without ``cwd`` it starts in a directory where nothing lies that it could load by chance: paths in ``argv`` are absolute. A
    program given by its bare name is looked up on ``PATH``, never in the current directory.
    """

    argv: tuple[str, ...]
    cwd: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    needs: Needs = Needs.COMPUTE

    def __str__(self) -> str:
        text = shlex.join(self.argv)
        return f"cd {shlex.quote(str(self.cwd))} && {text}" if self.cwd else text


@dataclass(frozen=True)
class Outcome:
    """How a child ended. ``tail``: its last lines, both streams as they came; ``hung``: ended by us after silence."""

    command: Command
    returncode: int
    seconds: float
    tail: tuple[str, ...]
    log: Path | None
    hung: bool = False
    out_of_memory: bool = False

    @property
    def ok(self) -> bool:
        return self.returncode == 0 and not self.hung

    def ending(self) -> str:
        """One phrase for people: ``exit code 1``, ``killed by SIGSEGV (segmentation fault)``."""
        if self.hung:
            return "it neither wrote nor computed anything and was ended"
        if self.out_of_memory:
            return f"killed by {signal_name(self.returncode)}: the machine ran out of memory"
        return ending(self.returncode)

    @property
    def crashed(self) -> bool:
        """Whether the program itself is at fault (see :func:`imatrix_runner.endings.crashed`)."""
        return not self.hung and crashed(self.returncode)

    @property
    def gave_up(self) -> bool:
        """Whether the program ended itself, as after a failed assertion; it says why before."""
        return not self.hung and signal_name(self.returncode) == "SIGABRT"


@dataclass(frozen=True)
class Captured:
    """All a short-lived child said."""

    returncode: int
    stdout: str
    stderr: str


def capture(command: Command, *, seconds: float) -> Captured:
    """Run something short and keep what it says, at most :data:`_MAX_CAPTURED` bytes of each stream.

    Raises ``OSError`` if it cannot start, ``TimeoutError`` if it takes longer or never stops talking.
    """
    child = _open(command)
    ends: queue.SimpleQueue[tuple[Stream, bytes]] = queue.SimpleQueue()
    said: dict[Stream, bytearray] = {name: bytearray() for name, _ in _pipes(child)}
    deadline = time.monotonic() + seconds
    try:
        for name, pipe in _pipes(child):
            threading.Thread(target=_pump, args=(name, pipe, ends), daemon=True).start()
        talking = len(said)
        while talking:
            stream, data = ends.get(timeout=max(0.0, deadline - time.monotonic()))
            talking -= not data
            said[stream] += data
            if len(said[stream]) > _MAX_CAPTURED:
                raise TimeoutError(f"it wrote more than {_MAX_CAPTURED} bytes")
        child.wait(timeout=max(0.0, deadline - time.monotonic()))
    except (queue.Empty, subprocess.TimeoutExpired) as error:
        raise TimeoutError(f"no answer within {seconds:g} s") from error
    finally:
        _end(child)
    return Captured(child.returncode, said["stdout"].decode("utf-8", "replace"), said["stderr"].decode("utf-8", "replace"))


class Runner:
    """Runs long children: streams their output, logs it, ends them when told to stop or when they hang.

    ``hang_seconds``: a child that for so long neither writes a byte nor uses a second of CPU counts as hung (0: never).
    ``on_child`` hears ``(pid, alive)`` so that a later run can find orphans of a killed one; it knows them by ``mark``, which
    they carry in their environment.
    """

    def __init__(
        self,
        stop: Stop | None = None,
        *,
        hang_seconds: float = 0.0,
        on_child: Callable[[int, bool], None] | None = None,
        mark: str = "",
    ) -> None:
        self.stop = stop if stop is not None else Stop()
        self._hang_seconds = hang_seconds
        self._on_child = on_child
        self._mark = {MARK_VARIABLE: mark} if mark else {}

    def run(
        self,
        command: Command,
        *,
        log: Path | None = None,
        on_text: OnText | None = None,
        enough: threading.Event | None = None,
    ) -> Outcome:
        """Run to the end. A non-zero exit is an :class:`Outcome`, not an exception; a requested stop raises.

        A child that is ours is given ``enough``: its stdin stays open until the event is set, a stop is requested or we die;
        then it finishes what it is at and ends by itself. Any other child is ended at a stop.
        """
        self.stop.check()
        began = time.monotonic()
        ooms = _oom_kills()
        with _open_log(log, command) as sink:
            child = _start(replace(command, env={**command.env, **self._mark}), listens=enough is not None)
            try:
                if self._on_child:
                    self._on_child(child.pid, True)
                tail, hung = self._watch(child, sink, on_text, enough)
            finally:
                _end(child)
                if self._on_child:
                    self._on_child(child.pid, False)
        self.stop.check()
        killed = child.returncode == -getattr(signal, "SIGKILL", 9) and not hung
        return Outcome(
            command, child.returncode, time.monotonic() - began, tail, log, hung, out_of_memory=killed and _oom_kills() > ooms
        )

    def _watch(
        self, child: subprocess.Popen[bytes], log: IO[bytes], on_text: OnText | None, enough: threading.Event | None
    ) -> tuple[tuple[str, ...], bool]:
        pieces: queue.SimpleQueue[tuple[Stream, bytes]] = queue.SimpleQueue()
        streams = _pipes(child)
        for name, pipe in streams:
            threading.Thread(target=_pump, args=(name, pipe, pieces), daemon=True).start()
        decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name, _ in streams}
        tails = {name: _Tail() for name, _ in streams}
        lines: deque[str] = deque(maxlen=_TAIL_LINES)
        watch = _HangWatch(child.pid, self._hang_seconds)
        still_open, hung = len(streams), False

        def must_end() -> bool:
            if enough is not None and (enough.is_set() or self.stop.requested):
                _hang_up(child)
            return enough is None and self.stop.requested

        while still_open and not hung and not must_end():
            try:
                name, data = pieces.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if child.poll() is not None and pieces.empty():
                    break  # a grandchild may hold the pipes open; the child itself is gone
                hung = watch.hung()
                continue
            if not data:
                still_open -= 1
                continue
            watch.heard()
            _write_log(log, data)
            text = decoders[name].decode(data)
            lines.extend(tails[name].feed(text))
            if on_text and text:
                on_text(name, text)
        for tail in tails.values():
            lines.extend(tail.rest())
        while not hung and not must_end() and child.poll() is None:
            hung = watch.hung()
            time.sleep(0.01)
        return tuple(lines), hung


class _Tail:
    """Splits a stream of pieces into lines; ``\\r`` ends a line too, so progress bars do not grow without bound."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[str]:
        *whole, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        self._rest = self._rest[-4096:]
        return [_printable(line) for line in whole if line.strip()]

    def rest(self) -> list[str]:
        rest, self._rest = _printable(self._rest), ""
        return [rest] if rest else []


def _printable(line: str) -> str:
    """Without what could move the terminal's cursor: these lines are shown in errors, and may quote a stranger's file."""
    return "".join(letter if letter.isprintable() else " " for letter in line).rstrip()


class _HangWatch:
    def __init__(self, pid: int, limit: float) -> None:
        self._pid, self._limit = pid, limit
        self._cpu = 0.0
        self.heard()

    def heard(self) -> None:
        self._since = time.monotonic()

    def hung(self) -> bool:
        if not self._limit or time.monotonic() - self._since < self._limit:
            return False
        cpu = self._cpu_seconds()
        busy = cpu - self._cpu >= min(1.0, self._limit / 2)
        self._cpu = cpu
        self.heard()
        return not busy

    def _cpu_seconds(self) -> float:
        try:
            root = psutil.Process(self._pid)
            times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
        except psutil.Error:
            return 0.0
        # With what ended children used: a build is a row of short-lived compilers.
        return float(sum(entry.user + entry.system + entry.children_user + entry.children_system for entry in times))


def _pump(name: Stream, pipe: IO[bytes], pieces: queue.SimpleQueue[tuple[Stream, bytes]]) -> None:
    with pipe:
        while data := os.read(pipe.fileno(), 65536):
            pieces.put((name, data))
    pieces.put((name, b""))


def _start(command: Command, *, listens: bool) -> subprocess.Popen[bytes]:
    try:
        return _open(command, listens=listens)
    except OSError as error:
        raise EngineError(
            f"{Path(command.argv[0]).name} could not be started",
            f"{command.argv[0]}: {error.strerror or error}",
            "Check the toolchain with: imatrix-runner doctor",
        ) from error


def _open(command: Command, *, listens: bool = False) -> subprocess.Popen[bytes]:
    env = child_environment(command.env, command.needs)
    program = find_program(command.argv[0], env["PATH"])
    if program is None and Path(command.argv[0]).name == command.argv[0]:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command.argv[0])
    # A session of its own: the terminal's Ctrl-C reaches us alone, and we can end the child with all it started.
    return subprocess.Popen(
        (program or command.argv[0], *command.argv[1:]),
        cwd=command.cwd or neutral_directory(),
        env=env,
        stdin=subprocess.PIPE if listens else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=os.name == "posix",
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def _pipes(child: subprocess.Popen[bytes]) -> tuple[tuple[Stream, IO[bytes]], ...]:
    assert child.stdout is not None
    assert child.stderr is not None
    return ("stdout", child.stdout), ("stderr", child.stderr)


def _hang_up(child: subprocess.Popen[bytes]) -> None:
    """Close the child's stdin: it sees the end of it and takes it as a wish to stop."""
    if child.stdin is not None and not child.stdin.closed:
        child.stdin.close()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Make sure the child and everything it started are gone."""
    if child.poll() is None:
        end_tree(child.pid)
    _hang_up(child)
    child.wait()


def start_time(pid: int) -> float | None:
    """When a process was started, in seconds since 1970; None if it is over (also while its parent has not taken notice)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except (psutil.Error, ValueError, OverflowError):  # the latter two: no process can have that number
        return None


def is_marked(pid: int, mark: str) -> bool:
    """Whether a process was started by a :class:`Runner` with that ``mark``; false where the system does not show it."""
    try:
        return bool(psutil.Process(pid).environ().get(MARK_VARIABLE) == mark)
    except psutil.Error:
        return False


def end_tree(pid: int) -> None:
    """Ask a process and its descendants to end, then insist after :data:`GRACE_SECONDS`."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return
    for act in ("terminate", "kill"):
        for process in family:
            try:
                getattr(process, act)()
            except psutil.Error:
                continue  # it ended meanwhile: what we want
        _, family = psutil.wait_procs(family, timeout=GRACE_SECONDS)
        if not family:
            return


@contextmanager
def _open_log(log: Path | None, command: Command) -> Iterator[IO[bytes]]:
    path = log if log is not None else Path(os.devnull)
    try:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("ab", buffering=0)
    except OSError as error:
        raise from_os_error(error, f"opening the log {path.name}", path) from error
    with handle:
        _write_log(handle, f"$ {command}\n".encode())
        yield handle


def _write_log(log: IO[bytes], data: bytes) -> None:
    try:
        log.write(data)
    except OSError as error:
        raise from_os_error(error, "writing a log", log.name) from error


def _oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since boot (Linux; elsewhere always 0)."""
    if sys.platform != "linux":
        return 0
    try:
        counters = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return 0
    for line in counters.splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0


def relevant_lines(lines: Sequence[str], count: int = 10) -> tuple[str, ...]:
    """The ``count`` lines most worth showing: those that speak of errors, else the last."""
    words = ("error", "failed", "fatal", "not found", "cannot", "abort", "assert", "undefined", "no such")
    telling = [line for line in lines if any(word in line.lower() for word in words)]
    return tuple((telling or list(lines))[-count:])
