"""Our own kernels (``native/``), compiled once for this machine into the cache; without a C compiler ggml's serve alone."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from imatrix_runner.environment import Needs, find_program, search_path
from imatrix_runner.errors import RunnerError
from imatrix_runner.files import read_json
from imatrix_runner.process import Command, capture
from imatrix_runner.scratch import remove_abandoned, scratch_folder
from imatrix_runner.toolchain.hardware import cpu_features

_SOURCES = Path(__file__).parent / "native"
_COMPILERS = ("cc", "gcc", "clang")
# No fused multiply-add: every operation is rounded on its own, as in the scalar code whose bytes are to come out.
_FLAGS = ("-std=gnu11", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w")
_TUNED = (("-march=native",), ("-mcpu=native",), ())
_SECONDS = 120.0


@dataclass(frozen=True)
class Native:
    """The compiled library, and the file that says which of its kernels were proven against the ggml in use."""

    library: Path
    proofs: Path


class Proofs(msgspec.Struct):
    """Names of kernels: those that gave ggml's bytes and sooner, and the others. ``trying``: proofs that began and did not end,
    because the process died; the kernel may be why."""

    proven: list[str] = []
    refuted: list[str] = []
    trying: list[str] = []


def recall_proofs(path: Path) -> Proofs:
    """What is known; nothing where there is no file yet, or one that a dying machine left: the proofs are made again."""
    try:
        return read_json(path, Proofs, limit=1 << 16)
    except RunnerError:
        return Proofs()


@dataclass(frozen=True)
class NoNative:
    """Why there are no kernels of ours."""

    why: str


def compile_kernels(cache: Path, ggml: str, env: Mapping[str, str] = os.environ) -> Native | NoNative:
    """Compile, or take what was compiled from the same sources with the same compiler for the same processor.

    ``ggml`` is the digest of the libraries whose bytes the kernels must give (:attr:`Bindings.digest`).
    """
    named = [env["CC"]] if env.get("CC") else list(_COMPILERS)
    compiler = next((path for name in named if (path := find_program(name, search_path(env)))), None)
    if compiler is None:
        return NoNative(f"there is no C compiler ({', '.join(named)})")
    try:
        told = capture(Command((compiler, "--version"), needs=Needs.COMPILE), seconds=_SECONDS)
        folder = cache / "kernels" / _key(compiler, told.stdout)
        library = folder / "kernels.so"
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, library)
    except (OSError, TimeoutError) as error:
        return NoNative(f"{compiler}: {error}")
    return Native(library, folder / f"proven-{ggml[:16]}.json")


def _sources() -> list[Path]:
    return sorted(_SOURCES.glob("*.[ch]"))


def _key(compiler: str, version: str) -> str:
    parts = [compiler, version, platform.machine(), cpu_features(), *_FLAGS]
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape"))
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _compile(compiler: str, library: Path) -> None:
    """Raises ``OSError`` with the compiler's words if it will not."""
    sources = [str(path) for path in _sources() if path.suffix == ".c"]
    remove_abandoned(library.parent)
    with scratch_folder(library.parent) as folder:
        made, said = folder / library.name, ""
        for tuned in _TUNED:
            command: Sequence[str] = (compiler, *_FLAGS, *tuned, *sources, "-o", str(made), "-lm")
            done = capture(Command(tuple(command), needs=Needs.COMPILE), seconds=_SECONDS)
            if done.returncode == 0:
                made.replace(library)  # whole or not at all, whoever compiles at the same time
                return
            said = done.stderr
    raise OSError(next((line for line in said.splitlines() if "error" in line), said[:200] or "it failed without a word"))
