"""llama.cpp of August 2024, built from the source distribution of an old llama-cpp-python and cached by its content.

Its programs read and write the legacy imatrix only, have no ``--dry-run`` and no ``--tensor-type``, and print other lines.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import filelock

from imatrix_runner.events import ignore
from imatrix_runner.process import Runner
from imatrix_runner.toolchain.probe import Toolchain, probe
from imatrix_runner.toolchain.source import fetch_sdist
from imatrix_runner.toolchain.store import Store, cache_dir

VERSION = "0.2.90"
PROGRAMS = ("llama-imatrix", "llama-quantize", "llama-perplexity", "llama-tokenize")
_NEEDED = ("CMakeLists.txt", "cmake/", "common/", "ggml/", "include/", "scripts/", "src/", "examples/", "pocs/")
"""Of the tree, what CMake wants to see when it configures these programs."""
_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_C_FLAGS_RELEASE=-O1 -DNDEBUG",
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",
    "-DBUILD_SHARED_LIBS=OFF",
    *(f"-D{name}=OFF" for name in ("GGML_NATIVE", "GGML_CCACHE", "GGML_LLAMAFILE", "GGML_METAL", "GGML_BLAS")),
    *(f"-D{name}=OFF" for name in ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER", "LLAMA_CURL", "LLAMA_ALL_WARNINGS")),
)


def build_old_tools() -> Toolchain:
    """The programs; built (in about a minute of two processors) where they are not there yet."""
    cache = cache_dir()
    store = Store(cache)
    with store.locked("sdist-old", Runner().stop, ignore):
        source = fetch_sdist(VERSION, store, Runner(), ignore)
    assert source.archive is not None
    folder = cache / "tests" / f"llama-{VERSION}-{source.sha256[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "bin").is_dir():
            _build(source.archive, folder)
    return probe(folder / "bin", "test")


def _build(archive: Path, folder: Path) -> None:
    tree, build = folder / "source", folder / "build"
    _extract(archive, tree)
    _run("cmake", "-S", str(tree), "-B", str(build), *_FLAGS)
    _run("cmake", "--build", str(build), "--config", "Release", "--parallel", "2", "--target", *PROGRAMS)
    made = next(path for path in (build / "bin" / "Release", build / "bin") if path.is_dir())
    made.rename(folder / "bin")
    shutil.rmtree(tree)
    shutil.rmtree(build)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def _extract(archive: Path, into: Path) -> None:
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            _, found, name = member.name.partition("/vendor/llama.cpp/")
            content = tar.extractfile(member) if found and member.isfile() and name.startswith(_NEEDED) else None
            if content is not None:
                target = into / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
