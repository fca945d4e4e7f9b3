"""Finds llama-cpp-python and the libraries for it to load, and has a worker prove that they compute here.

This is the parent's side: it loads no native code and imports nothing from llama-cpp-python.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

import imatrix_runner
from imatrix_runner.endings import crashed
from imatrix_runner.engines.protocol import Failed, Job, ProbeJob, Proven, decode_reply, encode_job
from imatrix_runner.errors import EngineError, ToolchainError
from imatrix_runner.files import sha256, stamp
from imatrix_runner.process import Captured, Command, capture
from imatrix_runner.remembered import recall, remember
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.hardware import cpu_features
from imatrix_runner.toolchain.pip_install import AFRESH, DISTRIBUTION, install_hint, pip_install
from imatrix_runner.toolchain.probe import find_backends, why_unfit
from imatrix_runner.toolchain.repacking import REPACKS, Repacking
from imatrix_runner.toolchain.store import Store
from imatrix_runner.untrusted import UnreadableError

LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"
"""The bindings' own environment variable: a directory to load libraries from instead of their package."""

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
"""numpy starts this many threads for its BLAS when it is imported. A worker calls no BLAS: one saves a fifth of its start."""

PROBE_SECONDS = 60.0
GPU_MEMORY_SECONDS = 600.0  # a GPU may disappear or come back; a CPU build only changes with its files

_ROOT = Path(imatrix_runner.__file__).resolve().parent.parent
_ENGINES = Path(imatrix_runner.__file__).resolve().parent / "engines"
_FOLDER = "bindings"
# libllama.so, libggml-cpu.so.0.25.3, libggml-metal.0.dylib, ggml-base.dll; not libllama-common, not libmtmd
_LIBRARY = re.compile(r"(?:lib)?(llama|ggml(?:-[a-z0-9_-]+)?)(?:[.\d]*\.dylib|\.dll|\.so[.\d]*)", re.IGNORECASE)
# Environment variables that decide which further libraries are loaded, and which devices they show.
_DECIDING = re.compile(r"GGML_|CUDA_|HIP_|ROCR_|VK_|LD_LIBRARY_PATH$|LD_PRELOAD$|DYLD_|\w+_VISIBLE_DEVICES$")


class UnusableBindings(ToolchainError):
    """llama-cpp-python cannot compute here. ``installed``: it is installed, so the user may want to know why."""

    def __init__(self, why: str, todo: str, *, installed: bool = True) -> None:
        super().__init__("The embedded engine cannot compute here", why, todo)
        self.installed = installed


class _Miscomputes(UnusableBindings):
    """The worker crashed or computed wrong products; ``short`` is the reason as a phrase."""

    def __init__(self, why: str, todo: str, *, short: str) -> None:
        super().__init__(why, todo)
        self.short = short


@dataclass(frozen=True)
class Bindings:
    """llama-cpp-python, the libraries it loads, and the results of their proof.

    ``library`` is the value of ``LLAMA_CPP_LIB_PATH`` for a worker (None: unset, for the package's own libraries),
    ``directory`` the libraries' folder, ``digest`` the SHA-256 over them, ``origin`` how they were found. ``ggml``,
    ``features``, ``devices``, ``ftypes``: see :class:`~imatrix_runner.engines.protocol.Proven`; ``backends``: ``cpu`` and all
    others that this build can use, with or without a device for them at the moment. ``repacking``: whether weights may be
    kept in the processor's own formats.
    """

    version: str
    python: Path
    library: Path | None
    directory: Path
    digest: str
    ggml: str
    features: str
    devices: tuple[str, ...]
    backends: tuple[str, ...]
    ftypes: Mapping[str, int]
    origin: str
    repacking: Repacking = REPACKS

    def identity(self) -> str:
        """``llama-cpp-python 0.3.36 (ggml 0.25.3 0c1e570, libraries 1a2b3c4d)``: the same for an installation in any folder."""
        # Every build without llama.cpp's own git history has "-dirty"; the digest distinguishes builds.
        ggml = self.ggml.removesuffix("-dirty")
        return f"{DISTRIBUTION} {self.version} (ggml {ggml}, libraries {self.digest[:8]})"


@dataclass(frozen=True)
class _Place:
    """A directory of libraries. ``library`` as in :class:`Bindings`; ``todo`` is the remedy if they are unusable."""

    directory: Path
    library: Path | None
    origin: str
    todo: str


class _Remembered(msgspec.Struct, frozen=True):
    """The last proof: the ``key`` of its inputs, its time, the libraries' digest, the worker's reply as a line of JSON, and
    whether repacked weights work. On disk the reply is named ``answer``."""

    key: str
    at: float
    digest: str
    reply: str = msgspec.field(name="answer")
    repacking: Repacking = REPACKS


def find(env: Mapping[str, str], cache: Path, *, seconds: float = PROBE_SECONDS) -> Bindings:
    """Return the installed llama-cpp-python with libraries that compute here.

    Libraries come from ``LLAMA_CPP_LIB_PATH``, else from the package; if that was installed without a native build, from the
    managed toolchain built from the same version. Raises :class:`UnusableBindings`.
    """
    version, package = _package()
    turned_down: list[UnusableBindings] = []
    for place in _places(version, package, env, cache):
        try:
            return _prove(version, place, env, cache, seconds)
        except UnusableBindings as unusable:
            turned_down.append(unusable)
    if turned_down:
        raise turned_down[0]
    raise UnusableBindings(
        f"{DISTRIBUTION} {version} was installed without its libraries",
        f"Type: imatrix-runner tools build (it then uses that build's), or: {pip_install(*AFRESH)}",
    )


def worker_command(job: Job, library: Path | None) -> Command:
    """The command of the worker that does ``job``; ``library`` as in :class:`Bindings`.

    It runs in the folder of this package: ``-m`` looks for modules in the current directory first, and the user's may hold
    untrusted files.
    """
    env = {_BLAS_THREADS: "1", **({LIBRARY_VARIABLE: str(library)} if library is not None else {})}
    return Command((sys.executable, "-m", "imatrix_runner.engines.worker", encode_job(job).decode()), cwd=_ROOT, env=env)


def _package() -> tuple[str, Path]:
    """Return version and directory of the installed package, without importing it."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        why = f"{DISTRIBUTION} is not installed for {sys.executable}"
        raise UnusableBindings(why, f"Type: {pip_install()}   (or use --engine binaries)", installed=False) from None
    directory = Path(str(distribution.locate_file("llama_cpp")))
    if not directory.is_dir():  # an editable installation: only the import system knows its folder
        spec = importlib.util.find_spec("llama_cpp")
        directory = Path(spec.origin).parent if spec is not None and spec.origin else directory
    return distribution.version, directory


def _places(version: str, package: Path, env: Mapping[str, str], cache: Path) -> Iterator[_Place]:
    if named := env.get(LIBRARY_VARIABLE):
        directory = Path(named).absolute()
        todo = f"Unset {LIBRARY_VARIABLE}, or let it name a directory with the libraries of {DISTRIBUTION} {version}."
        yield _Place(directory, directory, LIBRARY_VARIABLE, todo)
        return
    own = package / "lib"
    if _holds_llama(own):
        # Set but empty, the variable would send the bindings to the working directory.
        yield _Place(own, own if LIBRARY_VARIABLE in env else None, "its own libraries", install_hint())
        return
    for folder, record in Store(cache).complete():
        if record.kind == "sdist" and record.version == version.partition("+")[0] and _holds_llama(folder / "bin"):
            yield _Place(folder / "bin", folder / "bin", "managed cache", "Type: imatrix-runner tools build --force")


def _holds_llama(directory: Path) -> bool:
    return any(name == "llama" for name, _ in _libraries(directory))


def _libraries(directory: Path) -> list[tuple[str, Path]]:
    """``(llama, …/libllama.so.0.5.0)``: name and resolved path of each library file, each file once."""
    if not directory.is_dir():
        return []
    named = [(match.group(1).lower(), path) for path in directory.iterdir() if (match := _LIBRARY.fullmatch(path.name))]
    real = {(name, path.resolve()) for name, path in named}
    return sorted((name, path) for name, path in real if path.is_file())


def _digest(libraries: Sequence[tuple[str, Path]]) -> str:
    """Digest over the libraries' names and contents, each once; independent of their folder."""
    contents = sorted({f"{name} {sha256(path)}" for name, path in libraries})
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()


def _prove(version: str, place: _Place, env: Mapping[str, str], cache: Path, seconds: float) -> Bindings:
    """Run the proof in a worker, or recall its last result. Raises :class:`UnusableBindings`."""
    libraries = _libraries(place.directory)
    if not any(name == "llama" for name, _ in libraries):
        raise UnusableBindings(f"{place.directory} ({place.origin}) holds no llama library", place.todo)
    built_for = find_backends("", (path.name for _, path in libraries))
    key = _key(version, place, libraries, env)
    remembered = _recall(cache / _FOLDER, key, GPU_MEMORY_SECONDS if len(built_for) > 1 else None)
    if remembered is None:
        proven, line, repacking = _try(place, seconds)
        remembered = _Remembered(key, time.time(), _digest(libraries), line, repacking), proven
        remember(cache / _FOLDER, remembered[0])
    memory, proven = remembered
    return Bindings(
        version=proven.version,
        python=Path(sys.executable),
        library=place.library,
        directory=place.directory,
        digest=memory.digest,
        ggml=proven.ggml,
        features=proven.features,
        devices=proven.devices,
        backends=tuple(dict.fromkeys((*built_for, *proven.backends))),
        ftypes=proven.ftypes,
        origin=place.origin,
        repacking=memory.repacking,
    )


def _key(version: str, place: _Place, libraries: Sequence[tuple[str, Path]], env: Mapping[str, str]) -> str:
    """Everything the proof depends on, as one digest."""
    parts = [imatrix_runner.__version__, platform.python_version(), sys.executable, platform.node(), version]
    parts += [platform.machine(), cpu_features()]  # a home directory may be that of several machines
    parts += [str(place.directory), str(place.library)]
    parts += [f"{path} {stamp(path)}" for _, path in libraries]
    parts += [f"{path.name} {path.stat().st_mtime_ns}" for path in sorted(_ENGINES.rglob("*.py"))]
    parts += [f"{name}={value}" for name, value in sorted(env.items()) if _DECIDING.match(name)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _recall(folder: Path, key: str, seconds: float | None) -> tuple[_Remembered, Proven] | None:
    """The proof remembered under ``key``; None if it is older than ``seconds`` or unreadable."""
    memory = recall(folder, key, _Remembered)
    if memory is None:
        return None
    try:
        reply = decode_reply(memory.reply)
    except UnreadableError:
        return None
    fresh = seconds is None or 0 <= time.time() - memory.at < seconds
    return (memory, reply) if fresh and isinstance(reply, Proven) else None


def _try(place: _Place, seconds: float) -> tuple[Proven, str, Repacking]:
    """The result of :func:`_ask` with repacked weights; if these fail, without them.

    Raises :class:`UnusableBindings`.
    """
    try:
        return *_ask(place, seconds, repack=True), REPACKS
    except _Miscomputes as first:
        try:
            return *_ask(place, seconds, repack=False), Repacking(False, first.short)
        except UnusableBindings:
            raise first from None


def _ask(place: _Place, seconds: float, *, repack: bool) -> tuple[Proven, str]:
    """The worker's proof, decoded and as its line of JSON. Raises :class:`UnusableBindings` for any other outcome."""
    with scratch_folder() as folder:
        return _read_probe(_capture(ProbeJob(folder, repack), place, seconds), place)


def _capture(job: ProbeJob, place: _Place, seconds: float) -> Captured:
    try:
        return capture(worker_command(job, place.library), seconds=seconds)
    except TimeoutError as error:
        raise UnusableBindings(f"the libraries in {place.directory} do not answer: {error}", place.todo) from error
    except OSError as error:
        raise UnusableBindings(
            f"{sys.executable} cannot be started: {error.strerror or error}", "Check the installation of Python."
        ) from error


def _read_probe(captured: Captured, place: _Place) -> tuple[Proven, str]:
    for line in captured.stdout.splitlines():
        try:
            reply = decode_reply(line)
        except UnreadableError:
            continue
        if isinstance(reply, Failed) and reply.exit_code == EngineError.exit_code:
            raise _Miscomputes(f"the libraries in {place.directory} miscompute: {reply.why}", place.todo, short=reply.why)
        if isinstance(reply, Failed):
            raise UnusableBindings(reply.why, place.todo if place.origin == LIBRARY_VARIABLE else reply.todo or install_hint())
        if isinstance(reply, Proven) and captured.returncode == 0:
            return _with_processor(reply, place), line
    why = f"the libraries in {place.directory} do not run: {_why(captured)}"
    raise (
        _Miscomputes(why, place.todo, short=_why(captured))
        if crashed(captured.returncode)
        else UnusableBindings(why, place.todo)
    )


def _with_processor(proven: Proven, place: _Place) -> Proven:
    """The proof itself. Raises :class:`UnusableBindings` for a build whose backends are plug-ins (as in official releases): it
    has no CPU backend and cannot compute."""
    if "cpu" not in proven.backends:
        why = f"the libraries in {place.directory} offer no CPU backend (llama.cpp built with GGML_BACKEND_DL)"
        raise UnusableBindings(why, place.todo)
    return proven


def _why(captured: Captured) -> str:
    lines = [line.strip() for line in captured.stderr.splitlines() if line.strip()]
    return why_unfit(captured) or (lines[-1][:200] if lines else f"exit code {captured.returncode} and no output")
