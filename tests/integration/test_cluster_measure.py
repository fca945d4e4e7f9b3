"""Measurements and mixes on a Ray cluster of two workers, one of which is killed: the figures and bytes of one machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from imatrix_runner.evaluate import measure, measure_ranges
from support.command_line import run_command
from support.evaluations import Place, make_levels
from support.in_process import CommandLine
from support.llama_tools import digest
from support.ray_machines import RayMachines

MOST = 14
MIX = ("-c", "64", "--types", "q3_k,q4_k,q6_k", "--like", "Q4_K_M", "--engine", "embedded")


@pytest.fixture(scope="module")
def made(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_levels(tmp_path_factory.mktemp("made"), tiny_model, tiny_text)


@contextmanager
def killed_worker(machines: RayMachines, job: str) -> Iterator[list[int]]:
    """Kill the first worker of the cluster that has a child with such a job; yields the ids of those killed."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and not killed:
            for worker in machines.computing():
                try:
                    if any(job in " ".join(child.cmdline()) for child in worker.children()):
                        worker.kill()
                        killed.append(worker.pid)
                        return
                except psutil.Error:
                    continue
            time.sleep(0.02)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield killed
    finally:
        over.set()
        watching.join()


def scored(place: Place) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.workspace.evaluation.iterdir()}


def test_a_measurement_is_that_of_one_machine(
    machines: RayMachines, made: Place, cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual, spread = made.copy(tmp_path / "usual"), made.copy(tmp_path / "spread")
    assert usual.evaluate(cli, chunks=MOST).code == 0
    monkeypatch.setattr(measure, "ranges_of", lambda _model, _engine, held_out: measure_ranges.cut(held_out.extent.n_chunks, 4))
    with killed_worker(machines, '"MeasureJob"') as killed:
        done = spread.evaluate(cli, "--cluster", machines.address, chunks=MOST)
    assert done.code == 0, done.err
    assert len(killed) == 1
    assert scored(spread) == scored(usual)
    assert spread.facts() == usual.facts()


def costs(work: Path) -> dict[str, str]:
    """The digests of measured costs, the cost map, recipes and levels."""
    (root,) = work.iterdir()
    files = (*root.glob(".mixes/*"), *root.glob("*.recipe.json"), root / "mix.json", *root.glob("*.gguf"))
    return {path.relative_to(root).as_posix(): digest(path) for path in files}


def test_a_mix_is_that_of_one_machine(
    machines: RayMachines, tiny_model: Path, tiny_imatrix: Path, tiny_text: Path, cli: CommandLine, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text.read_text(encoding="utf-8")[:2600], encoding="utf-8")
    arguments = ("run", tiny_model, "--imatrix", tiny_imatrix, "-f", text, *MIX)
    usual = run_command(*arguments, "--work-dir", tmp_path / "usual", cwd=tmp_path)
    assert usual.code == 0, usual.err
    with killed_worker(machines, '"TrialsJob"') as killed:
        done = cli(*arguments, "--cluster", machines.address, "--work-dir", tmp_path / "spread")
    assert done.code == 0, done.err
    assert len(killed) == 1
    assert costs(tmp_path / "spread") == costs(tmp_path / "usual")
