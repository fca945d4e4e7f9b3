"""Compiles the native kernels (``worker/quantize/native/``) into the cache, once per machine; without a C compiler only
ggml's are used, and covariances cannot be collected."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.engines.jobs import Native
from imatrix_runner.environment import ChildNeeds, find_program, search_path
from imatrix_runner.process import Command, capture
from imatrix_runner.scratch import remove_abandoned, scratch_folder
from imatrix_runner.toolchain.hardware import cpu_features

_SOURCES = Path(__file__).parent.parent / "worker" / "quantize" / "native"
_COMPILERS = ("cc", "gcc", "clang")
# No fused multiply-add: every operation is rounded on its own, as in ggml's scalar code, whose bytes the kernels must give.
_FLAGS = ("-std=gnu11", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w")
_TUNED = (("-march=native",), ("-mcpu=native",), ())
_SECONDS = 120.0


@dataclass(frozen=True)
class NoNative:
    """Why there are no native kernels."""

    why: str


def compile_kernels(cache: Path, ggml: str, env: Mapping[str, str] = os.environ) -> Native | NoNative:
    """Return the kernels, compiled now or before from the same sources with the same compiler for the same processor.

    ``ggml`` is the digest of the libraries whose bytes the kernels must give, ``digest`` of
    :class:`~imatrix_runner.engines.embedded.bindings.Bindings`.
    """
    named = [env["CC"]] if env.get("CC") else list(_COMPILERS)
    compiler = next((path for name in named if (path := find_program(name, search_path(env)))), None)
    if compiler is None:
        return NoNative(f"no C compiler found ({', '.join(named)})")
    try:
        version = capture(Command((compiler, "--version"), needs=ChildNeeds.COMPILE), seconds=_SECONDS)
        folder = cache / "kernels" / _key(compiler, version.stdout)
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
    """Compile the kernels into ``library``. Raises ``OSError`` with the compiler's error message."""
    sources = [str(path) for path in _sources() if path.suffix == ".c"]
    remove_abandoned(library.parent)
    with scratch_folder(library.parent) as folder:
        made, said = folder / library.name, ""
        for tuned in _TUNED:
            command: Sequence[str] = (compiler, *_FLAGS, *tuned, *sources, "-o", str(made), "-lm")
            done = capture(Command(tuple(command), needs=ChildNeeds.COMPILE), seconds=_SECONDS)
            if done.returncode == 0:
                made.replace(library)  # atomic, in case another process compiles at the same time
                return
            said = done.stderr
    raise OSError(next((line for line in said.splitlines() if "error" in line), said[:200] or "it failed without output"))
