"""Chat templates that mean harm, and processes that end: whoever published a model wrote its template, and it is a program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from imatrix_runner.chat import rendering
from imatrix_runner.chat.rendering import Limits, Unrendered, render
from imatrix_runner.chat.templates import MAX_TEMPLATE, ChatTemplate, load_template
from imatrix_runner.documents.documents import Conversation
from imatrix_runner.errors import EngineError, InterruptedRunError, InvalidDataError, NoSpaceError
from imatrix_runner.process import Runner
from imatrix_runner.signals import Stop
from support.children import eventually, is_running
from support.tiny_models import write_llama_gguf

CHAT = Conversation(({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}))
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
QUICK = Limits(seconds=1.0)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a bound on memory")


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, "<s>", "</s>", "hostile.gguf")


def chat(content: str) -> Conversation:
    return Conversation(({"role": "user", "content": content},))


def why(source: str, limits: Limits = QUICK) -> str:
    [result] = render(template(source), [CHAT], Runner(), limits=limits)
    assert isinstance(result, Unrendered), result
    return result.why


FORBIDDEN = "the template violates its sandbox"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ ''.__class__.__mro__ }}", FORBIDDEN),
        ("{{ cycler.__init__.__globals__ }}", FORBIDDEN),
        ("{{ messages.__class__.__base__.__subclasses__() }}", FORBIDDEN),
        ("{{ (''|attr('__class__')).mro() }}", FORBIDDEN),
        ("{{ raise_exception.__globals__['json'] }}", FORBIDDEN),
        ("{{ namespace.__init__.__globals__ }}", FORBIDDEN),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", FORBIDDEN),
        ("{{ messages.append(1) }}", FORBIDDEN),
        ("{{ messages[0].update(role='x') }}", FORBIDDEN),
        ("{{ ('{0.__class__.__mro__}' ~ '').format(1) }}", FORBIDDEN),
        ("{{ self._TemplateReference__context.x }}", FORBIDDEN),
        ("{% include '/etc/passwd' %}", "no loader for this environment specified"),
        ("{% import 'os' as os %}{{ os }}", "no loader for this environment specified"),
        ("{% extends '../secrets' %}", "no loader for this environment specified"),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
        ("{{ range(10**9)|list }}", "Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself without end"),
        ("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "output for it is too long"),
        ("{{ messages[0].content * 17000000 }}", "output for it is too long"),
        ("{{ strftime_now('%Y\x00') ~ messages[9].x }}", "the template fails in line 1"),
        pytest.param("{{ 'x' * 10**10 }}", "needs too much memory", marks=LINUX),
        pytest.param("{{ messages[0].content * 10**10 }}", "needs too much memory", marks=LINUX),
        pytest.param("{{ '%9999999999d' % messages|length }}", "needs too much memory", marks=LINUX),
        pytest.param("{{ messages[0].content.center(10**11) }}", "needs too much memory", marks=LINUX),
    ],
)
def test_a_hostile_template_comes_to_nothing(source: str, expected: str) -> None:
    assert expected in why(source)


@LINUX
def test_memory_that_grows_step_by_step_is_bounded() -> None:
    source = "{% set ns = namespace(a=messages[0].content) %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}"
    assert "needs too much memory" in why(source, Limits(memory=64 << 20))


@pytest.mark.parametrize(
    "source",
    [FOREVER, "{{ (messages|length + 5) ** (10 ** 9) }}", "{{ lipsum(n=10 ** 9) }}"],
    ids=["a loop", "one endless operation", "endless text"],
)
def test_a_template_that_never_ends_is_ended(source: str) -> None:
    began = time.monotonic()
    assert why(source) == "the template took longer than 1 s"
    assert time.monotonic() - began < 8


def test_a_conversation_that_never_ends_costs_no_other(tmp_path: Path) -> None:
    source = "{% for m in messages if m.content == 'loop' %}" + FOREVER + "{% endfor %}{{ messages[0].content }}"
    counts: list[int] = []
    contents = ["a", "loop", "b", "c", "loop"]
    results = render(template(source), [chat(each) for each in contents], Runner(), limits=QUICK, on_progress=counts.append)
    late = "the template took longer than 1 s"
    assert [getattr(each, "why", each) for each in results] == ["a", late, "b", "c", late]
    assert counts == sorted(counts)
    with pytest.raises(InvalidDataError, match=r"The chat template hostile\.gguf cannot be used") as caught:
        render(template(source), [chat("loop")] * 9, Runner(), limits=QUICK)
    assert caught.value.why == f"3 conversations failed; for the last one, {late}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n{% endif %}", "line 3: Encountered unknown tag 'endif'."),
        ("\n{{ messages|shout }}", "line 2: No filter named 'shout'."),
        ("{{ messages", "line 1: unexpected end of template"),
        ("{{ messages " + "(" * 9000, "nested too deeply"),
        ("{{ messages }}{{ 7 ** (10 ** 9) }}", "the template took longer than 1 s"),
        ("{{ '\x1b]0;mine\x07\n' }}{% x %}", "line 2: Encountered unknown tag 'x'."),
    ],
)
def test_a_template_that_does_not_compile_is_one_error(source: str, expected: str) -> None:
    with pytest.raises(InvalidDataError, match=r"The chat template hostile\.gguf cannot be compiled") as caught:
        render(template(source), [CHAT] * 3, Runner(), limits=QUICK)
    assert expected in caught.value.why
    assert caught.value.why.isprintable()


def test_texts_without_measure_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_FREE_BYTES", 1 << 20)
    with pytest.raises(InvalidDataError, match="writes too much"):
        render(template("{{ messages[0].content * 300000 }}"), [CHAT] * 9, Runner())


@pytest.mark.parametrize("kind", ["gguf", "jinja", "config"])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("messages" + "x" * (2 << 20), f"it is longer than {MAX_TEMPLATE >> 20} MiB"),
        ("messages\0", "it contains NUL characters"),
        (" \n", "it is empty"),
        ("rwkv-world", "it never uses `messages`"),
    ],
    ids=["2 MiB", "NUL", "empty", "a mere name"],
)
def test_what_is_no_template_is_refused(source: str, expected: str, kind: str, tmp_path: Path) -> None:
    model, file = tmp_path, None
    if kind == "gguf":
        model = write_llama_gguf(tmp_path / "m.gguf", layers=1, metadata={"tokenizer.chat_template": source})
    elif kind == "jinja":
        file = tmp_path / "mine.jinja"
        file.write_text(source, encoding="utf-8")
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}), encoding="utf-8")
    with pytest.raises(InvalidDataError, match=r"The chat template .* cannot be used") as caught:
        load_template(model, file)
    assert expected in caught.value.why


def test_a_file_that_cannot_be_read_as_a_template(tmp_path: Path) -> None:
    (tmp_path / "latin.jinja").write_bytes("{# schön #} messages".encode("latin-1"))
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for name, expected in (
        ("latin.jinja", "byte 6 is not valid UTF-8"),
        ("none.jinja", "there is no such file"),
        ("none.json", "there is no such file"),
        ("folder", "it is a folder"),
        ("broken.json", "cut short"),
    ):
        with pytest.raises(InvalidDataError) as caught:
            load_template(tmp_path, tmp_path / name)
        assert expected in caught.value.why


# -- processes that end ------------------------------------------------------------------------------------------------------


class Watched:
    """A runner whose children are known."""

    def __init__(self, stop: Stop | None = None) -> None:
        self.pids: list[int] = []
        self.runner = Runner(stop, on_child=lambda pid, alive: self.pids.append(pid) if alive else None)


@contextmanager
def once_it_computes(watched: Watched, act: Any) -> Iterator[None]:
    """``act(pid)`` as soon as the first child has used half a second of CPU: it is in its loop."""

    def wait() -> None:
        assert eventually(lambda: bool(watched.pids))
        child = psutil.Process(watched.pids[0])
        assert eventually(lambda: sum(child.cpu_times()[:2]) > 0.5)
        act(watched.pids[0])

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_a_stop_ends_a_template_that_loops() -> None:
    stop = Stop()
    watched = Watched(stop)
    asked: list[float] = []

    def ask(_pid: int) -> None:
        asked.append(time.monotonic())
        stop.request(signal.SIGINT)

    with once_it_computes(watched, ask), pytest.raises(InterruptedRunError, match="Stopped by SIGINT"):
        render(template(FOREVER), [CHAT], watched.runner, limits=Limits(seconds=60))
    assert time.monotonic() - asked[0] < 5
    assert len(watched.pids) == 1
    assert not psutil.pid_exists(watched.pids[0])


def test_a_child_that_is_killed_costs_one_conversation() -> None:
    watched = Watched()
    source = "{% for m in messages if m.content == 'loop' %}" + FOREVER + "{% endfor %}{{ messages[0].content }}"
    with once_it_computes(watched, lambda pid: psutil.Process(pid).kill()):
        results = render(template(source), [chat(each) for each in ("a", "loop", "b")], watched.runner)
    first, killed, last = results
    assert (first, last) == ("a", "b")
    assert isinstance(killed, Unrendered)
    assert killed.why.startswith("the template ended the process that ran it: killed by SIGKILL")
    assert len(set(watched.pids)) == 2


SCRIPT = """
import sys
import tempfile
from imatrix_runner.chat.rendering import Limits, render
from imatrix_runner.chat.templates import ChatTemplate
from imatrix_runner.documents.documents import Conversation
from imatrix_runner.process import Runner
from imatrix_runner.signals import Stop, stop_on_signals

stop = Stop()
runner = Runner(stop, on_child=lambda pid, alive: print(pid, flush=True) if alive else None)
chats = [Conversation(({"role": "user", "content": "hi"},))] * 1000
with stop_on_signals(stop):
    render(ChatTemplate(sys.argv[1], "", "", "t"), chats, runner, limits=Limits(seconds=float(sys.argv[2])))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 60), (signal.SIGTERM, 60), (signal.SIGKILL, 2)])
@pytest.mark.parametrize(
    "source", [FOREVER, "{% for a in range(99999) %}{% endfor %}{{ messages }}"], ids=["looping", "progressing"]
)
def test_no_child_outlives_its_parent(source: str, number: int, seconds: float, tmp_path: Path) -> None:
    """After SIGKILL nobody is left to end it: then its clock or its broken pipe does."""
    argv = [sys.executable, "-c", SCRIPT, source, str(seconds)]
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # what a killed parent leaves there
    parent = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert eventually(lambda: sum(psutil.Process(child).cpu_times()[:2]) > 0.4)
        parent.send_signal(number)
        assert eventually(lambda: not is_running(child), seconds=8)
        _, errors = parent.communicate(timeout=10)
    finally:
        parent.kill()
        parent.communicate()
    if number != signal.SIGKILL:
        assert b"InterruptedRunError" in errors


def test_a_child_that_cannot_start_is_no_fault_of_the_template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rendering, "_ROOT", tmp_path)  # which -m searches first
    (tmp_path / "jinja2.py").write_text("raise ImportError('no Jinja here')", encoding="utf-8")
    with pytest.raises(EngineError, match="did not start") as caught:
        render(template("{{ messages }}"), [CHAT], Runner())
    assert "no Jinja here" in caught.value.why
    assert "imatrix-runner doctor" in caught.value.todo


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_no_fault_of_the_template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @contextmanager
    def folder() -> Iterator[Path]:
        (tmp_path / "results-0.jsonl").symlink_to("/dev/full")
        yield tmp_path

    monkeypatch.setattr(rendering, "scratch_folder", folder)
    with pytest.raises(NoSpaceError, match="The disk is full while rendering conversations"):
        render(template("{{ messages }}"), [CHAT], Runner())


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert render(template("{{ messages|length }}"), [CHAT], Runner()) == ["2"]
    assert why(FOREVER) == "the template took longer than 1 s"
    with pytest.raises(InvalidDataError):
        render(template("{% messages"), [CHAT], Runner())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(InvalidDataError, match="while making a temporary folder"):
        render(template("{{ messages }}"), [CHAT], Runner())
