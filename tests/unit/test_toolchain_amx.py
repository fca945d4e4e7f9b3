"""Whether a compiler keeps AMX's tile configuration, found by running what it compiled, also where there is no AMX."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from imatrix_runner.toolchain import amx, pip_install
from imatrix_runner.toolchain.amx import WITHOUT_AMX, AmxBuild, amx_build, check_compiler
from imatrix_runner.toolchain.build import BuildPlan, with_flags

AMX = "flags : fpu sse2 avx512f amx_bf16 amx_tile amx_int8"

# What _tile_loadconfig reads, told whole; the header's own name is then this one's.
RIGHT = """
#include <immintrin.h>
static inline void told_whole(const void * config) {
    __asm__ volatile("ldtilecfg %X0" :: "m"(*(const char (*)[64]) config));
}
#define _tile_loadconfig told_whole
"""
MMQ = """
inline int64_t ggml_batch_offset(const ggml_tensor * t, int64_t batch_idx, int64_t ne2) {{
    return i3 * t->nb[3] + i2 * t->nb[2];
}}
                    ({pointer} *) dst->data + dst_offset + mb_start * N + nb_start, ldc);
"""


def gcc() -> int:
    """The major version of g++; 0 where it does not build for x86-64."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        return 0
    told = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    match = re.match(r"\d+", told)
    return int(match[0]) if match else 0


GCC = pytest.mark.skipif(not gcc(), reason="no g++ for x86-64")


def compiler(folder: Path, body: str) -> list[str]:
    """A compiler that is a shell script."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return [str(path)]


@pytest.mark.skipif(gcc() != 12, reason="g++ is not GCC 12")
def test_gcc_12_is_found_to_lose_the_configuration() -> None:
    assert check_compiler(["g++"]) == "wrong"
    built = amx_build(shutil.which, {}, features=AMX)
    assert built.flags == WITHOUT_AMX
    assert "loses AMX's tile configuration" in built.why


@GCC
def test_a_compiler_that_is_told_of_all_64_bytes_is_right(tmp_path: Path) -> None:
    (tmp_path / "right.h").write_text(RIGHT, encoding="utf-8")
    right = compiler(tmp_path, f'case "$*" in *.cpp*) exec g++ -include {tmp_path}/right.h "$@";; esac; exec g++ "$@"')
    assert check_compiler(right) == "right"
    assert amx_build(shutil.which, {"CXX": right[0]}, features=AMX) == AmxBuild()


@pytest.mark.parametrize(
    ("body", "built", "flags"),
    [
        ('case "$*" in *-mamx*) exit 1;; esac; exec g++ "$@"', "not at all", ()),
        ('case "$*" in *-mamx*) exec g++ "$@";; esac; exit 1', "unsure", WITHOUT_AMX),
    ],
)
@GCC
def test_one_that_knows_no_amx_and_one_that_cannot_be_checked(
    body: str, built: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    (path,) = compiler(tmp_path, body)
    assert check_compiler([path]) == built
    assert amx_build(shutil.which, {"CXX": f"{path} -O2"}, features=AMX).flags == flags


def test_without_amx_in_the_processor_nothing_is_compiled() -> None:
    def find(name: str) -> str | None:
        raise AssertionError(name)

    assert amx_build(find, {}, features="flags : fpu sse2 avx512f") == AmxBuild()


@pytest.mark.parametrize(("pointer", "left_out"), [("float", True), ("char", False)])
@GCC
def test_a_source_that_takes_bytes_for_floats_is_built_without(pointer: str, left_out: bool, tmp_path: Path) -> None:
    (tmp_path / "right.h").write_text(RIGHT, encoding="utf-8")
    right = compiler(tmp_path, f'case "$*" in *.cpp*) exec g++ -include {tmp_path}/right.h "$@";; esac; exec g++ "$@"')
    folder = tmp_path / "ggml" / "src" / "ggml-cpu" / "amx"
    folder.mkdir(parents=True)
    (folder / "mmq.cpp").write_text(MMQ.format(pointer=pointer), encoding="utf-8")
    assert bool(amx_build(shutil.which, {"CXX": right[0]}, tree=tmp_path, features=AMX).flags) is left_out


@GCC
@pytest.mark.parametrize("first", [True, False])
def test_the_flags_leave_amx_out_wherever_they_stand(first: bool) -> None:
    """llama.cpp adds -march=native, which for such a processor says so; what it asks for is INT8."""
    processor = ("-march=sapphirerapids",)
    argv = ["g++", *(WITHOUT_AMX + processor if first else processor + WITHOUT_AMX), "-dM", "-E", "-x", "c++", "-"]
    told = subprocess.run(argv, input="", capture_output=True, text=True, check=True).stdout
    assert "__AVX512VNNI__" in told
    assert "__AMX_INT8__" not in told
    assert "__AMX_TILE__" not in told


def test_a_build_keeps_the_flags_of_the_environment(tmp_path: Path) -> None:
    plan = BuildPlan("key", "cpu", 1, tmp_path, ("-DX=1",), ("cmake", "-DX=1"), ("cmake", "--build"))
    made = with_flags(plan, WITHOUT_AMX, {"CXXFLAGS": "-g"})
    assert made.flags == (
        "-DX=1",
        "-DCMAKE_C_FLAGS=-mno-amx-tile -mno-amx-int8",
        "-DCMAKE_CXX_FLAGS=-g -mno-amx-tile -mno-amx-int8",
    )
    assert made.configure == ("cmake", *made.flags)
    assert made.compile == plan.compile


def test_the_line_for_pip_leaves_amx_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pip_install.pip_install("-U") == "pip install llama-cpp-python -U" or amx.has_amx()
    monkeypatch.setattr(pip_install, "amx_build", lambda _find: AmxBuild(WITHOUT_AMX, "why"))
    line = pip_install.pip_install(*pip_install.AFRESH, cmake="-DGGML_CUDA=on")
    flags = '"-mno-amx-tile -mno-amx-int8"'
    assert line.startswith(f'CFLAGS={flags} CXXFLAGS={flags} CMAKE_ARGS="-DGGML_CUDA=on" pip install llama-cpp-python ')
    assert flags in pip_install.install_hint()
