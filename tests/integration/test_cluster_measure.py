"""Measurements and mixes on a Ray cluster of two workers, one of which is killed: the figures and bytes of one machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
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
def watching(act: Callable[[], bool]) -> Iterator[list[bool]]:
    """Call ``act`` again and again until it returns true, which is then in the list."""
    done: list[bool] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and not done:
            if act():
                done.append(True)
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def kill_worker(machines: RayMachines, job: str) -> bool:
    """Kill a worker of the cluster that has a child with such a job; returns whether there was one."""
    for worker in machines.computing():
        try:
            if any(job in " ".join(child.cmdline()) for child in worker.children()):
                worker.kill()
                return True
        except psutil.Error:
            continue
    return False


def interrupt(place: Place) -> bool:
    """Interrupt this process, as Ctrl-C does, once scores of a level have arrived."""
    arrived = any(path.stat().st_size > 1000 for path in place.workspace.evaluation.glob("[!s]*.scored"))
    if arrived:
        os.kill(os.getpid(), signal.SIGINT)
    return arrived


def scored(place: Place) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.workspace.evaluation.iterdir()}


def test_an_interrupted_measurement_is_that_of_one_machine(
    machines: RayMachines, made: Place, cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual, spread = made.copy(tmp_path / "usual"), made.copy(tmp_path / "spread")
    assert usual.evaluate(cli, chunks=MOST).code == 0
    monkeypatch.setattr(measure, "ranges_of", lambda _model, _engine, held_out: measure_ranges.cut(held_out.extent.n_chunks, 4))
    with watching(lambda: interrupt(spread)):
        stopped = spread.evaluate(cli, "--cluster", machines.address, chunks=MOST)
    assert stopped.code == 130, stopped.err
    assert scored(spread) != scored(usual)
    with watching(lambda: kill_worker(machines, '"MeasureJob"')) as killed:
        done = spread.evaluate(cli, "--cluster", machines.address, chunks=MOST)
    assert done.code == 0, done.err
    assert killed == [True]
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
    with watching(lambda: kill_worker(machines, '"TrialsJob"')) as killed:
        done = cli(*arguments, "--cluster", machines.address, "--work-dir", tmp_path / "spread")
    assert done.code == 0, done.err
    assert killed == [True]
    assert costs(tmp_path / "spread") == costs(tmp_path / "usual")
