"""llama.cpp's libraries without its programs, and stand-ins for a worker that runs on broken ones."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from imatrix_runner.toolchain.probe import Toolchain

FAKE_PROOF = (
    '{"type":"proven","version":"0.3.36","library":"/lib","ggml":"0.25.3 0c1e570","features":"CPU : AVX512_BF16 = 1",'
    '"devices":[],"backends":["cpu"],"ftypes":{"MOSTLY_Q4_K_M":15}}'
)
"""What a worker says when all is well."""

_NEEDED = re.compile(r"(?:lib)?(?:llama|ggml[a-z0-9-]*)\.(?:so[.\d]*|[.\d]*dylib|dll)")


def _libraries(toolchain: Toolchain) -> list[Path]:
    return [path for path in toolchain.directory.iterdir() if _NEEDED.fullmatch(path.name)]


def copy_libraries(toolchain: Toolchain, folder: Path) -> Path:
    """The libraries that the bindings load, links among them kept."""
    folder.mkdir(parents=True)
    for path in _libraries(toolchain):
        shutil.copy2(path, folder / path.name, follow_symlinks=False)
    return folder


def link_libraries(toolchain: Toolchain, folder: Path) -> Path:
    """Links to the libraries that the bindings load."""
    folder.mkdir(parents=True)
    for path in _libraries(toolchain):
        (folder / path.name).symlink_to(path)
    return folder


def fake_python(folder: Path, script: str) -> Path:
    """An interpreter that does not care what it is told and runs ``script`` (sh)."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path
