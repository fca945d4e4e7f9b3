"""Runs programs that a model wrote: without network, without any file of this machine but Python's, within limits.

Linux only. util-linux's ``unshare`` gives a program namespaces of its own for network (no interface is up), mounts, processes
and IPC; a file system in memory becomes its root, in which the system's libraries and Python are mounted read-only. There it
runs as a user without rights, with limits on processor time, memory, file size and processes, and an environment of three
variables. When it ends, or its time does, the kernel ends all that it started.

:func:`check_sandbox` lets a program try to get out before any other one runs: where it can, nothing runs.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.environment import ChildNeeds
from imatrix_runner.errors import ToolchainError
from imatrix_runner.process import Command, capture
from imatrix_runner.scratch import scratch_folder


@dataclass(frozen=True)
class SandboxLimits:
    """``seconds`` of processor time and ``wall_seconds`` in all; ``memory`` (bytes of addresses) of each of at most
    ``processes``; ``disk``: bytes of all files; ``file``: of one."""

    seconds: int = 4
    wall_seconds: float = 8.0
    memory: int = 512 << 20
    processes: int = 8
    disk: int = 32 << 20
    file: int = 16 << 20


@dataclass(frozen=True)
class SandboxedRun:
    """How a program ended. ``passed``: it ran to its end without an error; ``why`` says what ended it otherwise."""

    passed: bool
    why: str
    stdout: str


_READY = "imatrix-runner sandbox ready"
_KILLED = 128 + 9
_SLACK_SECONDS = 5.0

# Arguments: the new root, the program, its size limit in bytes, Python, then folders and files to show.
_SETUP = """
set -e
root=$1 program=$2 disk=$3 python=$4
shift 4
mount -t tmpfs -o "size=$disk,nr_inodes=2048,mode=755,nosuid,nodev" tmpfs "$root"
for each in "$@"; do
  if [ -L "$each" ]; then
    mkdir -p "$root$(dirname "$each")"
    ln -s "$(readlink "$each")" "$root$each"
  elif [ -d "$each" ]; then
    mkdir -p "$root$each"
    mount --bind "$each" "$root$each"
    mount -o remount,bind,ro,nosuid,nodev "$root$each"
  elif [ -f "$each" ]; then
    mkdir -p "$root$(dirname "$each")"
    : > "$root$each"
    mount --bind "$each" "$root$each"
    mount -o remount,bind,ro,nosuid,nodev "$root$each"
  fi
done
mkdir -p "$root/dev" "$root/tmp"
chmod 1777 "$root/tmp"
: > "$root/dev/null"
mount --bind /dev/null "$root/dev/null"
cp "$program" "$root/program.py"
cp "$program.start" "$root/start.py"
cd "$root"
# Not as the first process of its namespace, which no limit and no signal would end.
chroot "$root" /usr/bin/env -i HOME=/tmp PATH=/usr/bin:/bin LANG=C.UTF-8 "$python" -I -S -B /start.py
"""

# What the program runs in: {limits}, {user} and {ready} are filled in. What it defines is not the program's to see.
_START = """
import os, resource, sys
def limit():
    for name, value in {limits}:
        number = getattr(resource, name)
        resource.setrlimit(number, (value, value))
    os.chdir("/tmp")
    if {user} and os.getuid() == 0:
        os.setgroups([])
        os.setgid({user})
        os.setuid({user})
    os.write(2, {ready!r}.encode() + b"\\n")
source = open("/program.py", encoding="utf-8", errors="surrogatepass").read()
limit()
del limit
exec(compile(source, "program.py", "exec"), {{"__name__": "__main__"}})
"""

_USER = 64_987
"""The user that programs run as where root runs this: one without files and, unlike root, with a limit on processes."""


def run_sandboxed(program: str, limits: SandboxLimits | None = None) -> SandboxedRun:
    """Run a Python program (standard library only). Raises :class:`ToolchainError` where no sandbox can be made."""
    limits = limits or SandboxLimits()
    token = secrets.token_hex(16)
    with scratch_folder() as folder:
        root, file = folder / "root", folder / "program.py"
        root.mkdir()
        # A program that leaves before its tests have run prints no token.
        ending = f"\n__import__('sys').stdout.flush(); __import__('os').write(1, b'\\n{token}\\n')\n"
        file.write_text(program + ending, encoding="utf-8", errors="surrogatepass", newline="\n")
        Path(f"{file}.start").write_text(_start_of(limits), encoding="utf-8", newline="\n")
        command = _command(root, file, limits)
        try:
            ended = capture(command, seconds=limits.wall_seconds + _SLACK_SECONDS)
        except TimeoutError as error:
            return SandboxedRun(False, str(error), "")
        except OSError as error:
            raise _refused(f"unshare could not be started: {error.strerror or error}") from error
    ready, _, complaints = ended.stderr.partition(_READY)
    if ended.returncode in (_KILLED, -signal.SIGKILL):
        return SandboxedRun(False, f"it ran longer than {limits.seconds} s, or was ended for its memory", ended.stdout)
    if _READY not in ended.stderr:
        raise _refused(f"it could not be set up: {' '.join(ready.split())[-300:] or f'exit code {ended.returncode}'}")
    passed = ended.returncode == 0 and token in ended.stdout
    last = complaints.strip().rpartition("\n")[2][:200]
    why = "" if passed else last or (f"exit code {ended.returncode}" if ended.returncode else "it left before its end")
    return SandboxedRun(passed, why, ended.stdout.replace(f"\n{token}\n", ""))


def check_sandbox() -> None:
    """Raise :class:`ToolchainError` unless a program in the sandbox is kept from network, files, processes and disk."""
    if sys.platform != "linux":
        raise _refused(f"it needs Linux's namespaces, and this system is {sys.platform}")
    with scratch_folder() as folder, closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.setblocking(False)
        mark = folder / "outside.txt"
        mark.write_text("outside", encoding="utf-8")
        port = str(listening.getsockname()[1])
        found = run_sandboxed(_ESCAPES.replace("{PORT}", port).replace("{MARK}", repr(str(mark))))
        if not found.passed:
            raise _refused(f"the program that tries it failed: {found.why}")
        escapes = [str(each) for each in json.loads(found.stdout)]
        try:
            listening.accept()[0].close()
            escapes.append("it reaches this machine's network")
        except BlockingIOError:
            pass
        if mark.read_text(encoding="utf-8") != "outside":
            escapes.append("it writes files of this machine")
    if escapes:
        raise _refused(f"a program in it was not kept in: {'; '.join(dict.fromkeys(escapes))}")


_ESCAPES = """
import json, os, socket
found = []
def tried(what, act):
    try:
        act()
    except (OSError, MemoryError):
        return
    found.append(what)
def connect():
    socket.create_connection(("127.0.0.1", {PORT}), timeout=1).close()
def outward():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as each:
        each.connect(("192.0.2.1", 9))
        each.send(b"x")
def outside():
    with open({MARK}, "w") as handle:
        handle.write("changed")
def system():
    with open("/usr/imatrix-runner-escape", "w"):
        pass
    os.unlink("/usr/imatrix-runner-escape")
def fill():
    for number in range(8):
        with open(f"/tmp/{number}", "wb") as handle:
            for _ in range(15):
                handle.write(bytes(1 << 20))
def forks():
    for _ in range(40):
        if os.fork() == 0:
            import time
            time.sleep(5)
            os._exit(0)
tried("it reaches this machine's network", connect)
tried("it reaches the network", outward)
tried("it opens files of this machine", outside)
tried("it writes to the system", system)
tried("it fills the disk", fill)
tried("it starts any number of processes", forks)
print(json.dumps(found), flush=True)
"""


def _command(root: Path, program: Path, limits: SandboxLimits) -> Command:
    python = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    # unshare itself heeds no request to end.
    words = ["timeout", "--signal=KILL", f"{limits.wall_seconds:g}"]
    words += ["unshare", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    words += [] if os.geteuid() == 0 and _may_mount() else ["--user", "--map-root-user"]
    words += ["sh", "-c", _SETUP, "sandbox", str(root), str(program), str(limits.disk), python, *_shown(python)]
    path = os.pathsep.join(("/usr/bin", "/bin", "/usr/sbin", "/sbin"))
    return Command(("env", "-i", f"PATH={path}", *words), needs=ChildNeeds.NOTHING)


def _may_mount() -> bool:
    """Whether this process has the right to mount (CAP_SYS_ADMIN), as root in a container may not."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return False
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> 21 & 1)


def _shown(python: str) -> Iterator[str]:
    """What a program sees of this machine: libraries, and Python itself."""
    system = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store")
    yield from system
    for folder in dict.fromkeys((os.path.realpath(sys.base_prefix), os.path.dirname(os.path.dirname(python)))):  # noqa: PTH120
        if folder not in ("/", "/usr") and not folder.startswith(tuple(f"{each}/" for each in system)):
            yield folder


def _start_of(limits: SandboxLimits) -> str:
    bounds = [
        ("RLIMIT_CPU", limits.seconds),
        ("RLIMIT_AS", limits.memory),
        ("RLIMIT_FSIZE", limits.file),
        ("RLIMIT_NPROC", limits.processes),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
    ]
    return _START.format(limits=bounds, user=_USER if os.geteuid() == 0 and _may_mount() else 0, ready=_READY)


def _refused(why: str) -> ToolchainError:
    return ToolchainError(
        "Programs that a model wrote cannot be run here",
        f"the sandbox for them does not hold: {why}",
        "Leave out tasks that run code, or run them on Linux with user namespaces, not in a restricted container.",
    )
