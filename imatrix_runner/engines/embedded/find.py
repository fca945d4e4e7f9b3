"""Find llama-cpp-python and the libraries it shall load, and have a worker prove that they compute here.

This is the parent's side: it loads no native code and imports nothing of llama-cpp-python.
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
from imatrix_runner.engines.embedded.install import AFRESH, DISTRIBUTION, install_hint, pip_install
from imatrix_runner.engines.embedded.protocol import Failed, Probe, Proven, Request, decode_answer, encode
from imatrix_runner.errors import EngineError, ToolchainError
from imatrix_runner.files import sha256, stamp
from imatrix_runner.process import Captured, Command, capture
from imatrix_runner.remembered import recall, remember
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.hardware import cpu_features
from imatrix_runner.toolchain.probe import find_backends, why_unfit
from imatrix_runner.toolchain.repacking import REPACKS, Repacking
from imatrix_runner.toolchain.store import Store
from imatrix_runner.untrusted import UnreadableError

LIBRARY_VARIABLE = "LLAMA_CPP_LIB_PATH"
"""The bindings' own variable: a directory whose libraries they load instead of those in their package."""

PROBE_SECONDS = 60.0
GPU_MEMORY_SECONDS = 600.0  # a GPU may vanish or come back; what a CPU build can do only changes with its files

_ROOT = Path(imatrix_runner.__file__).resolve().parent.parent
_FOLDER = "bindings"
# libllama.so, libggml-cpu.so.0.25.3, libggml-metal.0.dylib, ggml-base.dll; not libllama-common, not libmtmd
_LIBRARY = re.compile(r"(?:lib)?(llama|ggml(?:-[a-z0-9_-]+)?)(?:[.\d]*\.dylib|\.dll|\.so[.\d]*)", re.IGNORECASE)
# What decides which libraries are loaded besides, and which devices they show.
_DECIDING = re.compile(r"GGML_|CUDA_|HIP_|ROCR_|VK_|LD_LIBRARY_PATH$|LD_PRELOAD$|DYLD_|\w+_VISIBLE_DEVICES$")


class Unusable(ToolchainError):
    """llama-cpp-python cannot compute here. ``installed``: it is there, so its user may want to know."""

    def __init__(self, why: str, todo: str, *, installed: bool = True) -> None:
        super().__init__("The embedded engine cannot compute here", why, todo)
        self.installed = installed


class _Miscomputes(Unusable):
    """The worker crashed, or multiplied wrongly: ``short`` says which in a phrase."""

    def __init__(self, why: str, todo: str, *, short: str) -> None:
        super().__init__(why, todo)
        self.short = short


@dataclass(frozen=True)
class Bindings:
    """llama-cpp-python, the libraries it loads, and what they proved.

    ``library`` is what ``LLAMA_CPP_LIB_PATH`` must say in a worker (None: the package's own libraries, nothing to say),
    ``directory`` where the libraries lie, ``digest`` the SHA-256 over them, ``origin`` how they were found. ``ggml``,
    ``features``, ``devices``, ``ftypes``: see :class:`~imatrix_runner.engines.embedded.protocol.Proven`; ``backends`` is
    ``cpu`` and whatever else this build can use, with or without a device for it at the moment. ``repacking``: whether weights
    may be kept in the processor's own formats.
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
        """``llama-cpp-python 0.3.36 (ggml 0.25.3 0c1e570, libraries 1a2b3c4d)``: what files depend on, wherever it lies."""
        # "-dirty" is what every build without llama.cpp's own history says; the digest tells builds apart.
        ggml = self.ggml.removesuffix("-dirty")
        return f"{DISTRIBUTION} {self.version} (ggml {ggml}, libraries {self.digest[:8]})"


@dataclass(frozen=True)
class _Place:
    """A directory of libraries. ``library`` as in :class:`Bindings`; ``todo`` is the remedy when they are no good."""

    directory: Path
    library: Path | None
    origin: str
    todo: str


class _Remembered(msgspec.Struct, frozen=True):
    """The last proof: what it was made of (``key``), when, the libraries' digest, the worker's own line, and what came of
    repacked weights."""

    key: str
    at: float
    digest: str
    answer: str
    repacking: Repacking = REPACKS


def find(env: Mapping[str, str], cache: Path, *, seconds: float = PROBE_SECONDS) -> Bindings:
    """The installed llama-cpp-python with libraries that compute here.

    Libraries are taken from ``LLAMA_CPP_LIB_PATH``, else from the package itself; where it was installed without a native
    build, from the managed toolchain built from the same version. Raises :class:`Unusable`.
    """
    version, package = _package()
    turned_down: list[Unusable] = []
    for place in _places(version, package, env, cache):
        try:
            return _prove(version, place, env, cache, seconds)
        except Unusable as unusable:
            turned_down.append(unusable)
    if turned_down:
        raise turned_down[0]
    raise Unusable(
        f"{DISTRIBUTION} {version} was installed without its libraries",
        f"Type: imatrix-runner tools build (it then uses that build's), or: {pip_install(*AFRESH)}",
    )


def worker_command(request: Request, library: Path | None) -> Command:
    """The worker that does ``request``, whose paths are absolute; ``library`` as in :class:`Bindings`.

    It runs where our own package lies: ``-m`` looks for modules in the current directory first, and that may hold a
    stranger's files.
    """
    env = {LIBRARY_VARIABLE: str(library)} if library is not None else {}
    return Command((sys.executable, "-m", __package__, encode(request).decode()), cwd=_ROOT, env=env)


def _package() -> tuple[str, Path]:
    """Version and directory of the installed package, which is not imported."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        why = f"{DISTRIBUTION} is not installed for {sys.executable}"
        raise Unusable(why, f"Type: {pip_install()}   (or use --engine binaries)", installed=False) from None
    directory = Path(str(distribution.locate_file("llama_cpp")))
    if not directory.is_dir():  # installed in place: only the import system knows where
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
    """``(llama, …/libllama.so.0.5.0)``: each library file that is no link to another one beside it."""
    if not directory.is_dir():
        return []
    named = [(match.group(1).lower(), path) for path in directory.iterdir() if (match := _LIBRARY.fullmatch(path.name))]
    real = {(name, path.resolve()) for name, path in named}
    return sorted((name, path) for name, path in real if path.is_file())


def _digest(libraries: Sequence[tuple[str, Path]]) -> str:
    """The same for the same libraries anywhere: of names and contents, each content once."""
    contents = sorted({f"{name} {sha256(path)}" for name, path in libraries})
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()


def _prove(version: str, place: _Place, env: Mapping[str, str], cache: Path, seconds: float) -> Bindings:
    """Ask a worker, or remember what it said. Raises :class:`Unusable`."""
    libraries = _libraries(place.directory)
    if not any(name == "llama" for name, _ in libraries):
        raise Unusable(f"{place.directory} ({place.origin}) holds no llama library", place.todo)
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
    parts += [f"{path.name} {path.stat().st_mtime_ns}" for path in sorted(Path(__file__).parent.glob("*.py"))]
    parts += [f"{name}={value}" for name, value in sorted(env.items()) if _DECIDING.match(name)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def _recall(folder: Path, key: str, seconds: float | None) -> tuple[_Remembered, Proven] | None:
    """What is remembered under ``key``, if it is not older than ``seconds``; anything odd counts as nothing."""
    memory = recall(folder, key, _Remembered)
    if memory is None:
        return None
    try:
        answer = decode_answer(memory.answer)
    except UnreadableError:
        return None
    fresh = seconds is None or 0 <= time.time() - memory.at < seconds
    return (memory, answer) if fresh and isinstance(answer, Proven) else None


def _try(place: _Place, seconds: float) -> tuple[Proven, str, Repacking]:
    """The proof as :func:`_ask` gives it; where it fails with repacked weights, without them. Raises :class:`Unusable`."""
    try:
        return *_ask(place, seconds, repack=True), REPACKS
    except _Miscomputes as first:
        try:
            return *_ask(place, seconds, repack=False), Repacking(False, first.short)
        except Unusable:
            raise first from None


def _ask(place: _Place, seconds: float, *, repack: bool) -> tuple[Proven, str]:
    """The worker's proof, decoded and as the line it is. Raises :class:`Unusable` for whatever else comes of it."""
    with scratch_folder() as folder:
        return _heard(_capture(Probe(folder, repack), place, seconds), place)


def _capture(request: Probe, place: _Place, seconds: float) -> Captured:
    try:
        return capture(worker_command(request, place.library), seconds=seconds)
    except TimeoutError as error:
        raise Unusable(f"the libraries in {place.directory} do not answer: {error}", place.todo) from error
    except OSError as error:
        raise Unusable(
            f"{sys.executable} cannot be started: {error.strerror or error}", "Check the installation of Python."
        ) from error


def _heard(told: Captured, place: _Place) -> tuple[Proven, str]:
    for line in told.stdout.splitlines():
        try:
            answer = decode_answer(line)
        except UnreadableError:
            continue
        if isinstance(answer, Failed) and answer.exit_code == EngineError.exit_code:
            raise _Miscomputes(f"the libraries in {place.directory} miscompute: {answer.why}", place.todo, short=answer.why)
        if isinstance(answer, Failed):
            raise Unusable(answer.why, place.todo if place.origin == LIBRARY_VARIABLE else answer.todo)
        if isinstance(answer, Proven) and told.returncode == 0:
            return _with_processor(answer, place), line
    why = f"the libraries in {place.directory} do not run: {_why(told)}"
    raise _Miscomputes(why, place.todo, short=_why(told)) if crashed(told.returncode) else Unusable(why, place.todo)


def _with_processor(proven: Proven, place: _Place) -> Proven:
    """A build whose backends are plug-ins (an official release's) shows no processor, and cannot compute a thing."""
    if "cpu" not in proven.backends:
        why = f"the libraries in {place.directory} offer no CPU backend (llama.cpp built with GGML_BACKEND_DL)"
        raise Unusable(why, place.todo)
    return proven


def _why(told: Captured) -> str:
    lines = [line.strip() for line in told.stderr.splitlines() if line.strip()]
    return why_unfit(told) or (lines[-1][:200] if lines else f"exit code {told.returncode} and not a word")
