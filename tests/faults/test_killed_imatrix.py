"""Fifty SIGKILLs of a generation inside llama-cpp-python, at seeded random moments: the same bytes, the same decisions."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from support.command_line import each_tenth, run_command, started
from support.llama_tools import digest, leftovers

KILLS = 50
OPTIONS = ("-c", "32", "-b", "64", "-t", "1", "--output-frequency", "6", "--save-frequency", "60", "--chunks", "160")
"""Batches of two small chunks: a kill falls as often among batches, checkpoints and snapshots as with large ones."""


def _files(workspace: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in workspace.glob("imatrix.gguf*")}


def test_fifty_random_kills_change_no_byte(demo_model: Path, tmp_path: Path) -> None:
    """Every kill takes the whole tree and is followed by the same command; whenever one gets through, the matrix and its
    snapshots must be those of an undisturbed run, and the next begins from nothing. The engine saves every six chunks, so
    kills fall before, in and after pieces, checkpoints, snapshots and the final rename. One in three falls at a moment of the
    clock, the others shortly after a checkpoint was replaced: how much of a run is start-up differs between machines."""
    arguments = ("imatrix", "generate", demo_model, *OPTIONS, "--engine", "embedded")
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    began = time.monotonic()
    done = run_command(*arguments, cwd=quiet)
    seconds = time.monotonic() - began
    assert done.code == 0, done.err
    expected = _files(quiet / "work" / "demo-model")
    assert len(expected) > 2
    chooser = random.Random(4)
    workspace = tmp_path / "work" / "demo-model"
    checkpoint = workspace / ".imatrix-parts" / "checkpoint.gguf"
    kills = through = continued = 0
    while kills < KILLS:
        with started(*arguments, cwd=tmp_path, program=each_tenth(kills)) as running:
            if chooser.random() < 1 / 3:
                end, saves = time.monotonic() + chooser.uniform(0.05, 0.5) * seconds, None
            else:
                end, saves = None, chooser.randint(1, 5)
            seen = _stamp(checkpoint)
            while running.process.poll() is None and (end is None or time.monotonic() < end):
                if saves is not None and (now := _stamp(checkpoint)) != seen:
                    seen, saves = now, saves - 1
                    if saves == 0:
                        end, saves = time.monotonic() + chooser.uniform(0, 0.05), None
                time.sleep(0.001)
            killed = running.kill_tree()
        kills += killed
        continued += killed and checkpoint.exists()
        if not killed:
            assert _files(workspace) == expected
            assert leftovers(workspace) == []
            shutil.rmtree(workspace)
            through += 1
    last = run_command(*arguments, cwd=tmp_path)
    assert last.code == 0, last.err
    assert _files(workspace) == expected
    assert leftovers(workspace) == []
    assert continued > KILLS // 4  # they did not all come before anything was saved
    print(f"{kills} kills, {continued} of them with a checkpoint; {through + 1} runs went through")


def _stamp(path: Path) -> int | None:
    """When the file got its present bytes; None while there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SIGABRT", "killed by SIGABRT"),
        ("SIGSEGV", "killed by SIGSEGV"),
        ("SIGKILL", "killed by SIGKILL"),
        ("SIGSTOP", "it wrote no output and used no CPU time, and was ended"),
    ],
)
def test_a_worker_that_dies_or_hangs_costs_an_error_and_no_work(name: str, why: str, demo_model: Path, tmp_path: Path) -> None:
    """As a failed assertion of llama.cpp, a crash, the kernel's OOM killer or a driver that hangs would end it."""
    arguments = ("imatrix", "generate", demo_model, "-c", "128", "-b", "256", "--engine", "embedded", "--output-frequency", "8")
    arguments += ("--timeout", "2", "--chunks", "80", "-t", "1")
    checkpoint = tmp_path / "work" / "demo-model" / ".imatrix-parts" / "checkpoint.gguf"
    with started(*arguments, cwd=tmp_path) as running:
        running.wait_for(checkpoint.exists)
        (worker,) = running.descendants()
        os.kill(worker.pid, getattr(signal, name))
        done = running.finish()
    assert done.code == 5, done.err
    assert "Error: The imatrix could not be computed." in done.err
    assert why in done.err
    assert "imatrix.log" in done.err
    assert "Traceback" not in done.err
    again = run_command(*arguments, cwd=tmp_path)
    assert again.code == 0, again.err
    assert "chunks kept" in again.err
    assert leftovers(tmp_path / "work" / "demo-model") == []


def test_ctrl_c_finishes_the_batch_and_the_next_run_has_it(demo_model: Path, tmp_path: Path) -> None:
    arguments = ("imatrix", "generate", demo_model, "-c", "256", "-b", "1024", "--chunks", "60", "--output-frequency", "1000")
    arguments += ("--engine", "embedded", "-t", "1")
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    assert run_command(*arguments, cwd=quiet).code == 0
    log = tmp_path / "work" / "demo-model" / "logs" / "imatrix.log"
    with started(*arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: log.is_file() and log.read_bytes().count(b'"type":"progress"') >= 3)
        os.kill(running.pid, signal.SIGINT)
        done = running.finish()
    assert done.code == 130, done.err
    assert "Continue with: imatrix-runner imatrix generate" in done.err
    parts = tmp_path / "work" / "demo-model" / ".imatrix-parts"
    assert [path.suffix for path in parts.glob("0*")] == [".partial"]
    again = run_command(*arguments, cwd=tmp_path)
    assert again.code == 0, again.err
    name = Path("work") / "demo-model" / "imatrix.gguf"
    assert digest(tmp_path / name) == digest(quiet / name)
    assert leftovers(tmp_path / "work" / "demo-model") == []
    said = log.read_text(encoding="utf-8").split('"type":"collected"')
    assert len(said) == 2  # the range came to its end once
