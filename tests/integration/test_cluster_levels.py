"""Levels on a real Ray cluster: the bytes of one machine, with and without a shared folder, whatever is lost on the way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.children import eventually
from support.command_line import run_command, started
from support.llama_tools import leftovers, levels_in
from support.passes import write_imatrix
from support.ray_machines import RayMachines
from support.tiny_models import write_llama_gguf

LEVELS = "Q4_K_M,Q4_K_S,Q6_K,IQ3_XXS,Q8_0"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """The command that makes the levels of a model of 15 million weights."""
    folder = tmp_path_factory.mktemp("model")
    model = write_llama_gguf(folder / "m-BF16.gguf", hidden=512, layers=4, ff=1024, vocab=4096)
    imatrix = write_imatrix(folder / "imatrix.gguf", model)
    return ("quantize", model, "--imatrix", imatrix, "--levels", LEVELS, "-t", "1", "--engine", "embedded")


@pytest.fixture(scope="module")
def alone(words: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of what one machine without a cluster writes."""
    folder = tmp_path_factory.mktemp("alone")
    ran = run_command(*words, cwd=folder)
    assert ran.code == 0, ran.err
    return levels_in(folder / "work" / "m")


@pytest.fixture(autouse=True)
def _both_machines(machines: RayMachines) -> Iterator[None]:
    yield
    while len(machines.nodes) < 2:
        machines.add()


def check(folder: Path, alone: dict[str, str]) -> None:
    assert levels_in(folder / "work" / "m") == alone
    assert leftovers(folder / "work" / "m") == []


def recorded(folder: Path) -> bool:
    """Whether a worker, or the driver for one, has recorded something."""
    return any(path.read_bytes().count(b"\n") > 1 for path in folder.glob("work/m/.partial/*/ledger-*.jsonl"))


def last_passed(folder: Path) -> list[dict[str, Any]]:
    """What the driver's own worker reported of each level at the end, by the log."""
    log = (folder / "work" / "m" / "logs" / "levels.log").read_text(encoding="utf-8")
    told = [json.loads(line)["level"] for line in log.splitlines() if line.startswith('{"type":"passed"')]
    return [level for level in told if level][-len(LEVELS.split(",")) :]


@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "none"])
def test_levels_are_those_of_one_machine(
    shared: bool, machines: RayMachines, words: tuple[str | Path, ...], alone: dict[str, str], tmp_path: Path
) -> None:
    """Also the figures: the tensors that workers quantised count as computed."""
    options = () if shared else ("--no-shared-fs", "-v")
    ran = run_command(*words, "--cluster", machines.address, *options, "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    check(tmp_path, alone)
    assert ran.err.count("m-BF16.gguf (") == (0 if shared else 2)  # sent once to each machine
    (figures,) = json.loads(ran.out)["passes"]
    assert {cost["type"] for cost in figures["types"]} >= {"q4_K", "q6_K", "iq3_xxs", "q8_0"}
    assert sum(figures["shares"].values()) == pytest.approx(1.0, abs=1e-3)
    assert {level["computed"] for level in last_passed(tmp_path)} == {0}  # nothing was left to the driver


def test_a_lost_worker_changes_no_byte(
    machines: RayMachines, words: tuple[str | Path, ...], alone: dict[str, str], tmp_path: Path
) -> None:
    with started(*words, "--cluster", machines.address, cwd=tmp_path) as running:
        machines.kill_one()
        ran = running.finish()
    assert ran.code == 0, ran.err
    assert "A worker on " in ran.err
    check(tmp_path, alone)


def test_a_stopped_and_killed_command_continues_alone(
    machines: RayMachines, words: tuple[str | Path, ...], alone: dict[str, str], tmp_path: Path
) -> None:
    with started(*words, "--cluster", machines.address, "--no-shared-fs", cwd=tmp_path) as running:
        running.wait_for(machines.computing)
        os.kill(running.pid, signal.SIGINT)
        ran = running.finish()
    assert ran.code == 130, ran.err
    with started(*words, "--cluster", machines.address, cwd=tmp_path) as running:
        running.wait_for(lambda: recorded(tmp_path))
        running.kill_tree()
    assert eventually(lambda: not machines.computing())
    ran = run_command(*words, cwd=tmp_path)
    assert ran.code == 0, ran.err
    check(tmp_path, alone)
    assert sum(level["kept"] for level in last_passed(tmp_path)) > 0
