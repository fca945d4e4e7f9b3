"""Children are heard, logged, bounded in time and never left behind. Every child here is a real process."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import psutil
import pytest

from imatrix_runner import process
from imatrix_runner.errors import EngineError, InterruptedRunError
from imatrix_runner.process import (
    Command,
    Outcome,
    Runner,
    capture,
    child_environment,
    end_tree,
    relevant_lines,
)
from imatrix_runner.signals import Stop
from support.children import eventually, is_running, python

# Starts a helper that would outlive every test, says its pid, and waits for ever.
WITH_A_HELPER = """
    import subprocess, sys, time
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(helper.pid, flush=True)
    time.sleep(600)
"""


def test_both_streams_arrive_labelled_and_whole() -> None:
    heard: dict[str, str] = {"stdout": "", "stderr": ""}

    def listen(stream: str, text: str) -> None:
        heard[stream] += text

    outcome = Runner().run(python("import sys; print('to out'); print('to err', file=sys.stderr); sys.exit(3)"), on_text=listen)
    assert heard == {"stdout": "to out\n", "stderr": "to err\n"}
    assert outcome.returncode == 3
    assert not outcome.ok
    assert sorted(outcome.tail) == ["to err", "to out"]


def test_text_is_told_while_the_child_still_runs(tmp_path: Path) -> None:
    """The child waits for a file that only the listener removes."""
    script = """
        import os, sys, time
        print("ready", flush=True)
        while os.path.exists(sys.argv[1]):
            time.sleep(0.01)
    """
    gate = tmp_path / "gate"
    gate.touch()
    assert Runner(hang_seconds=30).run(python(script, gate), on_text=lambda _stream, _text: gate.unlink(missing_ok=True)).ok


def test_a_character_cut_in_two_by_the_pipe_is_put_together() -> None:
    script = """
        import os
        for byte in "ü€𝄞".encode():
            os.write(1, bytes([byte]))
    """
    pieces: list[str] = []
    Runner().run(python(script), on_text=lambda _stream, text: pieces.append(text))
    assert "".join(pieces) == "ü€𝄞"


def test_bytes_that_are_no_text_do_not_stop_anything() -> None:
    pieces: list[str] = []
    outcome = Runner().run(python(r"import os; os.write(1, b'a\xffb\n')"), on_text=lambda _stream, text: pieces.append(text))
    assert outcome.ok
    assert "".join(pieces) == "a\N{REPLACEMENT CHARACTER}b\n"


def test_the_tail_keeps_the_last_lines_and_drops_blank_ones() -> None:
    outcome = Runner().run(python("for i in range(1000): print(i, end='\\n\\n')\nprint('no line end', end='')"))
    assert outcome.tail[-3:] == ("998", "999", "no line end")
    assert 100 <= len(outcome.tail) < 1000


def test_a_progress_bar_is_a_row_of_lines() -> None:
    outcome = Runner().run(python(r"print(*(f'{i} %' for i in range(3)), sep='\r')"))
    assert outcome.tail == ("0 %", "1 %", "2 %")


def test_a_line_without_end_does_not_grow_without_bound() -> None:
    outcome = Runner().run(python("print('x' * 100_000 + 'end', end='')"))
    assert len(outcome.tail) == 1
    assert len(outcome.tail[0]) < 10_000
    assert outcome.tail[0].endswith("end")


def test_the_log_holds_the_command_and_every_byte_of_each_run(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "step.log"
    commands = [python(r"import os; os.write(1, b'one\r\xff\n')"), python("import sys; print('two', file=sys.stderr)")]
    for command in commands:
        assert Runner().run(command, log=log).log == log
    first, second = (f"$ {command}\n".encode() for command in commands)
    assert log.read_bytes() == first + b"one\r\xff\n" + second + b"two\n"


def test_a_child_reads_nothing_from_our_terminal() -> None:
    assert Runner().run(python("import sys; sys.exit(len(sys.stdin.read()))")).returncode == 0


def test_a_program_that_does_not_exist_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="no-such-program could not be started") as caught:
        Runner().run(Command(("/nowhere/no-such-program",)))
    assert "No such file" in caught.value.why


def test_a_command_is_shown_as_it_could_be_typed() -> None:
    assert str(Command(("tool", "a b", "$HOME"))) == "tool 'a b' '$HOME'"
    assert str(Command(("tool",), cwd=Path("/my dir"))) == "cd '/my dir' && tool"


def test_cwd_and_environment_reach_the_child(tmp_path: Path) -> None:
    command = python("import os; print(os.getcwd(), os.environ['WANTED'])")
    outcome = Runner().run(Command(command.argv, cwd=tmp_path, env={"WANTED": "yes"}))
    assert outcome.tail == (f"{tmp_path} yes",)


def test_variables_that_change_llama_cpp_do_not_reach_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_ARG_CTX_SIZE", "LLAMA_LOG_FILE", "GGML_SCHED_DEBUG", "GGML_VK_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    told = capture(python("import json, os; print(json.dumps(dict(os.environ)))"), seconds=60)
    seen = json.loads(told.stdout)
    assert seen["GGML_VK_VISIBLE_DEVICES"] == "1"
    assert not {"LLAMA_ARG_CTX_SIZE", "LLAMA_LOG_FILE", "GGML_SCHED_DEBUG"} & seen.keys()
    assert child_environment({"LLAMA_ARG_OURS": "x"})["LLAMA_ARG_OURS"] == "x"


def test_threads_that_wait_do_not_burn_the_processor_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT")  # the tests' own
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert int(child_environment()["GOMP_SPINCOUNT"]) < 300_000
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "GOMP_SPINCOUNT" not in child_environment()
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert child_environment()["GOMP_SPINCOUNT"] == "7"


def test_a_listener_that_raises_ends_the_child() -> None:
    pids: list[int] = []

    def refuse(_stream: str, text: str) -> None:
        pids.append(int(text))
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        Runner().run(python("import os, time; print(os.getpid(), flush=True); time.sleep(600)"), on_text=refuse)
    assert not is_running(pids[0])


def test_who_watches_children_hears_of_birth_and_end() -> None:
    told: list[tuple[int, bool]] = []
    Runner(on_child=lambda pid, alive: told.append((pid, alive))).run(python("pass"))
    (first, born), (second, alive) = told
    assert first == second
    assert (born, alive) == (True, False)


def test_a_silent_idle_child_counts_as_hung() -> None:
    outcome = Runner(hang_seconds=0.5).run(python("import time; print('last words', end='', flush=True); time.sleep(600)"))
    assert outcome.hung
    assert not outcome.ok
    assert outcome.tail == ("last words",)
    assert "used no CPU time" in outcome.ending()


def test_a_child_that_closed_its_streams_can_hang_too() -> None:
    outcome = Runner(hang_seconds=0.5).run(python("import os, time; os.close(1); os.close(2); time.sleep(600)"))
    assert outcome.hung


def test_a_silent_child_whose_helpers_compute_is_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short-lived helpers, as a build has them: none lives long enough to be seen with much time of its own. The clock is the
    time that they used, so that it does not matter how much of the machine other programs hold."""
    script = """
        import os, subprocess, sys
        burn = "import time\\nend = time.process_time() + 0.3\\nwhile time.process_time() < end: pass"
        while os.times().children_user < 2.5:
            for helper in [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(3)]:
                helper.wait()
    """
    children, used = list[psutil.Process](), [0.0]

    def clock() -> float:
        with suppress(psutil.Error):
            used.extend(time.children_user + time.children_system for time in (child.cpu_times() for child in children))
        return used[-1]

    def on_child(pid: int, alive: bool) -> None:
        if alive:
            children.append(psutil.Process(pid))

    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    assert Runner(hang_seconds=1, on_child=on_child).run(python(script)).ok
    assert used[-1] > 2


def test_without_a_limit_silence_is_no_reason_to_end_a_child() -> None:
    assert Runner(hang_seconds=0).run(python("import time; time.sleep(0.6)")).ok


def test_a_stop_ends_the_child_and_what_it_started() -> None:
    stop, family = Stop(), list[int]()

    def on_text(_stream: str, text: str) -> None:
        family.append(int(text))
        stop.request(signal.SIGTERM)

    runner = Runner(stop, on_child=lambda pid, _alive: family.append(pid))
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        runner.run(python(WITH_A_HELPER), on_text=on_text)
    assert len(set(family)) == 2
    assert eventually(lambda: not any(map(is_running, family)))


def test_after_a_stop_nothing_new_is_started() -> None:
    stop = Stop()
    stop.request()
    with pytest.raises(InterruptedRunError, match="a request to stop"):
        Runner(stop).run(Command(("/never/started",)))


def test_who_ignores_the_request_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.2)
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen(python(script).argv, stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        end_tree(stubborn.pid)
        assert not is_running(stubborn.pid)


def test_ending_who_is_gone_is_no_error() -> None:
    gone = subprocess.Popen(python("").argv)
    gone.wait()
    end_tree(gone.pid)


def test_a_grandchild_that_keeps_the_pipes_open_does_not_keep_us() -> None:
    script = """
        import subprocess, sys
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(helper.pid, flush=True)
    """
    outcome = Runner().run(python(script))
    helper = int(outcome.tail[0])
    psutil.Process(helper).kill()
    assert outcome.ok
    assert outcome.seconds < 60


def test_the_last_words_of_a_child_are_heard_after_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the thread that reads them comes late."""
    pump = process._pump

    def late(name: process.Stream, pipe: IO[bytes], reads: queue.SimpleQueue[tuple[process.Stream, bytes]]) -> None:
        heard: queue.SimpleQueue[tuple[process.Stream, bytes]] = queue.SimpleQueue()
        pump(name, pipe, heard)
        time.sleep(0.45)
        while not heard.empty():
            reads.put(heard.get())

    monkeypatch.setattr(process, "_pump", late)
    monkeypatch.setattr(process, "_POLL_SECONDS", 0.6)
    assert Runner().run(python("import time; time.sleep(0.3); print('last words')")).tail == ("last words",)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_our_child_before_us(signum: signal.Signals) -> None:
    script = f"""
        import sys
        from imatrix_runner.errors import InterruptedRunError
        from imatrix_runner.process import Command, Runner
        from imatrix_runner.signals import stop_on_signals
        runner = Runner(on_child=lambda pid, alive: print(pid, alive, flush=True))
        with stop_on_signals(runner.stop):
            try:
                child = Command((sys.executable, "-c", {textwrap.dedent(WITH_A_HELPER)!r}))
                runner.run(child, on_text=lambda _, text: print(text, flush=True))
            except InterruptedRunError as error:
                print(error.what, flush=True)
                sys.exit(error.exit_code)
    """
    with subprocess.Popen(python(script).argv, stdout=subprocess.PIPE, text=True) as ours:
        assert ours.stdout is not None
        child = int(ours.stdout.readline().split()[0])
        helper = int(ours.stdout.readline())
        ours.send_signal(signum)
        rest = ours.stdout.read()
        assert ours.wait(30) == 130
    assert f"Stopped by {signum.name}" in rest
    assert f"{child} False" in rest
    assert eventually(lambda: not is_running(child) and not is_running(helper))


def test_capture_keeps_what_was_said() -> None:
    told = capture(python("import sys; print('o'); print('e', file=sys.stderr); sys.exit(4)"), seconds=60)
    assert (told.returncode, told.stdout, told.stderr) == (4, "o\n", "e\n")


def test_capture_has_a_time_limit() -> None:
    with pytest.raises(TimeoutError, match=r"no answer within 0\.3 s"):
        capture(python("import time; time.sleep(600)"), seconds=0.3)


def test_capture_of_nothing_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        capture(Command(("/nowhere/tool",)), seconds=1)


@pytest.mark.parametrize(
    ("code", "hung", "out_of_memory", "phrase"),
    [
        (0, False, False, "exit code 0"),
        (134, False, False, "exit code 134"),
        (-signal.SIGABRT, False, False, "killed by SIGABRT (the program aborted)"),
        (-signal.SIGKILL, False, False, "killed by SIGKILL (by the kernel when memory ran out, or by another program)"),
        (-signal.SIGKILL, False, True, "killed by SIGKILL: the machine ran out of memory"),
        (-signal.SIGTERM, True, False, "it wrote no output and used no CPU time, and was ended"),
        (-200, False, False, "killed by signal 200"),
    ],
)
def test_an_ending_is_one_phrase(code: int, hung: bool, out_of_memory: bool, phrase: str) -> None:
    outcome = Outcome(Command(("x",)), code, 1.0, (), None, hung=hung, out_of_memory=out_of_memory)
    assert outcome.ending() == phrase
    assert outcome.ok is (code == 0)


@pytest.mark.parametrize(("kills_before", "kills_after", "expected"), [(4, 5, True), (4, 4, False)])
def test_a_killed_child_is_blamed_on_memory_only_if_the_kernel_killed_someone(
    kills_before: int, kills_after: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter((kills_before, kills_after))
    monkeypatch.setattr(process, "_oom_kills", lambda: next(counts))
    outcome = Runner().run(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert outcome.returncode == -signal.SIGKILL
    assert outcome.out_of_memory is expected


def test_relevant_lines_are_those_about_errors_else_the_last() -> None:
    lines = ["start", "error: one", "more", "Fatal: two", "end"]
    assert relevant_lines(lines) == ("error: one", "Fatal: two")
    assert relevant_lines(lines, 1) == ("Fatal: two",)
    assert relevant_lines(["a", "b", "c"], 2) == ("b", "c")
    assert relevant_lines([]) == ()
