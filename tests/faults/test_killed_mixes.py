"""Runs that choose mixes, killed at many moments and started again with the same command: the same bytes in the end."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.children import is_running
from support.command_line import Ran, Running, run_command, started
from support.llama_tools import digest, leftovers, levels_in

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

KILLS = 20
OPTIONS = ("-c", "64", "--types", "q3_k,q4_k,q6_k", "--like", "Q4_K_M", "--size", "800KiB", "--engine", "embedded")


def records(workspace: Path) -> int:
    """How many errors, probes and trials of recipes are recorded."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in (workspace / ".mixes").glob("*.jsonl"))


def written(workspace: Path) -> dict[str, str]:
    """The digest of everything that must not depend on interruptions: costs, the cost map, recipes, and levels."""
    files = (*workspace.glob(".mixes/*"), *workspace.glob("*.json"), *workspace.glob("*.txt"), *workspace.glob("*.gguf"))
    with_times = ("journal.json", "report.json")
    return {path.relative_to(workspace).as_posix(): digest(path) for path in files if path.name not in with_times}


@dataclass(frozen=True)
class Mixing:
    """A command that chooses two mixes, and what it leaves when it is not disturbed."""

    arguments: tuple[str | Path, ...]
    workspace: Path
    files: dict[str, str]
    n_records: int

    def check(self, workspace: Path) -> None:
        assert written(workspace) == self.files
        assert set(leftovers(workspace)) == {".mixes"}

    def is_prefix(self, workspace: Path) -> None:
        """What a kill left of each file of costs is the beginning of the undisturbed one, perhaps with a torn line."""
        for path in (workspace / ".mixes").glob("*.jsonl"):
            lines = path.read_bytes().splitlines(keepends=True)
            whole = (self.workspace / ".mixes" / path.name).read_bytes()
            assert whole.startswith(b"".join(line for line in lines if line.endswith(b"\n")))

    def finish(self, folder: Path) -> Ran:
        """The same command, undisturbed."""
        done = run_command(*self.arguments, cwd=folder)
        assert done.code == 0, done.err
        self.check(folder / "work" / "tiny")
        return done


@pytest.fixture(scope="module")
def mixing(tiny_model: Path, tiny_imatrix: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixing:
    folder = tmp_path_factory.mktemp("quiet")
    text = folder / "text.txt"
    text.write_text(tiny_text.read_text(encoding="utf-8")[:2600], encoding="utf-8")
    arguments = ("run", tiny_model, "--imatrix", tiny_imatrix, "-f", text, *OPTIONS)
    done = run_command(*arguments, cwd=folder)
    assert done.code == 0, done.err
    workspace = folder / "work" / "tiny"
    assert len(levels_in(workspace)) == 2
    return Mixing(arguments, workspace, written(workspace), records(workspace))


@dataclass
class Moment:
    """``wait`` seconds after ``least`` costs are recorded."""

    workspace: Path
    least: int
    wait: float
    begun: float | None = None

    def reached(self) -> bool:
        if self.begun is None and records(self.workspace) >= self.least:
            self.begun = time.monotonic()
        return self.begun is not None and time.monotonic() - self.begun >= self.wait


def kill_at(running: Running, moment: Moment) -> bool:
    """Let the command run until a moment or its end; whether it was killed."""
    deadline = time.monotonic() + 120
    while running.process.poll() is None and time.monotonic() < deadline and not moment.reached():
        time.sleep(0.002)
    return running.kill_tree()


def test_killed_at_twenty_moments(mixing: Mixing, tmp_path: Path) -> None:
    """Each time some costs later: in the errors, in the probes, in the recipes that are tried for one mix and the other, and
    after the last one, when mixes are chosen and written. Every kill is followed by the same command."""
    workspace, chooser = tmp_path / "work" / "tiny", random.Random(15)
    left = []
    for kill in range(KILLS):
        least = (kill + 1) * mixing.n_records // KILLS
        with started(*mixing.arguments, cwd=tmp_path) as running:
            assert kill_at(running, Moment(workspace, least, chooser.choice((0.0, 0.05, 0.2)) * chooser.random()))
        mixing.is_prefix(workspace)
        left.append(records(workspace))
    assert left == sorted(left)
    assert sum(0 < count < mixing.n_records for count in left) > KILLS // 2
    mixing.finish(tmp_path)


def test_killed_between_any_two_renames(mixing: Mixing, tmp_path: Path) -> None:
    """When the costs are measured: the cost map, recipes, their copies next to the levels, the journal and the levels follow
    one another, and a kill comes after each in turn."""
    workspace = tmp_path / "work" / "tiny"
    (workspace / ".mixes").mkdir(parents=True)
    for path in (mixing.workspace / ".mixes").glob("*.jsonl"):
        (workspace / ".mixes" / path.name).write_bytes(path.read_bytes())
    for count in range(1, 40):
        died = run_command(*mixing.arguments, cwd=tmp_path, dies_after=count)
        if died.code == 0:
            break
        assert died.code == -signal.SIGKILL, died.err
    assert died.code == 0
    assert count > 6
    assert "probes of tensors" not in died.err
    mixing.check(workspace)


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_ctrl_c_keeps_what_was_measured(share: float, mixing: Mixing, tmp_path: Path) -> None:
    workspace = tmp_path / "work" / "tiny"
    with started(*mixing.arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: records(workspace) >= share * mixing.n_records)
        children = running.descendants()
        os.kill(running.pid, signal.SIGINT)
        done = running.finish()
    assert done.code == 130, done.err
    assert not any(is_running(child.pid) for child in children)
    assert "what was finished is kept" in done.err
    assert "Continue with: imatrix-runner run " in done.err
    assert "--like Q4_K_M --size 800KiB" in done.err
    assert "Traceback" not in done.err
    assert not list((workspace / ".mixes").glob(".*reference*"))
    assert levels_in(workspace) == {}
    (entry,) = run_command("status", "--json", cwd=tmp_path).document["workspaces"]
    assert entry["state"] == "resumable"
    kept = records(workspace)
    assert kept >= share * mixing.n_records
    mixing.finish(tmp_path)
