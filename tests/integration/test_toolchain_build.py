"""Builds with the real CMake, compiler, git and pip, of a project small enough to be built in seconds.

Its targets have the names of llama.cpp's tools and say what those say; a compiler launcher counts, and slows, every
compilation, so that a build can be killed in its middle and what is compiled twice is seen.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from imatrix_runner.errors import DownloadError, InterruptedRunError, ToolchainError
from imatrix_runner.events import Event, Finished, Notice, Progress, Started, info
from imatrix_runner.files import read_json
from imatrix_runner.process import Runner
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain import build as building
from imatrix_runner.toolchain.amx import WITHOUT_AMX, AmxBuild
from imatrix_runner.toolchain.build import BuildRequest, build
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.probe import TOOLS
from imatrix_runner.toolchain.store import RECORD, BuildRecord, Store

pytestmark = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("cmake", "cc", "ninja", "make", "git")),
    reason="needs cmake, cc, ninja, make and git",
)

PARTS = 6
CMAKE = f"""\
cmake_minimum_required(VERSION 3.14)
project(llama.cpp C)
set(LLAMA_VERSION_MAJOR 0)
set(LLAMA_VERSION_MINOR 5)
set(LLAMA_VERSION_PATCH 0)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
add_library(llama SHARED {" ".join(f"part{n}.c" for n in range(PARTS))})
set_target_properties(llama PROPERTIES VERSION 0.5.0 SOVERSION 0)
foreach(tool {" ".join(TOOLS)})
  add_executable(${{tool}} tools/imatrix/tool.c)
  target_compile_definitions(${{tool}} PRIVATE COMMIT="${{LLAMA_BUILD_COMMIT}}")
  target_link_libraries(${{tool}} PRIVATE llama)
endforeach()
"""
TOOL = r"""
#include <stdio.h>
#include <string.h>
int part0(void);
int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--version")) fprintf(stderr, "version: 0.5.0-dev (build 0, commit %s)\n", COMMIT);
    else printf("  --imatrix FILE   x\nallowed quantization types\n   2  or  Q4_0 : %d bpw\n", part0());
    return 0;
}
"""
BACKEND = """\
def prepare_metadata_for_build_wheel(directory, settings=None):
    import pathlib
    info = pathlib.Path(directory) / "llama_cpp_python-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 9.9.9\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\n")
    return info.name
def build_wheel(*arguments): raise SystemExit("the source is wanted, not a wheel")
"""


def project(path: Path) -> Path:
    """A llama.cpp checkout in miniature."""
    (path / "tools" / "imatrix").mkdir(parents=True)
    (path / "CMakeLists.txt").write_text(CMAKE, encoding="utf-8")
    (path / "tools" / "imatrix" / "tool.c").write_text(TOOL, encoding="utf-8")
    for number in range(PARTS):
        (path / f"part{number}.c").write_text(f"int part{number}(void) {{ return {number + 4}; }}\n", encoding="utf-8")
    (path / "convert_hf_to_gguf.py").write_text("import conversion\n", encoding="utf-8")
    for part in ("conversion", "gguf-py/gguf", "gguf-py/tests"):
        (path / part).mkdir(parents=True)
        (path / part / "__init__.py").touch()
    (path / "LICENSE").write_text("MIT", encoding="utf-8")
    return path


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are x86-64's")
def test_what_the_compiler_builds_wrong_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags reach the compiler, after those of the environment."""
    tree = project(tmp_path / "llama.cpp")
    check = "#if WITH != 1 || !defined(__SSE2__) || defined(__AMX_INT8__)\n#error flags\n#endif\n"
    (tree / "part0.c").write_text(f"{check}int part0(void) {{ return 4; }}\n", encoding="utf-8")
    monkeypatch.setattr(building, "amx_build", lambda _find, tree: AmxBuild((*WITHOUT_AMX, "-msse2"), f"of {tree.name}"))
    monkeypatch.setenv("CFLAGS", "-DWITH=1 -mamx-int8")
    events: list[Event] = []
    made = build(BuildRequest(source=tree, cache=tmp_path / "cache", jobs=2), Runner(), events.append)
    assert info("AMX is left out of the build: of llama.cpp.") in events
    record = read_json(made.directory.parent / RECORD, BuildRecord)
    assert "-DCMAKE_C_FLAGS=-DWITH=1 -mamx-int8 -mno-amx-tile -mno-amx-int8 -msse2" in record.flags


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Compile slowly, and write each compiled object's name into the returned file when it is whole.

    While a file ``hold`` lies beside it, compilations wait.
    """
    log, launcher = tmp_path / "compiled.log", tmp_path / "launcher"
    launcher.write_text(
        f"""#!/bin/sh
case "$*" in *llama*.c.o*) ;; *) exec "$@" ;; esac
sleep 0.15
while [ -e {tmp_path}/hold ]; do sleep 0.05; done
"$@" || exit
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo "$2" >> {log}; shift; done
exit 0
""",
        encoding="utf-8",
    )
    launcher.chmod(0o755)
    log.touch()
    monkeypatch.setenv("CMAKE_C_COMPILER_LAUNCHER", str(launcher))
    return log


def counts(log: Path) -> Counter[str]:
    return Counter(log.read_text(encoding="utf-8").split())


Spawn = Callable[[BuildRequest], subprocess.Popen[bytes]]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start the same build in a process of its own, to be killed."""
    code = (
        "import sys; from pathlib import Path; from imatrix_runner.process import Runner\n"
        "from imatrix_runner.toolchain.build import BuildRequest, build\n"
        "build(BuildRequest(source=Path(sys.argv[1]), cache=Path(sys.argv[2]), jobs=1), Runner(), lambda event: None)\n"
    )
    root = str(Path(building.__file__).parents[2])
    started: list[subprocess.Popen[bytes]] = []

    def start(request: BuildRequest) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", code, str(request.source), str(request.cache)]
        started.append(subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": root}))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.wait()


def wait_for(log: Path, lines: int) -> None:
    limit = time.monotonic() + 30
    while len(log.read_text(encoding="utf-8").split()) < lines:
        assert time.monotonic() < limit, "the build does not get on"
        time.sleep(0.01)


def test_a_build_from_a_checkout(tmp_path: Path) -> None:
    tree = project(tmp_path / "llama.cpp")
    before = sorted(path for path in tree.rglob("*"))
    events: list[Event] = []
    request = BuildRequest(source=tree, cache=tmp_path / "cache", jobs=2)
    made = build(request, Runner(), events.append)

    assert set(made.tools) == set(TOOLS)
    assert made.origin == "managed cache"
    # Programs run from their own folder, with their libraries beside them under the names Python looks for.
    assert (made.directory / "libllama.so").resolve() == made.directory / "libllama.so.0.5.0"
    assert made.converter == made.directory.parent / "converter" / "convert_hf_to_gguf.py"
    assert (made.directory.parent / "converter" / "gguf-py" / "gguf" / "__init__.py").is_file()
    assert not (made.directory.parent / "converter" / "gguf-py" / "tests").exists()
    record = read_json(made.directory.parent / RECORD, BuildRecord)
    assert (record.kind, record.backend, record.source) == ("directory", "cpu", str(tree))
    assert made.commit == record.commit  # two states of one checkout are never taken for each other
    assert made.commit.startswith("tree-")
    assert record.identity == made.identity()
    assert record.cmake.count(".") == 2
    # Nothing else stays, and the checkout is untouched.
    cache = Store(tmp_path / "cache")
    assert list(cache.builds.iterdir()) == []
    assert [path.name for path in cache.toolchains.iterdir()] == [record.key]
    assert sorted(path for path in tree.rglob("*")) == before

    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total
    assert len(progress) > PARTS
    assert [type(event) for event in events if isinstance(event, Started | Finished)] == [Started, Finished]
    assert f"[{PARTS}/" in (cache.logs / f"build-{record.key}.log").read_text(encoding="utf-8")

    # The second time it is there at once, and locate finds it.
    events.clear()
    began = time.monotonic()
    assert build(request, Runner(), events.append) == made
    assert time.monotonic() - began < 2
    assert [type(event) for event in events] == [Notice]
    assert require(locate(None, env={}, cache=tmp_path / "cache")) == made
    # An edit in the checkout asks for another build.
    (tree / "part0.c").write_text("int part0(void) { return 8; }\n", encoding="utf-8")
    other = build(request, Runner(), events.append)
    assert other.directory != made.directory
    assert other.types[0].help == "8 bpw"


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, compiled: Path, spawn: Spawn) -> None:
    request = BuildRequest(source=project(tmp_path / "llama.cpp"), cache=tmp_path / "cache", jobs=1)
    child = spawn(request)
    wait_for(compiled, 4)
    family = [child, *psutil.Process(child.pid).children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):  # a compiler ends of its own meanwhile
            process.kill()
    child.wait()
    finished = counts(compiled)
    assert 4 <= len(finished) < PARTS + len(TOOLS)
    assert not list(Store(request.cache).toolchains.glob("*"))

    made = build(request, Runner(), lambda event: None)
    assert set(made.tools) == set(TOOLS)
    again = counts(compiled)
    assert len(again) == PARTS + len(TOOLS)
    # At most the one object in the making when the signal came is compiled twice.
    assert sum(again.values()) <= PARTS + len(TOOLS) + 1
    assert sum(again[name] == 1 for name in finished) >= len(finished) - 1


def test_what_a_killed_build_left_running_is_ended_first(tmp_path: Path, compiled: Path, spawn: Spawn) -> None:
    request = BuildRequest(source=project(tmp_path / "llama.cpp"), cache=tmp_path / "cache", jobs=1)
    child = spawn(request)
    wait_for(compiled, 2)
    (builder,) = (one for one in psutil.Process(child.pid).children() if one.name() == "cmake")
    hold = tmp_path / "hold"
    hold.touch()
    child.kill()  # the program alone: what it started lives on
    child.wait()
    time.sleep(0.3)
    assert builder.is_running()

    def release_when_gone() -> None:
        psutil.wait_procs([builder], timeout=20)
        hold.unlink()

    threading.Thread(target=release_when_gone).start()
    made = build(request, Runner(), lambda event: None)
    assert set(made.tools) == set(TOOLS)
    assert not builder.is_running()
    assert set(counts(compiled).values()) == {1}  # the orphan was ended before it could go on beside us


def test_a_killed_make_build_does_not_trust_torn_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Path) -> None:

    def without_ninja(name: str) -> str | None:
        return None if name == "ninja" else shutil.which(name)

    monkeypatch.setattr("imatrix_runner.toolchain.build.finder", lambda env: without_ninja)
    stop = Stop()
    request = BuildRequest(source=project(tmp_path / "llama.cpp"), cache=tmp_path / "cache", jobs=1)

    def interrupt(event: Event) -> None:
        if len(counts(compiled)) >= 4:
            stop.request(signal.SIGINT)

    with pytest.raises(InterruptedRunError):
        build(request, Runner(stop), interrupt)
    (build_dir,) = Store(request.cache).builds.iterdir()
    assert (build_dir / "Makefile").is_file()
    newest = max(build_dir.rglob("*.c.o"), key=lambda path: path.stat().st_mtime)
    newest.write_bytes(newest.read_bytes()[:100])  # as SIGKILL in the middle of a write leaves it
    events: list[Event] = []
    made = build(request, Runner(), events.append)
    assert set(made.tools) == set(TOOLS)
    assert [event.total for event in events if isinstance(event, Progress)][-1] == 100
    twice = [name for name, number in counts(compiled).items() if number > 1]
    assert len(twice) <= 2


def test_two_builds_at_once_make_one(tmp_path: Path, compiled: Path, spawn: Spawn) -> None:
    request = BuildRequest(source=project(tmp_path / "llama.cpp"), cache=tmp_path / "cache", jobs=2)
    child = spawn(request)
    wait_for(compiled, 1)
    events: list[Event] = []
    made = build(request, Runner(), events.append)
    assert child.wait() == 0
    assert set(made.tools) == set(TOOLS)
    assert [event.text[:7] for event in events if isinstance(event, Notice)] == ["Another", "Already"]
    assert set(counts(compiled).values()) == {1}


def test_a_wait_for_another_build_can_be_stopped(tmp_path: Path) -> None:
    store, stop = Store(tmp_path / "cache"), Stop()
    with store.locked("build", Stop(), lambda event: None):
        threading.Timer(0.2, stop.request).start()
        with pytest.raises(InterruptedRunError), store.locked("build", stop, lambda event: None):
            pytest.fail("the lock is taken")


def test_a_compiler_error_shows_its_lines_and_the_log(tmp_path: Path) -> None:
    tree = project(tmp_path / "llama.cpp")
    (tree / "part3.c").write_text("int part3(void) { return undeclared_thing; }\n", encoding="utf-8")
    request = BuildRequest(source=tree, cache=tmp_path / "cache", jobs=1)
    events: list[Event] = []
    with pytest.raises(ToolchainError) as caught:
        build(request, Runner(), events.append)
    assert "undeclared_thing" in caught.value.why
    assert len(caught.value.why.splitlines()) <= 11
    (log,) = Store(request.cache).logs.glob("build-*.log")
    assert str(log) in caught.value.todo
    assert "undeclared_thing" in log.read_text(encoding="utf-8")
    assert isinstance(events[-1], Finished)
    assert events[-1].status == "failed"
    assert not list(Store(request.cache).toolchains.glob("*"))


def test_binaries_that_do_not_run_never_become_a_toolchain(tmp_path: Path) -> None:
    tree = project(tmp_path / "llama.cpp")
    (tree / "tools" / "imatrix" / "tool.c").write_text("#include <stdlib.h>\nint main(void) { abort(); }\n", encoding="utf-8")
    with pytest.raises(ToolchainError, match="does not run") as caught:
        build(BuildRequest(source=tree, cache=tmp_path / "cache", jobs=2), Runner(), lambda event: None)
    assert "SIGABRT" in caught.value.why
    assert list((tmp_path / "cache" / "toolchains").iterdir()) == []


def test_a_tag_by_git(tmp_path: Path) -> None:
    tree = project(tmp_path / "upstream")
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    steps = (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "x"), (*identity, "tag", "-am", "t", "b77"))
    for arguments in steps:
        subprocess.run(["git", "-C", str(tree), *arguments], check=True)
    head = subprocess.check_output(["git", "-C", str(tree), "rev-parse", "HEAD"], text=True)
    request = BuildRequest(ref="b77", url=tree.as_uri(), cache=tmp_path / "cache", jobs=2)
    made = build(request, Runner(), lambda event: None)
    assert made.commit == head[:9]
    record = read_json(made.directory.parent / RECORD, BuildRecord)
    assert (record.kind, record.version, record.key) == ("git", "b77", f"b77-{head[:9]}-cpu")
    assert "-DLLAMA_BUILD_NUMBER=77" in record.flags
    assert list(Store(request.cache).sources.iterdir()) == []

    with pytest.raises(DownloadError, match="no tag b78"):
        build(BuildRequest(ref="b78", url=tree.as_uri(), cache=tmp_path / "cache"), Runner(), lambda event: None)
    with pytest.raises(DownloadError, match="could not be fetched"):
        build(BuildRequest(ref="b77", url=(tmp_path / "no").as_uri(), cache=tmp_path / "cache"), Runner(), lambda event: None)


def test_a_source_distribution_by_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "llama_cpp_python-9.9.9"
    project(top / "vendor" / "llama.cpp")
    (top / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9.9\n", encoding="utf-8")
    backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (top / "pyproject.toml").write_text(backend, encoding="utf-8")
    (top / "backend.py").write_text(BACKEND, encoding="utf-8")
    (top / "CHANGELOG.md").write_text("- feat: update llama.cpp to ggml-org/llama.cpp@0c1e57098\n", encoding="utf-8")
    index = tmp_path / "index"
    index.mkdir()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(top, top.name)
    (index / f"{top.name}.tar.gz").write_bytes(packed.getvalue())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    with pytest.raises(DownloadError, match="no source of that version"):
        build(BuildRequest(version="9.9.8", cache=tmp_path / "cache"), Runner(), lambda event: None)
    request = BuildRequest(version="9.9.9", cache=tmp_path / "cache", jobs=2)
    made = build(request, Runner(), lambda event: None)
    assert made.identity() == "llama.cpp 0.5.0-dev commit 0c1e57098"
    assert made.directory.parent.name == "9.9.9-0c1e57098-cpu"
    assert len(read_json(made.directory.parent / RECORD, BuildRecord).sha256) == 64
    assert sorted(path.name for path in Store(request.cache).downloads.iterdir()) == [
        f"{top.name}.tar.gz",
        f"{top.name}.tar.gz.sha256",
    ]
    # What is built is known without index, download or compiler.
    shutil.rmtree(Store(request.cache).downloads)
    monkeypatch.setattr("imatrix_runner.toolchain.build.finder", lambda env: lambda name: None)
    assert build(request, Runner(), lambda event: None) == made
