"""The command that installs llama-cpp-python on this machine, so that the libraries it builds work here."""

from __future__ import annotations

import os

from imatrix_runner.toolchain.amx import WITHOUT_AMX, amx_build, has_amx
from imatrix_runner.toolchain.diagnose import finder

DISTRIBUTION = "llama-cpp-python"
AFRESH = ("--force-reinstall", "--no-cache-dir")


def pip_install(*options: str, cmake: str = "", without_amx: bool = False) -> str:
    """``pip install llama-cpp-python`` with the environment it needs. pip compiles it: AMX is left out where this compiler
    builds it incorrectly, and with ``without_amx`` wherever the processor has it. ``cmake`` are arguments for CMake."""
    flags = WITHOUT_AMX if without_amx and has_amx() else amx_build(finder(os.environ)).flags
    env = [f'{name}="{" ".join(flags)}"' for name in ("CFLAGS", "CXXFLAGS") if flags]
    env += [f'CMAKE_ARGS="{cmake}"'] if cmake else []
    return " ".join([*env, "pip install", DISTRIBUTION, *options])


def install_hint() -> str:
    """Return the remedy for a llama-cpp-python that does not work."""
    return f"Install it with: {pip_install(*AFRESH)}   (or use --engine binaries)"
