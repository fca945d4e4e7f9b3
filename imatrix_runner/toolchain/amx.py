"""Whether the installed compiler builds llama.cpp's AMX kernels correctly, and flags to leave them out where it does not.

GCC 12's ``_tile_loadconfig`` names only the first 8 of the 64 bytes it reads, so the optimiser drops the stores to the others:
the tiles stay unconfigured, and the first quantised matrix ends the process with SIGILL or SIGSEGV. The check compiles
llama.cpp's own set-up function and runs it. The processor need not have AMX: in the compiler's assembly, ``ldtilecfg`` becomes
a macro that copies what the instruction would have read.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imatrix_runner.environment import ChildNeeds
from imatrix_runner.process import Command, capture
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.diagnose import Find
from imatrix_runner.toolchain.hardware import cpu_features

Built = Literal["right", "wrong", "unsure", "not at all"]
"""How a compiler builds the tile configuration; ``not at all``: it does not support AMX, so it builds no such kernels."""

WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-int8")
"""Flags that leave AMX out of a build. Both are needed: without the tiles GCC keeps INT8, which llama.cpp asks for. llama.cpp's
own ``-DGGML_AMX_TILE=OFF`` has no effect on a native build, whose only flag is ``-march=native``; these override that."""

_COMPILERS = ("c++", "g++", "clang++")  # CMake's order
_SECONDS = 60.0
_WRONG = 1
_BYTES = ("inline int64_t ggml_batch_offset(", "return i3 * t->nb[3] + i2 * t->nb[2];")
_WHY: Mapping[Built, str] = {
    "wrong": "loses AMX's tile configuration",
    "unsure": "could not be checked for keeping AMX's tile configuration",
}

# ggml/src/ggml-cpu/amx/mmq.cpp, ggml_tile_config_init; main() ends with 0 if ldtilecfg would have read what was written.
_SOURCE = """
#include <immintrin.h>
#include <stdint.h>

extern "C" {
    uint8_t seen[64];
    uint64_t kept[2];
}

struct tile_config_t {
    uint8_t palette_id = 0;
    uint8_t start_row = 0;
    uint8_t reserved_0[14] = {0};
    uint16_t colsb[16] = {0};
    uint8_t rows[16] = {0};
};

inline void ggml_tile_config_init(void) {
    static thread_local bool done = false;

    if (done) {
        return;
    }

    alignas(64) tile_config_t tc = {};
    tc.palette_id = 1;
    tc.start_row = 0;
    tc.rows[0] = 8;   tc.colsb[0] = 64;
    tc.rows[1] = 8;   tc.colsb[1] = 64;
    tc.rows[2] = 16;  tc.colsb[2] = 32;
    tc.rows[3] = 16;  tc.colsb[3] = 32;
    tc.rows[4] = 16;  tc.colsb[4] = 64;
    tc.rows[5] = 16;  tc.colsb[5] = 64;
    tc.rows[6] = 16;  tc.colsb[6] = 64;
    tc.rows[7] = 16;  tc.colsb[7] = 64;

    _tile_loadconfig(&tc);
    done = true;
}

int main() {
    static const uint8_t rows[8] = {8, 8, 16, 16, 16, 16, 16, 16};
    static const uint8_t columns[8] = {64, 64, 32, 32, 64, 64, 64, 64};
    ggml_tile_config_init();
    if (seen[0] != 1) {
        return 2;
    }
    for (int tile = 0; tile < 8; tile++) {
        if (seen[16 + 2 * tile] != columns[tile] || seen[48 + tile] != rows[tile]) {
            return 1;
        }
    }
    return 0;
}
"""

# Without the stack, below which the optimiser may keep variables, and without flags.
_MACRO = """
\t.macro ldtilecfg address:vararg
\tmovq\t%rax, kept(%rip)
\tmovq\t%rcx, kept+8(%rip)
\tleaq\t\\address, %rax
\t.irp\toffset, 0, 8, 16, 24, 32, 40, 48, 56
\tmovq\t\\offset(%rax), %rcx
\tmovq\t%rcx, seen+\\offset(%rip)
\t.endr
\tmovq\tkept(%rip), %rax
\tmovq\tkept+8(%rip), %rcx
\t.endm
"""


@dataclass(frozen=True)
class AmxBuild:
    """Flags that leave AMX out of a build for this processor, and why; both empty if AMX can stay."""

    flags: tuple[str, ...] = ()
    why: str = ""


def has_amx(features: str | None = None) -> bool:
    """Whether the processor has AMX with tiles of 8-bit integers."""
    return "amx_int8" in (cpu_features() if features is None else features).split()


def amx_build(
    find: Find, env: Mapping[str, str] = os.environ, *, tree: Path | None = None, features: str | None = None
) -> AmxBuild:
    """Whether a native build on this machine must leave AMX out. Compiles something only where the processor has AMX.

    ``find`` looks programs up as the build will; ``tree`` is llama.cpp's source, if available; ``features`` are the
    processor's, as :func:`cpu_features` lists them.
    """
    if not has_amx(features):
        return AmxBuild()
    named = shlex.split(env.get("CXX", ""))  # perhaps with a launcher or options, as CMake allows
    compiler = named if named and find(named[0]) else [path for name in _COMPILERS if (path := find(name))][:1]
    built = check_compiler(compiler) if compiler else "not at all"
    if built == "not at all":
        return AmxBuild()
    if built != "right":
        return AmxBuild(WITHOUT_AMX, f"{shlex.join(compiler)} {_WHY[built]}, so quantised models would crash")
    if tree is not None and _takes_bytes_for_floats(tree):
        return AmxBuild(WITHOUT_AMX, "this llama.cpp's AMX kernels write to wrong addresses with several sequences at once")
    return AmxBuild()


def _takes_bytes_for_floats(tree: Path) -> bool:
    """Whether the kernels add an offset in bytes to a ``float *``, as until October 2026: correct only for a single matrix."""
    try:
        source = (tree / "ggml/src/ggml-cpu/amx/mmq.cpp").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return all(part in source for part in _BYTES) and re.search(r"\(float \*\) ?dst->data \+ dst_offset", source) is not None


def check_compiler(compiler: Sequence[str]) -> Built:
    """Compile and run llama.cpp's tile set-up; takes half a second, and works without AMX."""
    with scratch_folder() as folder:
        source, assembly, program = folder / "tiles.cpp", folder / "tiles.s", folder / "tiles"
        source.write_text(_SOURCE, encoding="utf-8")
        if _run(*compiler, "-O3", "-mamx-tile", "-mamx-int8", "-S", str(source), "-o", str(assembly)) != 0:
            return "not at all"
        assembly.write_text(_MACRO + assembly.read_text(encoding="utf-8"), encoding="utf-8")
        if _run(*compiler, str(assembly), "-o", str(program)) != 0:
            return "unsure"
        code = _run(str(program))
        return "right" if code == 0 else "wrong" if code == _WRONG else "unsure"


def _run(*argv: str) -> int:
    """Run a program and return its exit code; 255 if it does not start or does not end."""
    try:
        return capture(Command(argv, needs=ChildNeeds.COMPILE), seconds=_SECONDS).returncode
    except (OSError, TimeoutError):
        return 255
