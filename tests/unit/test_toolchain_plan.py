"""Plans, progress, prerequisites and diagnoses of a build: the pure parts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imatrix_runner.errors import NoSpaceError, ToolchainError, UsageError
from imatrix_runner.events import Event, Progress
from imatrix_runner.process import Command, Outcome, Runner
from imatrix_runner.toolchain import build as building
from imatrix_runner.toolchain.build import BuildRequest, build, default_jobs, plan_build, progress_of
from imatrix_runner.toolchain.diagnose import Need, diagnose, finder, manager, missing_needs, needs_advice
from imatrix_runner.toolchain.source import LlamaCppSource
from imatrix_runner.toolchain.store import Store

SOURCE = LlamaCppSource("sdist", "0.3.36", "0c1e57098", "llama-cpp-python 0.3.36", Path("/src"), "f" * 64)


def plan(
    request: BuildRequest, source: LlamaCppSource = SOURCE, *, ninja: bool = True, system: str = "linux"
) -> building.BuildPlan:
    return plan_build(request, source, cmake="/usr/bin/cmake", ninja=ninja, jobs=2, system=system)


def test_a_plan_names_key_flags_and_targets(tmp_path: Path) -> None:
    made = plan(BuildRequest(cache=tmp_path))
    assert made.key == "0.3.36-0c1e57098-cpu"
    assert made.build_dir == tmp_path / "builds" / made.key
    assert made.configure[:7] == ("/usr/bin/cmake", "-S", "/src", "-B", str(made.build_dir), "-G", "Ninja")
    for flag in (
        "-DLLAMA_BUILD_COMMIT=0c1e57098",
        "-DCMAKE_INSTALL_RPATH=$ORIGIN",
        "-DBUILD_SHARED_LIBS=ON",
        "-DLLAMA_BUILD_APP=OFF",
    ):
        assert flag in made.configure
    assert made.compile[-5:] == ("llama-imatrix", "llama-quantize", "llama-tokenize", "llama-perplexity", "llama-gguf-split")
    assert "-G" not in plan(BuildRequest(cache=tmp_path), ninja=False).configure


def test_backends_and_systems_change_flags_and_key(tmp_path: Path) -> None:
    cuda = plan(BuildRequest(backend="cuda", cache=tmp_path))
    assert "-DGGML_CUDA=ON" in cuda.flags
    assert cuda.key.endswith("-cuda")
    mac = plan(BuildRequest(cache=tmp_path), system="darwin")
    assert "-DGGML_METAL=OFF" in mac.flags
    assert "-DCMAKE_INSTALL_RPATH=@loader_path" in mac.flags
    assert "-DGGML_METAL=OFF" not in plan(BuildRequest(backend="metal", cache=tmp_path), system="darwin").flags


def test_the_build_number_comes_from_the_tag_or_from_the_history(tmp_path: Path) -> None:
    tagged = LlamaCppSource("git", "b9976", "abc", "url b9976", Path("/src"))
    assert "-DLLAMA_BUILD_NUMBER=9976" in plan(BuildRequest(cache=tmp_path), tagged).flags
    checkout = LlamaCppSource("directory", "0.5.0", "abc", "/src", Path("/src"))
    assert not [flag for flag in plan(BuildRequest(cache=tmp_path), checkout).flags if "BUILD_NUMBER" in flag]


def test_a_key_is_a_safe_name_whatever_the_source_is_called(tmp_path: Path) -> None:
    odd = LlamaCppSource("git", "feature/../../x y", "", "url", Path("/src"))
    assert plan(BuildRequest(cache=tmp_path), odd).build_dir.parent == tmp_path / "builds"


def test_jobs_follow_processors_and_memory() -> None:
    gib = 1 << 30
    assert default_jobs(8, 64 * gib) == 8
    assert default_jobs(8, 4 * gib) == 2
    assert default_jobs(8, gib // 2) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[12/149] Building CXX object x.o", (12, 149)),
        ("[ 12%] Building CXX object x.o", (12, 100)),
        ("[100%] Built target llama", (100, 100)),
        ("-- The C compiler", None),
        ("note: [12/149]", None),
    ],
)
def test_progress_is_the_build_tools_own_counter(line: str, expected: tuple[int, int] | None) -> None:
    assert progress_of(line) == expected


def test_progress_survives_lines_cut_anywhere() -> None:
    events: list[Event] = []
    lines = building._Lines(events.append)
    for piece in ("[1/", "3] Building a\n[2/3] Bui", "lding b\nwarning: x\n[3/3] Link", "ing c\n"):
        lines.feed(piece)
    assert events == [
        Progress("build", 1, 3, "Building a"),
        Progress("build", 2, 3, "Building b"),
        Progress("build", 3, 3, "Linking c"),
    ]


@pytest.mark.parametrize(
    ("line", "why", "todo"),
    [
        ("c++: fatal error: Killed signal terminated program cc1plus", "out of memory", "-j 1"),
        ("  No CMAKE_CXX_COMPILER could be found.", "compiler", "apt-get install build-essential"),
        ("CMake 3.14...3.28 or higher is required.  You are running version 3.10", "CMake is too old", "apt-get install cmake"),
        ("CMake 3.18 or higher is required.  You are running version 3.10.2", "CMake is too old", "apt-get install cmake"),
        ("  No CMAKE_CUDA_COMPILER could be found.", "CUDA toolkit", "nvidia-cuda-toolkit"),
        ('Target "ggml-cuda" links to: CUDA::cublas but the target was not found.', "complete CUDA toolkit", "cuda-toolkit"),
        ("  Failed to find ROCm root directory.", "ROCm", "ROCm"),
        ("Could NOT find Vulkan (missing: Vulkan_LIBRARY glslc)", "Vulkan SDK", "glslc"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_120'", "does not work with this compiler", "CUDAHOSTCXX"),
        ('CMake Error: CMake was unable to find a build program corresponding to "Ninja".', "Ninja", "ninja-build"),
        ("/usr/bin/ld: ggml.c.o: file not recognized: file format not recognized", "object file is damaged", "--force"),
        ("/usr/bin/ld: error: part4.c.o: file too short", "object file is damaged", "--force"),
    ],
)
def test_a_failed_build_is_diagnosed(line: str, why: str, todo: str) -> None:
    found = diagnose(["[1/9] Building", line], False, "apt-get")
    assert found is not None
    assert not found.full_disk
    assert why in found.why
    assert todo in found.todo


def test_a_full_disk_an_oom_kill_and_the_unknown() -> None:
    disk = diagnose(["/tmp/x.s: fatal error: error writing: No space left on device"], False, "apt-get")
    assert disk is not None
    assert disk.full_disk
    killed = diagnose([], True, "")
    assert killed is not None
    assert "memory" in killed.why
    assert diagnose(["error: expected ';'"], False, "apt-get") is None


def test_a_full_disk_becomes_its_own_error(tmp_path: Path) -> None:
    made = plan(BuildRequest(cache=tmp_path))
    outcome = Outcome(Command(made.compile), 1, 1.0, ("fatal error: No space left on device",), None)
    error = building._failure(outcome, tmp_path / "log", made, Store(tmp_path))
    assert isinstance(error, NoSpaceError)
    assert error.exit_code == 8


def test_every_missing_prerequisite_is_named_at_once() -> None:
    needs = missing_needs("cuda", True, {}, lambda name: None, system="linux")
    found = {need.thing for need in needs}
    assert {"cmake", "compiler", "ninja", "git"} <= found
    assert (
        needs_advice([Need("CMake", "cmake"), Need("Ninja", "ninja")], "apt-get")
        == "Type: sudo apt-get install cmake ninja-build"
    )
    # No package of that manager has ROCm: then in words.
    assert "ROCm" in needs_advice([Need("HIP", "hip")], "apt-get")
    assert needs_advice([Need("CMake", "cmake")], "").startswith("Install CMake")


@pytest.mark.parametrize(("backend", "thing"), [("vulkan", "vulkan"), ("hip", "hip"), ("metal", "metal"), ("cpu", None)])
def test_each_backend_needs_its_own_tool(backend: str, thing: str | None) -> None:
    there = {"cmake", "cc", "c++", "ninja"}
    needs = missing_needs(backend, False, {}, lambda name: name if name in there else None, system="linux")
    assert [need.thing for need in needs] == ([thing] if thing else [])


def test_cuda_is_found_through_its_variables(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    there = {"cmake", "cc", "c++", "make"}
    needs = missing_needs("cuda", False, {"CUDA_PATH": str(tmp_path)}, lambda name: name if name in there else None, "linux")
    assert needs == []


def test_programs_beside_this_python_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cmake").write_text("#!/bin/sh\n")
    (tmp_path / "cmake").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    find = finder({"PATH": "/nowhere"})
    assert find("cmake") == str(tmp_path / "cmake")
    assert manager(find) == ""


def test_a_machine_without_tools_is_told_so_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imatrix_runner.toolchain.build.finder", lambda env: lambda name: None)
    with pytest.raises(ToolchainError) as caught:
        build(BuildRequest(cache=tmp_path / "cache"), Runner(), lambda event: None)
    assert "CMake, a C and C++ compiler, Ninja or Make" in caught.value.why
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["build.lock"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"backend": "abacus"},
        {"jobs": 0},
        {"ref": "b1", "version": "0.3.36"},
        {"ref": "--upload-pack=evil"},
        {"version": "0.3.36 --index-url=http://evil"},
        {"source": Path("/nowhere")},
    ],
)
def test_impossible_requests_are_usage_errors(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        build(BuildRequest(cache=tmp_path, **wrong), Runner(), lambda event: None)  # type: ignore[arg-type]


def test_a_disk_too_small_is_told_before_the_source_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_source", lambda *args: SOURCE)
    monkeypatch.setattr(building, "SPACE_NEEDED", 1 << 60)
    with pytest.raises(NoSpaceError):
        build(BuildRequest(cache=tmp_path / "cache"), Runner(), lambda event: None)
    assert not (tmp_path / "cache" / "builds").exists()


def test_a_killed_make_build_loses_its_newest_results_only(tmp_path: Path) -> None:
    # Make believes a torn object for its date; Ninja keeps a log and does not.
    for number in range(6):
        path = tmp_path / f"{number}.o"
        path.touch()
        os.utime(path, (number, number))
    building._drop_unsure(tmp_path, jobs=1)
    assert sorted(path.name for path in tmp_path.glob("*.o")) == ["0.o", "1.o", "2.o", "3.o"]


def test_force_starts_afresh_after_a_failure_but_continues_an_interrupted_build(tmp_path: Path) -> None:
    made = plan(BuildRequest(cache=tmp_path))
    building._prepare(made, afresh=False)
    (made.build_dir / "x.o").touch()
    building._prepare(made, afresh=True)
    assert (made.build_dir / "x.o").exists()
    (made.build_dir / building._FAILED_FILE).touch()
    building._prepare(made, afresh=False)
    assert (made.build_dir / "x.o").exists()
    (made.build_dir / building._FAILED_FILE).touch()
    building._prepare(made, afresh=True)
    assert not (made.build_dir / "x.o").exists()
    # Another compiler, flag or source: nothing of the old build may be kept.
    (made.build_dir / "x.o").touch()
    building._prepare(plan(BuildRequest(cache=tmp_path), ninja=False), afresh=False)
    assert not (made.build_dir / "x.o").exists()
