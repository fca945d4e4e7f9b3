"""Runs that round with error feedback, killed at many moments and started again with the same command: the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.command_line import Ran, Running, run_command, started
from support.llama_tools import digest, leftovers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

KILLS = 20
NAMES = "Q4_K_M,REFINED-Q3_K_M,FEEDBACK-Q4_K_M,FEEDBACK-Q2_K"
OPTIONS = ("-c", "128", "--levels", NAMES, "--feedback-tokens", "4096", "--engine", "embedded")


def written(workspace: Path) -> dict[str, str]:
    """What must not depend on interruptions: covariances and levels by their digests, and the records of comparisons."""
    files = (*workspace.glob(".covariances/*"), *workspace.glob("*.gguf"))
    records = {path.name: sorted(set(path.read_text(encoding="utf-8").splitlines())) for path in workspace.glob(".mixes/*")}
    digests = {path.relative_to(workspace).as_posix(): digest(path) for path in files}
    return digests | {name: "\n".join(lines) for name, lines in records.items()}


def progress(workspace: Path) -> int:
    """How many covariances, comparisons and tensors are recorded."""
    ledgers = [*workspace.glob(".partial/*/ledger.jsonl"), *workspace.glob(".ledgers/*")]
    lines = sum(max(0, path.read_bytes().count(b"\n") - 1) for path in (*workspace.glob(".mixes/*.jsonl"), *ledgers))
    return len([*workspace.glob(".covariances/*.covariance")]) + lines


@dataclass(frozen=True)
class Rounding:
    """A command that rounds otherwise, what it leaves when it is not disturbed, and how much it records."""

    arguments: tuple[str | Path, ...]
    files: dict[str, str]
    n_records: int

    def finish(self, folder: Path, *further: str) -> Ran:
        """The same command, undisturbed."""
        done = run_command(*self.arguments, *further, cwd=folder)
        assert done.code == 0, done.err
        workspace = folder / "work" / "tiny"
        assert written(workspace) == self.files
        assert set(leftovers(workspace)) <= {".covariances", ".mixes"}
        return done


@pytest.fixture(scope="module")
def rounding(tiny_model: Path, tiny_imatrix: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Rounding:
    folder = tmp_path_factory.mktemp("quiet")
    text = folder / "text.txt"
    text.write_text(tiny_text.read_text(encoding="utf-8")[:20000], encoding="utf-8")
    arguments = ("run", tiny_model, "--imatrix", tiny_imatrix, "-f", text, *OPTIONS)
    done = run_command(*arguments, cwd=folder)
    assert done.code == 0, done.err
    workspace = folder / "work" / "tiny"
    files = written(workspace)
    assert any(name.startswith(".covariances/") for name in files)
    return Rounding(arguments, files, progress(workspace))


def wait_for(workspace: Path, least: int, running: Running) -> None:
    deadline = time.monotonic() + 120
    while running.process.poll() is None and time.monotonic() < deadline and progress(workspace) < least:
        time.sleep(0.002)


def test_killed_at_twenty_moments(rounding: Rounding, tmp_path: Path) -> None:
    """Each time a few records later: in the covariances, the comparison, the pass. After each kill nothing but whole files is
    there under its name, and the same command continues."""
    workspace, chooser = tmp_path / "work" / "tiny", random.Random(16)
    killed = 0
    for kill in range(KILLS):
        with started(*rounding.arguments, cwd=tmp_path) as running:
            wait_for(workspace, kill * rounding.n_records // KILLS, running)
            time.sleep(chooser.choice((0.0, 0.02, 0.1)))
            was_killed = running.kill_tree()
        for name, known in rounding.files.items():
            path = workspace / name
            if path.suffix in (".gguf", ".covariance") and path.exists():
                assert digest(path) == known
        killed += was_killed
        if not was_killed:  # on a busy machine it may be done first: the next one begins anew
            shutil.rmtree(workspace)
    assert killed > KILLS // 2
    rounding.finish(tmp_path)


def test_one_thread_and_a_stop_in_between(rounding: Rounding, tmp_path: Path) -> None:
    """Ctrl-C keeps what is done; one thread makes the same bytes as all."""
    with started(*rounding.arguments, "-t", "1", cwd=tmp_path) as running:
        wait_for(tmp_path / "work" / "tiny", rounding.n_records // 2, running)
        os.kill(running.pid, signal.SIGINT)
        assert running.finish(60).code in (130, 0)
    rounding.finish(tmp_path, "-t", "1")
