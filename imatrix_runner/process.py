"""Child processes: the only module that starts, watches and ends other programs."""

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
from imatrix_runner.environment import ChildNeeds, child_environment, find_program, neutral_directory
from imatrix_runner.errors import EngineError, from_os_error
from imatrix_runner.signals import Stop

Stream = Literal["stdout", "stderr"]
OnText = Callable[[Stream, str], object]

GRACE_SECONDS = 5.0
MARK_VARIABLE = "IMATRIX_RUNNER_CHILD_OF"
_POLL_SECONDS = 0.2
TAIL_LINES = 200
_MAX_CAPTURED = 4 << 20


@dataclass(frozen=True)
class Command:
    """A program to run: ``argv``, the groups of environment variables it ``needs``, and ``env`` to add.

    Without ``cwd`` it starts in a directory without files that it could load by accident, so paths in ``argv`` are absolute.
    A program given by its bare name is looked up on ``PATH``, never in the current directory. ``argv`` is never a shell string.
    """

    argv: tuple[str, ...]
    cwd: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    needs: ChildNeeds = ChildNeeds.COMPUTE

    @property
    def typed(self) -> tuple[tuple[str, ...], ...]:
        """The shell commands that run it: a change of directory where one is needed, then the program."""
        return (*((("cd", str(self.cwd)),) if self.cwd else ()), self.argv)

    def __str__(self) -> str:
        return " && ".join(map(shlex.join, self.typed))


@dataclass(frozen=True)
class Outcome:
    """How a child ended. ``tail``: its last lines, both streams as they came; ``hung``: it was ended because it made no
    progress."""

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
            return "it wrote no output and used no CPU time, and was ended"
        if self.out_of_memory:
            return f"killed by {signal_name(self.returncode)}: the machine ran out of memory"
        return ending(self.returncode)

    @property
    def crashed(self) -> bool:
        """Whether the program itself is at fault (see :func:`imatrix_runner.endings.crashed`)."""
        return not self.hung and crashed(self.returncode)

    @property
    def gave_up(self) -> bool:
        """Whether the program aborted, for example after a failed assertion; its last lines say why."""
        return not self.hung and signal_name(self.returncode) == "SIGABRT"


@dataclass(frozen=True)
class Captured:
    """The output of a short-lived child."""

    returncode: int
    stdout: str
    stderr: str


def capture(command: Command, *, seconds: float) -> Captured:
    """Run a short command and return its output, at most :data:`_MAX_CAPTURED` bytes of each stream.

    Raises ``OSError`` if it cannot start, ``TimeoutError`` if it takes longer or writes more.
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


class Orders:
    """Numbers for a running worker, which it reads from its stdin one after another (see :meth:`Runner.run`)."""

    def __init__(self) -> None:
        self._given: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.ended = False

    def give(self, number: int) -> None:
        """Hand over one more number. Never blocks; a worker that has ended does not get it."""
        self._given.put(number)

    def end(self) -> None:
        """Let the worker finish, as if it had been told to stop: nothing follows."""
        self.ended = True
        self._given.put(None)

    def deliver(self, pipe: IO[bytes]) -> None:
        """Write numbers to the worker as they are given, until it ends or nothing follows."""
        while (number := self._given.get()) is not None:
            try:
                pipe.write(b"%d\n" % number)
                pipe.flush()
            except (OSError, ValueError):  # it ended, or is to end: its stdin is closed
                return


class Runner:
    """Runs long children: streams their output, logs it, ends them on a stop request or when they hang.

    ``hang_seconds``: a child that for this long neither writes a byte nor uses a second of CPU counts as hung (0: never).
    ``on_child`` is called with ``(pid, alive)``, so that a later run can find orphans of a killed one; it recognises them by
    ``mark``, which is in their environment.
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
        orders: Orders | None = None,
    ) -> Outcome:
        """Run to the end. A non-zero exit is an :class:`Outcome`, not an exception; a requested stop raises.

        With ``enough``, for this program's own workers, stdin stays open until the event is set, a stop is requested or this
        process dies; the worker then finishes its current unit of work and exits. ``orders`` go to its stdin meanwhile. Any
        other child is ended on a stop.
        """
        self.stop.check()
        began = time.monotonic()
        ooms = _oom_kills()
        with _open_log(log, command) as sink:
            child = _start(replace(command, env={**command.env, **self._mark}), listens=enough is not None)
            try:
                if self._on_child:
                    self._on_child(child.pid, True)
                if orders is not None and child.stdin is not None:
                    threading.Thread(target=orders.deliver, args=(child.stdin,), daemon=True).start()
                tail, hung = self._watch(child, sink, on_text, enough, orders)
            finally:
                if orders is not None:
                    orders.end()
                _end(child)
                if self._on_child:
                    self._on_child(child.pid, False)
        self.stop.check()
        killed = child.returncode == -getattr(signal, "SIGKILL", 9) and not hung
        return Outcome(
            command, child.returncode, time.monotonic() - began, tail, log, hung, out_of_memory=killed and _oom_kills() > ooms
        )

    def _watch(
        self,
        child: subprocess.Popen[bytes],
        log: IO[bytes],
        on_text: OnText | None,
        enough: threading.Event | None,
        orders: Orders | None,
    ) -> tuple[tuple[str, ...], bool]:
        reads: queue.SimpleQueue[tuple[Stream, bytes]] = queue.SimpleQueue()
        streams = _pipes(child)
        for name, pipe in streams:
            threading.Thread(target=_pump, args=(name, pipe, reads), daemon=True).start()
        decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name, _ in streams}
        tails = {name: _Tail() for name, _ in streams}
        lines: deque[str] = deque(maxlen=TAIL_LINES)
        watch = _HangWatch(child.pid, self._hang_seconds)
        still_open, hung = len(streams), False

        def must_end() -> bool:
            over = orders is not None and orders.ended
            if enough is not None and (over or enough.is_set() or self.stop.requested):
                _hang_up(child)
            return enough is None and self.stop.requested

        while still_open and not hung and not must_end():
            gone = child.poll() is not None  # looked at first: what it wrote last may still be on its way through a thread
            try:
                name, data = reads.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if gone:
                    break  # a grandchild may hold the pipes open
                hung = child.poll() is None and watch.hung()
                continue
            if not data:
                still_open -= 1
                continue
            watch.note_output()
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
    """Splits a stream of reads into lines; ``\\r`` ends a line too, so progress bars do not grow without bound."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> list[str]:
        *whole, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        self._rest = self._rest[-4096:]
        return [printable_line(line) for line in whole if line.strip()]

    def rest(self) -> list[str]:
        rest, self._rest = printable_line(self._rest), ""
        return [rest] if rest else []


def printable_line(line: str) -> str:
    """Return a line without terminal control characters: lines are shown in errors, and may quote an untrusted file."""
    return "".join(letter if letter.isprintable() else " " for letter in line).rstrip()


class _HangWatch:
    def __init__(self, pid: int, limit: float) -> None:
        self._pid, self._limit = pid, limit
        self._cpu = 0.0
        self.note_output()

    def note_output(self) -> None:
        self._since = time.monotonic()

    def hung(self) -> bool:
        if not self._limit or time.monotonic() - self._since < self._limit:
            return False
        cpu = self._cpu_seconds()
        busy = cpu - self._cpu >= min(1.0, self._limit / 2)
        self._cpu = cpu
        self.note_output()
        return not busy

    def _cpu_seconds(self) -> float:
        try:
            root = psutil.Process(self._pid)
            times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
        except psutil.Error:
            return 0.0
        # Includes the time of ended children: a build runs many short-lived compilers.
        return float(sum(entry.user + entry.system + entry.children_user + entry.children_system for entry in times))


def _pump(name: Stream, pipe: IO[bytes], reads: queue.SimpleQueue[tuple[Stream, bytes]]) -> None:
    with pipe:
        while data := os.read(pipe.fileno(), 65536):
            reads.put((name, data))
    reads.put((name, b""))


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
    # A new session: the terminal's Ctrl-C reaches only this process, which can end the child with everything it started.
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
    """Close the child's stdin; a worker takes the end of file as a request to stop."""
    if child.stdin is not None and not child.stdin.closed:
        child.stdin.close()


def _end(child: subprocess.Popen[bytes]) -> None:
    """Make sure the child and everything it started are gone."""
    if child.poll() is None:
        end_tree(child.pid)
    _hang_up(child)
    child.wait()


def start_time(pid: int) -> float | None:
    """When a process was started, in seconds since 1970; None if it has ended (also if its parent has not reaped it yet)."""
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
                continue  # it ended in the meantime
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
    """How many processes the kernel has killed since boot because memory ran out (Linux; elsewhere always 0)."""
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
    """The ``count`` lines most worth showing: those that mention errors, else the last."""
    words = ("error", "failed", "fatal", "not found", "cannot", "abort", "assert", "undefined", "no such")
    relevant = [line for line in lines if any(word in line.lower() for word in words)]
    return tuple((relevant or list(lines))[-count:])
