"""Programs that a model wrote: what they may do, what they try, and what is refused where the sandbox does not hold."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from imatrix_runner.errors import ToolchainError
from imatrix_runner.evaluate.tasks import sandbox
from imatrix_runner.evaluate.tasks.code_metric import CodeMetric, CodeNotAllowedError
from imatrix_runner.evaluate.tasks.sandbox import SandboxLimits, check_sandbox, run_sandboxed


@pytest.fixture(autouse=True, scope="module")
def holds() -> None:
    """Some machines have no namespaces: there nothing is run, which is the one thing to test."""
    try:
        check_sandbox()
    except ToolchainError as error:
        pytest.skip(str(error))


def test_an_ordinary_program_passes_and_a_failed_test_does_not() -> None:
    passed = run_sandboxed("import math, re, collections\nprint(math.comb(5, 2))\nassert 1 + 1 == 2")
    assert (passed.passed, passed.why, passed.stdout.strip()) == (True, "", "10")
    failed = run_sandboxed("def f(x):\n    return x\nassert f(1) == 2")
    assert (failed.passed, failed.why) == (False, "AssertionError")
    assert not run_sandboxed("def f(").passed
    assert not run_sandboxed("import sys\nsys.exit(0)\nassert False").passed
    assert not run_sandboxed("import os\nos._exit(0)\nassert False").passed


def test_the_network_is_out_of_reach() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        tried = run_sandboxed(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)")
        assert not tried.passed
        assert "unreachable" in tried.why or "refused" in tried.why
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not run_sandboxed("import socket\nsocket.getaddrinfo('example.org', 80)").passed


def test_files_of_this_machine_are_neither_read_nor_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret", encoding="utf-8")
    for program in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w').write('changed')",
        "open('/etc/passwd').read()",
        "open('/usr/lib/escape', 'w')",
        "open('/program.py', 'w')",
        "import os\nos.listdir('/proc/1')",
        "import os\nos.chroot('/')",
        "import subprocess\nsubprocess.run(['mount', '-t', 'tmpfs', 'x', '/tmp'], check=True)",
        "import os\nos.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))",
    ):
        assert not run_sandboxed(program).passed, program
    assert secret.read_text(encoding="utf-8") == "secret"
    seen = run_sandboxed("import os\nprint(sorted(os.environ), os.getuid())")
    assert seen.stdout.split("]")[0].count("'") == 6
    if os.geteuid() == 0:
        assert seen.stdout.split()[-1] != "0"


def test_fork_bombs_endless_loops_and_full_disks_end() -> None:
    began, limits = time.monotonic(), SandboxLimits(seconds=1, wall_seconds=3)
    for program in (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import signal\nfor each in (signal.SIGTERM, signal.SIGXCPU): signal.signal(each, signal.SIG_IGN)\nwhile True: pass",
        "held = []\nwhile True: held.append(bytes(1 << 20))",
        "number = 0\nwhile True:\n    number += 1\n    open(f'/tmp/{number}', 'wb').write(bytes(1 << 20))",
        "with open('/tmp/large', 'wb') as file:\n    while True: file.write(bytes(1 << 20))",
        "while True: print('x' * 100000)",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'], start_new_session=True)\n1 / 0",
    ):
        assert not run_sandboxed(program, limits).passed, program
    assert time.monotonic() - began < 9 * 15
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert " /start.py" not in left


def test_where_it_does_not_hold_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_SETUP", 'exec "$4" "$2.start"')
    with pytest.raises(ToolchainError) as caught:
        check_sandbox()
    assert "does not hold" in caught.value.why
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ToolchainError, match="darwin"):
        check_sandbox()


def test_the_metric_runs_nothing_that_was_not_allowed() -> None:
    with pytest.raises(CodeNotAllowedError):
        CodeMetric(allowed=False).compute(references=["assert add(2, 3) == 5"], predictions=[["def add(a, b): return a + b"]])
    metric = CodeMetric(allowed=True)
    candidates = ["def add(a, b): return a + b", "def add(a, b): return a * b", ""]
    shares, results = metric.compute(references=["assert add(2, 3) == 5"], predictions=[candidates], k=[1, 2])
    assert [each["passed"] for _, each in results[0]] == [True, False, False]
    assert shares == {"pass@1": pytest.approx(1 / 3), "pass@2": pytest.approx(2 / 3)}
