"""What children get of the environment, what they find, and where they start. The children are real."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import psutil
import pytest

from imatrix_runner.environment import FURTHER, ChildNeeds, child_environment, find_program, search_path
from imatrix_runner.process import Command, Runner, capture
from support.children import eventually, python

SECRETS = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("OPENAI_API_KEY", "NVIDIA_API_KEY", "CUDA_MIRROR_PASSWORD", "CMAKE_UPLOAD_TOKEN", "GGML_SECRET", "SSH_AUTH_SOCK"),
)
KEPT = {
    ChildNeeds.NOTHING: ("HOME", "TMPDIR", "LC_ALL", "PYTHONUSERBASE"),
    ChildNeeds.COMPUTE: (
        "ROCR_VISIBLE_DEVICES",
        "VK_ICD_FILENAMES",
        "GGML_VK_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "HSA_ENABLE_SDMA",
    ),
    ChildNeeds.COMPILE: ("CC", "CXXFLAGS", "CMAKE_PREFIX_PATH", "CUDACXX", "SDKROOT"),
    ChildNeeds.NETWORK: ("https_proxy", "NO_PROXY", "SSL_CERT_FILE", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "GIT_SSL_CAINFO"),
    ChildNeeds.HUB: ("HF_HOME", "HF_ENDPOINT"),
}


@pytest.mark.parametrize(
    "needs", [*ChildNeeds, ChildNeeds.COMPUTE | ChildNeeds.COMPILE, ChildNeeds.NETWORK | ChildNeeds.HUB, ChildNeeds.NOTHING]
)
def test_a_child_gets_what_its_work_needs_and_no_credential(needs: ChildNeeds) -> None:
    everything = {name: "/x" for names in (SECRETS, *KEPT.values()) for name in names}
    got = child_environment({"OURS": "1"}, needs, everything)
    expected = {name for group, names in KEPT.items() for name in names if group in needs}
    assert got.keys() - {"PATH", "GGML_NO_BACKTRACE", "GOMP_SPINCOUNT"} == expected | {"OURS"}


def test_a_variable_that_is_not_known_here_can_be_named() -> None:
    env = {"VENDOR_GPU_MODE": "fast", "OTHER": "x", FURTHER: "VENDOR_GPU_MODE, ABSENT"}
    got = child_environment(env=env)
    assert got["VENDOR_GPU_MODE"] == "fast"
    assert not {"OTHER", "ABSENT"} & got.keys()


def test_relative_entries_of_search_paths_reach_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LIBRARY_PATH"):
        monkeypatch.setenv(name, os.pathsep.join(("", ".", "bin", "/usr/bin", "./x", "/bin", "")))
    got = child_environment(needs=ChildNeeds.COMPILE)
    for name in ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LIBRARY_PATH"):
        assert got[name] == os.pathsep.join(("/usr/bin", "/bin"))
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep)
    assert "LD_LIBRARY_PATH" not in child_environment()


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: programs and modules lie there that leave a trace when they run; it is on PATH."""
    trace = tmp_path / "trace"
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("git", "cc", "nvidia-smi", "cmake"):
        (folder / name).write_text(f"#!/bin/sh\ntouch {trace}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    for name in ("json", "pip", "sitecustomize", "usercustomize"):
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'w')\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", os.pathsep.join((".", "", os.environ["PATH"])))
    monkeypatch.setenv("PYTHONPATH", ".")
    return trace


def test_nothing_that_lies_in_the_current_directory_runs(hostile: Path) -> None:
    for name in ("git", "cc", "nvidia-smi", "cmake"):
        found = find_program(name, search_path(os.environ))
        assert found is None or not found.startswith(str(hostile.parent))
        try:
            capture(Command((name, "--version")), seconds=60)
        except FileNotFoundError:
            assert found is None
    where = capture(python("import json, os, sys; print(os.getcwd(), '.' in sys.path)"), seconds=60)
    assert where.stdout.split() == ["/", "False"]
    assert capture(Command((python("").argv[0], "-m", "pip", "--version")), seconds=60).returncode == 0
    assert not hostile.exists()


def test_a_program_named_with_its_directory_is_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "own"
    program.write_text("#!/bin/sh\necho mine\n", encoding="utf-8")
    assert find_program(str(program), "") is None  # not executable
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(tmp_path)
    assert find_program("./own", "") == str(program)
    assert capture(Command(("./own",)), seconds=60).stdout == "mine\n"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the kernel shows no process's environment here")
def test_a_token_is_not_in_what_the_kernel_shows_of_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process can empty its own ``os.environ``; what it was started with stays visible."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "hf_very_secret")
    seen: list[bytes] = []

    def look(pid: int, alive: bool) -> None:
        if alive:
            place = Path(f"/proc/{pid}/environ")
            assert eventually(lambda: b"GGML_NO_BACKTRACE" in place.read_bytes())
            seen.append(place.read_bytes())
            psutil.Process(pid).kill()

    for needs in (*ChildNeeds, ChildNeeds.NOTHING):
        Runner(on_child=look).run(Command(python("import time; time.sleep(600)").argv, needs=needs))
    assert len(seen) == len(ChildNeeds) + 1
    assert not any(b"secret" in environment for environment in seen)
