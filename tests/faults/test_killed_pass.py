"""A pass that writes many levels, killed at any moment and started again with the same command: llama-quantize's own bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from imatrix_runner.engines.files import ledger
from imatrix_runner.engines.pass_parts import LedgerEntry
from imatrix_runner.models.gguf_file import read_header
from support.children import is_running
from support.command_line import Ran, each_tenth, run_command, started, wait_gone
from support.llama_tools import BareTools, leftovers, levels_in
from support.oracles import quantized
from support.tiny_models import write_llama_gguf

KILLS = 30
LEVELS = ("Q4_K_M", "Q5_1", "Q4_1", "Q3_K_M", "Q6_K")

Pairs = set[tuple[str, str]]
"""Of a tensor's name and a type's, as ggml spells it in capitals."""


@dataclass(frozen=True)
class Pass:
    """A pass that takes seconds, and the digests of what llama-quantize makes of the same."""

    model: Path
    arguments: tuple[str | Path, ...]
    bare: dict[str, str]
    pairs: Pairs

    def check(self, workspace: Path) -> None:
        assert levels_in(workspace) == self.bare
        assert leftovers(workspace) == []

    def finish(self, folder: Path) -> Ran:
        """The same command, undisturbed."""
        done = run_command(*self.arguments, "--json", cwd=folder)
        assert done.code == 0, done.err
        self.check(folder / "work" / "large")
        return done


@pytest.fixture(scope="module")
def large(tools: BareTools, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Pass:
    """22 million weights in 57 tensors, by one thread."""
    folder = tmp_path_factory.mktemp("large")
    model = write_llama_gguf(folder / "large-BF16.gguf", hidden=512, layers=6, ff=1536, vocab=4096)
    imatrix = folder / "imatrix.gguf"
    tools.imatrix(model, Path(tiny_text.name), imatrix, "-c", "128", "--chunks", "2", folder=tiny_text.parent)
    made = {name: quantized(tools, model, name, imatrix=imatrix).files[0] for name in LEVELS}
    arguments = ("quantize", model, "--imatrix", imatrix, "--levels", ",".join(LEVELS), "-t", "1", "--engine", "embedded")
    pairs = {(name, kind.upper()) for file in made.values() for name, kind, _, _ in file.tensors} - pairs_of(model)
    return Pass(model, arguments, {name: file.digest for name, file in made.items()}, pairs)


def pairs_of(file: Path) -> Pairs:
    return {(tensor.name, tensor.type_name.upper()) for tensor in read_header(file).tensors}


def recorded(workspace: Path) -> list[LedgerEntry]:
    """What the ledgers of half levels say is on the disk."""
    found = [ledger.read(path) for path in (workspace / ".partial").glob("*/ledger.jsonl")]
    return [entry for content in found if content is not None for entry in content[1].values()]


def last_counts(workspace: Path) -> dict[str, tuple[int, int]]:
    """Tensors of each level that the last pass copied and kept, by the log."""
    lines = (workspace / "logs" / "levels.log").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line)["level"] for line in lines if line.startswith('{"type":"passed"')]
    return {level["name"]: (level["copied"], level["kept"]) for level in told if level}


def test_thirty_random_kills_change_no_byte(large: Pass, tmp_path: Path) -> None:
    """Every kill takes the whole tree and is followed by the same command; whenever one gets through, the files must be
    llama-quantize's, and the next begins from nothing. One in three falls at a moment of the clock, the others shortly after
    one of the five ledgers grew: between the lines of one moment, or in the next tensors."""
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    began = time.monotonic()
    large.finish(quiet)
    seconds = time.monotonic() - began
    chooser = random.Random(6)
    workspace = tmp_path / "work" / "large"
    kills = through = continued = 0
    while kills < KILLS:
        with started(*large.arguments, cwd=tmp_path, program=each_tenth(kills)) as running:
            if chooser.random() < 1 / 3:
                end, saves = time.monotonic() + chooser.uniform(0.1, 0.9) * seconds, None
            else:
                end, saves = None, chooser.randint(1, len(LEVELS))
            seen = len(recorded(workspace))
            while running.process.poll() is None and (end is None or time.monotonic() < end):
                if saves is not None and (now := len(recorded(workspace))) > seen:
                    seen, saves = now, saves - 1
                    if saves == 0:
                        end, saves = time.monotonic() + chooser.choice((0.0, 0.01, 0.3)) * chooser.random(), None
                time.sleep(0.001)
            if not (killed := running.kill_tree()):
                done = running.finish()
        kills += killed
        continued += killed and bool(recorded(workspace))
        if not killed:
            assert done.code == 0, done.err
            large.check(workspace)
            shutil.rmtree(workspace)
            through += 1
    large.finish(tmp_path)
    assert continued > KILLS // 4  # they did not all come before anything was recorded
    print(f"{kills} kills, {continued} of them with something to continue; {through + 1} runs went through")


def test_what_was_recorded_is_not_computed_again(large: Pass, tmp_path: Path) -> None:
    workspace = tmp_path / "work" / "large"
    with started(*large.arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: recorded(workspace))
        assert running.kill_tree()
    entries = recorded(workspace)
    known = {(entry.tensor, entry.type.upper()) for entry in entries} & large.pairs
    assert 0 < len(known) < len(large.pairs)
    for half in (workspace / ".partial").glob("*/*.gguf"):
        assert half.read_bytes()[:4] == b"\0\0\0\0"  # nobody takes it for a model
    done = large.finish(tmp_path)
    (figures,) = done.document["passes"]
    assert sum(cost["pairs"] for cost in figures["types"]) == len(large.pairs) - len(known)
    assert sum(kept for _, kept in last_counts(workspace).values()) == len(entries)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_politely(name: str, large: Pass, tmp_path: Path) -> None:
    """What threads are at is finished, forced to the disk and recorded; then the command that continues is told."""
    workspace = tmp_path / "work" / "large"
    with started(*large.arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: recorded(workspace))
        children = running.descendants()
        os.kill(running.pid, getattr(signal, name))
        done = running.finish()
    assert done.code == 130
    assert not any(is_running(child.pid) for child in children)
    assert f"Error: Stopped by {name}." in done.err
    assert "what was finished is kept" in done.err
    assert "Continue with: imatrix-runner quantize " in done.err
    assert "Traceback" not in done.err
    entries = recorded(workspace)
    assert entries
    assert levels_in(workspace) == {}
    (entry,) = run_command("status", "--json", cwd=tmp_path).document["workspaces"]
    assert entry["state"] == "resumable"
    large.finish(tmp_path)
    assert sum(kept for _, kept in last_counts(workspace).values()) == len(entries)


def test_two_signals_end_it_at_once(large: Pass, tmp_path: Path) -> None:
    workspace = tmp_path / "work" / "large"
    with started(*large.arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: recorded(workspace))
        children = running.descendants()
        (worker,) = children
        worker.suspend()  # it cannot hear the first
        os.kill(running.pid, signal.SIGINT)
        time.sleep(0.5)
        os.kill(running.pid, signal.SIGINT)
        done = running.finish()
    assert done.code == 130
    wait_gone(children)
    large.finish(tmp_path)


def test_an_orphaned_worker_ends_by_itself(large: Pass, tmp_path: Path) -> None:
    """Its stdin ended: it records what it finished, so the next command finds more than the dead one knew."""
    workspace = tmp_path / "work" / "large"
    with started(*large.arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: recorded(workspace))
        orphans = running.kill_alone()
        assert orphans
        wait_gone(orphans)
    assert recorded(workspace)
    large.finish(tmp_path)


@pytest.mark.parametrize(("name", "why"), [("SIGABRT", "killed by SIGABRT"), ("SIGKILL", "killed by SIGKILL")])
def test_a_worker_that_dies_costs_an_error_and_no_work(name: str, why: str, large: Pass, tmp_path: Path) -> None:
    """As a failed assertion of llama.cpp or the kernel's OOM killer would end it."""
    workspace = tmp_path / "work" / "large"
    with started(*large.arguments, cwd=tmp_path) as running:
        running.wait_for(lambda: recorded(workspace))
        (worker,) = running.descendants()
        os.kill(worker.pid, getattr(signal, name))
        done = running.finish()
    assert done.code == 5, done.err
    assert "Error: The levels could not be made." in done.err
    assert why in done.err
    entries = recorded(workspace)
    assert entries
    large.finish(tmp_path)
    assert sum(kept for _, kept in last_counts(workspace).values()) == len(entries)
