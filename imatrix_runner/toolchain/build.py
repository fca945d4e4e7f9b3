"""Builds llama.cpp's tools from source into the managed cache: a pure plan, then a build that can resume at any moment."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from imatrix_runner.environment import ChildNeeds
from imatrix_runner.errors import NoSpaceError, RunnerError, ToolchainError, UsageError, from_os_error
from imatrix_runner.events import Finished, Progress, Saved, Sink, Started, info
from imatrix_runner.files import require_space
from imatrix_runner.process import Command, Outcome, Runner, end_tree, relevant_lines
from imatrix_runner.toolchain.amx import amx_build
from imatrix_runner.toolchain.diagnose import diagnose, finder, manager, missing_needs, needs_advice, tool_path
from imatrix_runner.toolchain.probe import CONVERTER, TOOLS, Toolchain, executable
from imatrix_runner.toolchain.program_proof import warn_of_weakness
from imatrix_runner.toolchain.source import (
    TESTED_VERSION,
    UPSTREAM,
    LlamaCppSource,
    default_version,
    directory_source,
    fetch_sdist,
    git_source,
    unpack_source,
)
from imatrix_runner.toolchain.store import BuildRecord, Store, cache_dir, now, safe_name

BACKENDS: Mapping[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("-DGGML_CUDA=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
    "metal": ("-DGGML_METAL=ON",),
    "hip": ("-DGGML_HIP=ON",),
}
SPACE_NEEDED = 1_200 << 20
SPACE_NEEDED_GPU = 4 << 30
BYTES_PER_JOB = 1_536 << 20

_STEP = "build"
_PLAN_FILE = "imatrix-runner.plan"
_FAILED_FILE = "imatrix-runner.failed"
_LIBRARIES = re.compile(r"\.(?:so(?:\.[\d.]+)?|dylib|dll|metallib|metal)$")
_CONVERTER_PARTS = ("conversion", "gguf-py", "models/templates", "LICENSE", "licenses")
_BUILDERS = frozenset({"cmake", "ninja", "make", "gmake"})
_COUNTER = re.compile(r"^\[\s*(?:(\d{1,9})/(\d{1,9})|(\d{1,3})%)\]")


@dataclass(frozen=True)
class BuildRequest:
    """What to build. Of ``source`` (a checkout), ``ref`` (a tag) and ``version`` (of llama-cpp-python) at most one.

    ``jobs`` None: as many as processors and memory allow. ``force`` builds again even if it is there.
    """

    backend: str = "cpu"
    source: Path | None = None
    ref: str | None = None
    version: str | None = None
    jobs: int | None = None
    force: bool = False
    cache: Path = field(default_factory=cache_dir)
    url: str = UPSTREAM


@dataclass(frozen=True)
class BuildPlan:
    """Everything that is decided before the build starts: names, folders and the two commands."""

    key: str
    backend: str
    jobs: int
    build_dir: Path
    flags: tuple[str, ...]
    configure: tuple[str, ...]
    compile: tuple[str, ...]


def plan_build(
    request: BuildRequest,
    source: LlamaCppSource,
    *,
    cmake: str,
    ninja: bool,
    jobs: int,
    system: str = sys.platform,
) -> BuildPlan:
    """Decide key, folders and commands. Pure: the same facts give the same plan."""
    key = safe_name(f"{source.version}-{source.commit or 'unknown'}-{request.backend}")
    build_dir = Store(request.cache).builds / key
    flags = (
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP")),
        "-DLLAMA_OPENSSL=OFF",
        # The libraries are next to the programs, wherever the folder is moved to.
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
        f"-DCMAKE_INSTALL_RPATH={'@loader_path' if system == 'darwin' else '$ORIGIN'}",
        *BACKENDS[request.backend],
        *(("-DGGML_METAL=OFF",) if system == "darwin" and request.backend == "cpu" else ()),
        *((f"-DLLAMA_BUILD_COMMIT={source.commit}",) if source.commit else ()),
        *_build_number(source),
    )
    generator = ("-G", "Ninja") if ninja else ()
    return BuildPlan(
        key=key,
        backend=request.backend,
        jobs=jobs,
        build_dir=build_dir,
        flags=flags,
        configure=(cmake, "-S", str(source.tree), "-B", str(build_dir), *generator, *flags),
        compile=(cmake, "--build", str(build_dir), "--config", "Release", "--parallel", str(jobs), "--target", *TOOLS),
    )


def with_flags(plan: BuildPlan, flags: Sequence[str], env: Mapping[str, str]) -> BuildPlan:
    """Return the plan with flags for the C and C++ compilers, after those of the environment, which CMake would then ignore."""
    pairs = (("CMAKE_C_FLAGS", "CFLAGS"), ("CMAKE_CXX_FLAGS", "CXXFLAGS"))
    added = tuple(f"-D{name}={' '.join(filter(None, (env.get(inherited, ''), *flags)))}" for name, inherited in pairs)
    return replace(plan, flags=(*plan.flags, *added), configure=(*plan.configure, *added))


def _build_number(source: LlamaCppSource) -> tuple[str, ...]:
    """Return the option for the build number. llama.cpp counts its commits for it; without the history only a tag bNNNN has
    it."""
    if source.kind == "directory":
        return ()
    tag = re.fullmatch(r"b(\d+)", source.version)
    return (f"-DLLAMA_BUILD_NUMBER={tag.group(1) if tag else 0}",)


def default_jobs(processors: int, available_bytes: int) -> int:
    """Return the number of compilers to run: one per processor, fewer when memory is short."""
    return max(1, min(processors, available_bytes // BYTES_PER_JOB))


def progress_of(line: str) -> tuple[int, int] | None:
    """``(done, total)`` of a build tool's own counter: Ninja's ``[12/149]``, Make's ``[ 12%]``."""
    match = _COUNTER.match(line)
    if not match:
        return None
    return (int(match.group(1)), int(match.group(2))) if match.group(1) else (int(match.group(3)), 100)


def build(request: BuildRequest, runner: Runner, sink: Sink) -> Toolchain:
    """Build the requested toolchain, or return it at once if it exists.

    If killed, the next call continues where it stopped. Raises :class:`ToolchainError` with the reason and a remedy,
    ``DownloadError`` when the source cannot be fetched, :class:`NoSpaceError`.
    """
    _check(request)
    store = Store(request.cache)
    with store.locked(_STEP, runner.stop, sink):
        if ready := _built_before(request, store):
            sink(info(f"Already built: {ready.identity()} in {ready.directory}"))
            return ready
        _require_needs(request)
        source = _source(request, store, runner, sink)
        find = finder(os.environ)
        jobs = request.jobs or default_jobs(os.cpu_count() or 1, psutil.virtual_memory().available)
        plan = plan_build(request, source, cmake=find("cmake") or "cmake", ninja=find("ninja") is not None, jobs=jobs)
        if not request.force and (ready := store.ready(plan.key)):
            sink(info(f"Already built: {ready.identity()} in {ready.directory}"))
            return ready
        space = SPACE_NEEDED if request.backend in ("cpu", "metal") else SPACE_NEEDED_GPU
        require_space(store.root, space, "building llama.cpp")
        began = time.monotonic()
        unpack_source(source, store, runner)
        amx = amx_build(find, tree=source.tree)
        if amx.flags:
            sink(info(f"AMX is left out of the build: {amx.why}."))
            plan = with_flags(plan, amx.flags, os.environ)
        _compile(plan, store, runner, sink, afresh=request.force)
        toolchain = _publish(plan, source, store)
        sink(Saved(str(toolchain.directory), toolchain.identity()))
        sink(Finished(_STEP, "done", toolchain.identity(), time.monotonic() - began))
        warn_of_weakness(toolchain, store.root, sink)
        _clean(plan, source)
        return toolchain


def _check(request: BuildRequest) -> None:
    if request.backend not in BACKENDS:
        raise UsageError(
            f"Unknown backend {request.backend!r}", f"known are: {', '.join(BACKENDS)}", "Choose one with --backend."
        )
    if sum(value is not None for value in (request.source, request.ref, request.version)) > 1:
        raise UsageError("Too many sources", "--source, --ref and --version exclude each other", "Give one of them, or none.")
    if request.jobs is not None and request.jobs < 1:
        raise UsageError(
            f"Invalid -j {request.jobs}", "the number of jobs must be at least 1", "Leave -j out to have it chosen."
        )


def _built_before(request: BuildRequest, store: Store) -> Toolchain | None:
    """Return the toolchain built from a published version. Nothing is fetched, so it works offline and without a compiler."""
    if request.force or request.source is not None or request.ref is not None:
        return None
    wanted = ("sdist", request.version or default_version(), request.backend)
    keys = [record.key for _, record in store.complete() if (record.kind, record.version, record.backend) == wanted]
    return next((ready for key in keys if (ready := store.ready(key))), None)


def _require_needs(request: BuildRequest) -> None:
    find = finder(os.environ)
    needs = missing_needs(request.backend, request.ref is not None, os.environ, find)
    if needs:
        raise ToolchainError(
            "llama.cpp cannot be built here yet",
            f"missing: {', '.join(need.what for need in needs)}",
            needs_advice(needs, manager(find)),
        )


def _source(request: BuildRequest, store: Store, runner: Runner, sink: Sink) -> LlamaCppSource:
    if request.source is not None:
        return directory_source(request.source)
    if request.ref is not None:
        return git_source(request.ref, request.url, store, runner, sink)
    return fetch_sdist(request.version or default_version(), store, runner, sink)


def _compile(plan: BuildPlan, store: Store, runner: Runner, sink: Sink, *, afresh: bool) -> None:
    log = store.logs / f"build-{plan.key}.log"
    sink(Started(_STEP, f"Building llama.cpp ({plan.key}) with {plan.jobs} jobs", unit="steps"))
    _prepare(plan, afresh)
    env = {"PATH": tool_path(os.environ), "CLICOLOR": "0", "LC_ALL": "C", "CMAKE_COLOR_DIAGNOSTICS": "OFF"}
    lines = _Lines(sink)
    for argv in (plan.configure, plan.compile):
        # The working directory identifies all processes of the build (see _end_orphans).
        outcome = runner.run(
            Command(argv, cwd=plan.build_dir, env=env, needs=ChildNeeds.COMPUTE | ChildNeeds.COMPILE),
            log=log,
            on_text=lambda _stream, text: lines.feed(text),
        )
        if not outcome.ok:
            (plan.build_dir / _FAILED_FILE).touch()
            sink(Finished(_STEP, "failed", outcome.ending(), outcome.seconds))
            raise _failure(outcome, log, plan, store)


class _Lines:
    """Turns the output of the build tool into progress events."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._rest = ""

    def feed(self, text: str) -> None:
        *whole, self._rest = (self._rest + text).split("\n")
        self._rest = self._rest[-4096:]
        for line in whole:
            if counted := progress_of(line):
                self._sink(Progress(_STEP, *counted, note=line.partition("]")[2].strip()[:120]))


def _prepare(plan: BuildPlan, afresh: bool) -> None:
    """Make the build folder ready: empty for a new plan, trustworthy for one that was interrupted.

    ``afresh`` also empties one whose last build failed; a build that was only interrupted continues either way.
    """
    marker, failed = plan.build_dir / _PLAN_FILE, plan.build_dir / _FAILED_FILE
    wanted = "\n".join(plan.configure)
    try:
        _end_orphans(plan.build_dir)
        other = not marker.is_file() or marker.read_text("utf-8") != wanted
        if plan.build_dir.exists() and (other or (afresh and failed.exists())):
            shutil.rmtree(plan.build_dir)
        failed.unlink(missing_ok=True)
        if plan.build_dir.exists() and "Ninja" not in plan.configure:
            _drop_unsure(plan.build_dir, plan.jobs)
        plan.build_dir.mkdir(parents=True, exist_ok=True)
        marker.write_text(wanted, "utf-8")
    except OSError as error:
        raise from_os_error(error, "preparing the build", plan.build_dir) from error


def _end_orphans(build_dir: Path) -> None:
    """End the processes that a killed build left running. The caller holds the lock, so no other build can be at work there."""
    for process in psutil.process_iter(["name", "cwd"]):
        name, cwd = process.info["name"] or "", process.info["cwd"]
        if cwd and name.removesuffix(".exe") in _BUILDERS and Path(cwd).is_relative_to(build_dir):
            end_tree(process.pid)


def _drop_unsure(build_dir: Path, jobs: int) -> None:
    """Remove the newest results of a killed Make build: Make, unlike Ninja, trusts a half-written file because of its date."""
    results = [
        path
        for pattern in ("*.o", "*.obj", "*.so*", "*.dylib", "*.a", "bin/*")
        for path in build_dir.rglob(pattern)
        if path.is_file()
    ]
    for path in sorted(results, key=lambda path: path.lstat().st_mtime, reverse=True)[: 2 * jobs]:
        path.unlink(missing_ok=True)


def _failure(outcome: Outcome, log: Path, plan: BuildPlan, store: Store) -> RunnerError:
    lines = "\n".join(relevant_lines(outcome.tail))
    found = diagnose(outcome.tail, outcome.out_of_memory, manager(finder(os.environ)))
    if found and found.full_disk:
        return NoSpaceError("Building llama.cpp stopped", f"{found.why} at {store.root}", found.todo)
    why = found.why if found else f"{outcome.command.argv[0]} ended with {outcome.ending()}"
    todo = found.todo if found else "Try the tested source with: imatrix-runner tools build --version " + TESTED_VERSION
    return ToolchainError(f"Building llama.cpp ({plan.key}) failed", f"{why}\n{lines}", f"{todo} Full log: {log}")


def _publish(plan: BuildPlan, source: LlamaCppSource, store: Store) -> Toolchain:
    with store.scratch(store.toolchains, plan.key) as scratch:
        try:
            _copy_binaries(plan.build_dir, scratch / "bin")
            _copy_converter(source.tree, scratch / "converter")
            cmake, compiler = _cmake_version(plan.build_dir), _compiler(plan.build_dir)
        except OSError as error:
            raise from_os_error(error, "assembling the toolchain", scratch) from error
        record = BuildRecord(
            key=plan.key,
            kind=source.kind,
            source=source.origin,
            version=source.version,
            commit=source.commit,
            backend=plan.backend,
            date=now(),
            sha256=source.sha256,
            flags=list(plan.flags),
            cmake=cmake,
            compiler=compiler,
        )
        return store.adopt(scratch, record, plan.backend)


def _copy_binaries(build_dir: Path, into: Path) -> None:
    """Copy the programs and, next to them, every shared library. Links stay: programs and Python load libraries by plain
    names."""
    into.mkdir(parents=True)
    made = next((folder for folder in (build_dir / "bin" / "Release", build_dir / "bin") if folder.is_dir()), build_dir)
    programs = {executable(made, tool).name for tool in TOOLS}
    for path in sorted(made.iterdir()):
        if path.name in programs or _LIBRARIES.search(path.name):
            shutil.copy2(path, into / path.name, follow_symlinks=False)


def _copy_converter(tree: Path, into: Path) -> None:
    """Copy the Hugging Face converter with everything it imports and reads, if the tree has one."""
    if not (tree / CONVERTER).is_file():
        return
    into.mkdir(parents=True)
    shutil.copy2(tree / CONVERTER, into)
    for part in _CONVERTER_PARTS:
        if (tree / part).is_dir():
            shutil.copytree(tree / part, into / part, ignore=shutil.ignore_patterns("__pycache__", "tests"))
        elif (tree / part).is_file():
            shutil.copy2(tree / part, into / part)


def _cmake_version(build_dir: Path) -> str:
    cache = (build_dir / "CMakeCache.txt").read_text("utf-8", "replace")
    parts = [re.search(rf"CMAKE_CACHE_{part}_VERSION:INTERNAL=(\d+)", cache) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part.group(1) for part in parts if part)


def _compiler(build_dir: Path) -> str:
    for path in build_dir.glob("CMakeFiles/*/CMakeCXXCompiler.cmake"):
        text = path.read_text("utf-8", "replace")
        found = [re.search(rf'set\(CMAKE_CXX_COMPILER_{part} "([^"]*)"\)', text) for part in ("ID", "VERSION")]
        return " ".join(part.group(1) for part in found if part)
    return ""


def _clean(plan: BuildPlan, source: LlamaCppSource) -> None:
    """Remove files that only the build needed. A leftover is harmless and reused."""
    shutil.rmtree(plan.build_dir, ignore_errors=True)
    if source.kind == "sdist":
        shutil.rmtree(source.tree.parent.parent, ignore_errors=True)
    elif source.kind == "git":
        shutil.rmtree(source.tree, ignore_errors=True)
