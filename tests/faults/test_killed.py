"""Killed at any moment and started again with the same command: the same bytes as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from imatrix_runner.imatrix.formats import read
from support.children import is_running
from support.command_line import PROGRAM, Ran, Running, each_tenth, run_command, started, wait_gone
from support.llama_tools import digest, leftovers, levels_in
from support.tiny_models import write_hf_directory

KILLS = 20
LEVELS = "Q4_0,Q4_K_M,Q3_K_M,IQ4_XS"
RANGES = ("-c", "64", "-b", "512", "--chunks", "24", "--output-frequency", "8")
ENGINES = ("binaries", "embedded")


@dataclass(frozen=True)
class Undisturbed:
    """What a run ends with when nobody disturbs it, and how long that takes."""

    arguments: tuple[str, ...]
    imatrix: str
    levels: dict[str, str]
    seconds: float

    def check(self, workspace: Path) -> None:
        assert digest(workspace / "imatrix.gguf") == self.imatrix
        assert levels_in(workspace) == self.levels
        assert leftovers(workspace) == []


def undisturbed(folder: Path, *arguments: str | Path) -> Undisturbed:
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    done = run_command(*arguments, cwd=folder)
    assert done.code == 0, done.err
    seconds = time.monotonic() - began
    (workspace,) = (folder / "work").iterdir()
    return Undisturbed(tuple(map(str, arguments)), digest(workspace / "imatrix.gguf"), levels_in(workspace), seconds)


@pytest.fixture(scope="module", params=ENGINES)
def demo_run(request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder, engine = tmp_path_factory.mktemp("undisturbed"), ("--engine", request.param)
    return undisturbed(folder, "run", demo_model, "--levels", LEVELS, *RANGES, *engine)


def _checkpoint(workspace: Path) -> bool:
    return (workspace / ".imatrix-parts" / "checkpoint.gguf").exists()


def test_killed_at_twenty_random_moments(demo_run: Undisturbed, tmp_path: Path) -> None:
    """Each kill is followed by the same command, itself killed at the next moment; a run that gets through must have the
    undisturbed bytes, and the next begins from nothing."""
    chooser = random.Random(2)
    moments = [(index + chooser.random()) / KILLS for index in range(KILLS)]
    chooser.shuffle(moments)
    workspace = tmp_path / "work" / "demo-model"
    seconds, kills, finished = demo_run.seconds, 0, 0
    fresh = True
    while moments:
        with started(*demo_run.arguments, cwd=tmp_path, program=each_tenth(kills)) as running:
            began = time.monotonic()
            end = began + moments[-1] * seconds
            while time.monotonic() < end and running.process.poll() is None:
                time.sleep(0.002)
            took = time.monotonic() - began
            killed = running.kill_tree()
        if killed:
            kills += 1
            moments.pop()
        else:
            demo_run.check(workspace)
            shutil.rmtree(workspace)
            finished += 1
            seconds = min(seconds, took) if fresh else seconds  # the machine is faster than when it was measured
        fresh = not killed
    last = run_command(*demo_run.arguments, cwd=tmp_path)
    assert last.code == 0, last.err
    demo_run.check(workspace)
    assert kills == KILLS
    print(f"{kills} kills, {finished + 1} runs went through")


def die_and_go_on(folder: Path, *arguments: str | Path) -> int:
    """Run the same command again and again, killed after its first or its second rename in turn, and in the end (the files of a
    report have their names together) always one later, until it gets through; returns how often it died."""
    for turn in range(60):
        count = turn % 2 + 1 if turn < 24 else turn - 22
        died = run_command(*arguments, cwd=folder, dies_after=count)
        if died.code == 0:
            return turn
        assert died.code == -signal.SIGKILL, f"in turn {turn}: {died.err}"
    pytest.fail("it never got through")


@pytest.mark.parametrize(("mode", "engine"), [("auto", "binaries"), ("generate", "binaries"), ("auto", "embedded")])
def test_killed_between_any_two_renames(mode: str, engine: str, tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Also where a random moment seldom falls: between a file's name and its record, between a record and the tidying."""
    arguments = ("run", tiny_model, "-f", tiny_text, "--imatrix", mode, "--levels", "Q4_K_M,Q4_0", "--jobs", "1")
    arguments += (
        "-c",
        "128",
        "-b",
        "512",
        "--chunks",
        "8",
        "--output-frequency",
        "4",
        "--save-frequency",
        "3",
        "--engine",
        engine,
    )
    quiet = undisturbed(tmp_path / "quiet", *arguments)
    assert die_and_go_on(tmp_path, *arguments) > 8
    quiet.check(tmp_path / "work" / "tiny")
    snapshots = [folder / "work" / "tiny" / "imatrix.gguf.at_4" for folder in (tmp_path, tmp_path / "quiet")]
    assert len({digest(path) for path in snapshots}) == 1
    after = run_command(*arguments, "--json", cwd=tmp_path).document
    assert after["plan"]["imatrix"]["action"] == "up-to-date"
    assert [level["status"] for level in after["levels"]] == ["skipped", "skipped"]


@pytest.mark.convert
def test_a_conversion_survives_kills_between_any_two_renames(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = write_hf_directory(tmp_path / "source")
    arguments = ("run", source, "--imatrix", "none", "--levels", "Q4_0")
    assert die_and_go_on(tmp_path, *arguments) > 4
    other = tmp_path / "other"
    other.mkdir()
    assert run_command(*arguments, cwd=other).code == 0
    assert levels_in(tmp_path / "work" / "source") == levels_in(other / "work" / "source")
    assert levels_in(tmp_path / "work" / "source").keys() == {"BF16", "Q4_0"}


def test_a_level_made_again_survives_kills_too(tiny_model: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    """The old file, the new one and the journal cannot disagree: a changed option killed halfway is simply done again."""
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "Q4_K_M")
    pure = (*arguments, "--pure")
    expected = tmp_path / "expected"
    expected.mkdir()
    assert run_command(*pure, cwd=expected).code == 0
    assert run_command(*arguments, cwd=tmp_path).code == 0
    assert die_and_go_on(tmp_path, *pure) > 3
    assert levels_in(tmp_path / "work" / "tiny") == levels_in(expected / "work" / "tiny")


def _log_has(workspace: Path, step: str, words: str) -> bool:
    log = workspace / "logs" / f"{step}.log"
    return log.is_file() and words in log.read_text(encoding="utf-8", errors="replace")


def _partial(workspace: Path, level: str) -> bool:
    return any((workspace / ".partial" / level).glob("*.gguf"))


def _end_alone(running: Running) -> list[psutil.Process]:
    orphans = running.kill_alone()
    assert orphans
    return orphans


def _told_of_orphans(again: Ran, orphans: list[psutil.Process]) -> None:
    assert again.code == 0, again.err
    assert f"An earlier run was killed; {len(orphans)} of its programs were still running and were ended." in again.err
    wait_gone(orphans)


def test_an_orphaned_llama_quantize_is_ended(tiny_model: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    """IQ2_S: setting up its tables takes seconds in which the orphan writes nothing that could end it by a broken pipe."""
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "IQ2_S", "--engine", "binaries")
    workspace = tmp_path / "work" / "tiny"
    with started(*arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: _log_has(workspace, "level-IQ2_S", "converting to iq2"))
        orphans = _end_alone(running)
    again = run_command(*arguments, cwd=tmp_path)
    _told_of_orphans(again, orphans)
    other = tmp_path / "other"
    other.mkdir()
    assert run_command(*arguments, cwd=other).code == 0
    assert levels_in(workspace) == levels_in(other / "work" / "tiny")
    assert leftovers(workspace) == []


@pytest.mark.parametrize("demo_run", ["binaries"], indirect=True)
def test_an_orphan_that_does_not_listen_is_killed(demo_run: Undisturbed, tmp_path: Path) -> None:
    """A stopped llama-imatrix hears no SIGTERM: as one that hangs in a driver."""
    workspace = tmp_path / "work" / "demo-model"
    with started(*demo_run.arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: _log_has(workspace, "imatrix", "computing over"))
        orphans = running.descendants()
        for process in orphans:
            process.suspend()
        assert _end_alone(running) == orphans
    again = run_command(*demo_run.arguments, cwd=tmp_path)
    _told_of_orphans(again, orphans)
    demo_run.check(workspace)


@pytest.mark.parametrize(("name", "stage"), [("SIGINT", "imatrix"), ("SIGTERM", "levels"), ("SIGHUP", "imatrix")])
def test_a_signal_ends_it_cleanly_and_the_same_command_continues(
    name: str, stage: str, demo_run: Undisturbed, tmp_path: Path
) -> None:
    workspace = tmp_path / "work" / "demo-model"
    with started(*demo_run.arguments, cwd=tmp_path) as running:
        if stage == "imatrix":
            running.wait_for(lambda: _checkpoint(workspace))
        else:
            running.wait_for(lambda: _partial(workspace, "IQ4_XS"))
        children = running.descendants()
        os.kill(running.pid, getattr(signal, name))
        done = running.finish()
    assert done.code == 130
    assert not any(is_running(child.pid) for child in children)
    assert f"Error: Stopped by {name}." in done.err
    assert f"Continue with: imatrix-runner run {demo_run.arguments[1]} --levels {LEVELS}" in done.err
    assert "Traceback" not in done.err
    # A pass continues in its half files; what a program wrote half is of no use.
    assert (workspace / ".partial").exists() is (stage == "levels" and "embedded" in demo_run.arguments)
    again = run_command(*demo_run.arguments, cwd=tmp_path)
    assert again.code == 0, again.err
    if stage == "imatrix":
        assert "chunks kept" in again.err
    demo_run.check(workspace)


def test_status_tells_what_is_resumable_and_how(demo_run: Undisturbed, tmp_path: Path) -> None:
    workspace = tmp_path / "work" / "demo-model"
    with started(*demo_run.arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: _checkpoint(workspace))
        (entry,) = run_command("status", "--json", cwd=tmp_path).document["workspaces"]
        assert entry["state"] == "running"
        assert entry["owner"].startswith(f"process {running.pid} since")
        running.kill_tree()
    (entry,) = run_command("status", "--json", cwd=tmp_path).document["workspaces"]
    assert entry["state"] == "resumable"
    assert entry["command"].startswith(f"imatrix-runner run {demo_run.arguments[1]} --levels {LEVELS}")
    assert entry["levels_wanted"] == 4
    assert run_command("status", cwd=tmp_path).out.count("continue with:") == 1


def test_an_ignored_hangup_stays_ignored(tiny_model: Path, tiny_imatrix: Path, tmp_path: Path) -> None:
    """As under nohup: the terminal goes away, the work goes on."""
    arguments = ("quantize", tiny_model, "--imatrix", tiny_imatrix, "--levels", "IQ3_S")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # children inherit it
    try:
        with started(*arguments, cwd=tmp_path, program=PROGRAM) as running:
            running.wait_for(lambda: _partial(tmp_path / "work" / "tiny", "IQ3_S"))
            os.kill(running.pid, signal.SIGHUP)
            done = running.finish()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.code == 0, done.err
    assert read(tiny_imatrix).matrix.chunk_count == 20  # what was read was not touched
