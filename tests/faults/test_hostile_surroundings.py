"""A hostile current directory and a user's credentials: nothing that lies there runs, and no child is given a token."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from support.command_line import PROGRAM, Ran, run_command, started

MODULES = ("json", "numpy", "click", "psutil", "pip", "sitecustomize", "usercustomize", "imatrix_runner_tests")
PROGRAMS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "cmake", "cc", "gcc", "c++", "git", "ninja", "nvidia-smi")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory of modules and programs that leave a trace when they are run."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(folder / f'trace-{name}')!r}, 'w')\n", encoding="utf-8")
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\ntouch '{folder}/trace-{name}'\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def in_the_trap(trap: Path, *arguments: str | Path, **env: str) -> Ran:
    env = {"PATH": os.pathsep.join((".", os.environ["PATH"])), **env}
    ran = run_command(*arguments, cwd=trap, env=env, program=PROGRAM)
    assert not list(trap.glob("trace-*"))
    return ran


def test_fetching_a_source_runs_no_pip_of_the_current_directory(trap: Path) -> None:
    """The index is empty: pip is asked, and answers."""
    env = {"IMATRIX_RUNNER_CACHE": str(trap.parent / "cache"), "PIP_NO_INDEX": "1"}
    ran = in_the_trap(trap, "tools", "build", "--version", "0.0.1", **env)
    assert ran.code == 4
    assert "pip's index offers no source of that version" in ran.err


@pytest.mark.parametrize("engine", ["embedded", "binaries"])
def test_levels_are_made_among_programs_and_modules_of_the_same_names(
    engine: str, trap: Path, tiny_model: Path, tiny_text: Path
) -> None:
    """All files are named relative to where the user stands; the programs run elsewhere."""
    (trap / "model.gguf").write_bytes(tiny_model.read_bytes())
    (trap / "text.txt").write_bytes(tiny_text.read_bytes())
    (trap / "types.txt").write_text("attn_v=q8_0\n", encoding="utf-8")
    arguments = ("run", "model.gguf", "-f", "text.txt", "-c", "128", "--chunks", "4", "--levels", "Q4_0", "--engine", engine)
    ran = in_the_trap(trap, *arguments, "--work-dir", "work", "--tensor-type-file", "types.txt")
    assert ran.code == 0, ran.err
    assert (trap / "work" / "model" / "model-Q4_0.gguf").is_file()


def test_temporary_folders_of_a_killed_run_are_gone_after_the_next(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    places = {"TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    arguments = ("quantize", tiny_model, "--levels", "Q4_0", "--work-dir", tmp_path / "work")
    with started("advise", tiny_model, "-f", tiny_text, cwd=tmp_path, env=places) as running:
        # A folder: Python tries with a file of a moment where it may write.
        running.wait_for(lambda: any(path.is_dir() for path in (tmp_path / "tmp").iterdir()))
        running.kill_tree()
    assert list((tmp_path / "tmp").iterdir())
    assert run_command(*arguments, cwd=tmp_path, env=places).code == 0
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the kernel shows no process's environment here")
@pytest.mark.parametrize("engine", ["embedded", "binaries"])
def test_no_process_of_a_run_holds_the_users_tokens(engine: str, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    secrets = {"HF_TOKEN": "hf_secret", "HUGGING_FACE_HUB_TOKEN": "hf_secret", "GITHUB_TOKEN": "ghp_secret"}
    arguments = ("run", tiny_model, "-f", tiny_text, "-c", "128", "--levels", "Q4_K_M", "--engine", engine)
    seen: dict[int, tuple[list[str], bytes]] = {}
    with started(*arguments, cwd=tmp_path, env=secrets, program=PROGRAM) as running:
        ours = psutil.Process(running.pid).cmdline()
        while running.process.poll() is None:
            for child in running.descendants():
                with suppress(psutil.Error, OSError):  # it ended while we looked
                    program, environment = child.cmdline(), Path(f"/proc/{child.pid}/environ").read_bytes()
                    # Else it is about to become another program, or became one just now.
                    if program and program != ours and program == child.cmdline():
                        seen[child.pid] = program, environment
            time.sleep(0.01)
        assert running.finish().code == 0
    assert seen
    assert not [program for program, environment in seen.values() if b"secret" in environment]
