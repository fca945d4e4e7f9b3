"""An imatrix on a real Ray cluster: the bytes of one machine, whatever is lost on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.children import eventually
from support.command_line import run_command, started
from support.ray_machines import RayMachines
from support.tiny_models import sample_text

OPTIONS = ("-c", "128", "-b", "128", "--no-ppl")


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 750 chunks: long enough to be hit on the way."""
    path = tmp_path_factory.mktemp("long") / "long.txt"
    path.write_text(sample_text(300_000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(tiny_model: Path, long_text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one machine without a cluster writes."""
    folder = tmp_path_factory.mktemp("alone")
    ran = run_command("imatrix", "generate", tiny_model, "-f", long_text, *OPTIONS, cwd=folder)
    assert ran.code == 0, ran.err
    return made(folder)


@pytest.fixture(autouse=True)
def _both_machines(machines: RayMachines) -> Iterator[None]:
    yield
    while len(machines.nodes) < 2:
        machines.add()


def made(folder: Path) -> bytes:
    return (folder / "work" / "tiny" / "imatrix.gguf").read_bytes()


def begun(folder: Path) -> bool:
    """Whether a range is done."""
    return any((folder / "work" / "tiny").rglob("checkpoint.gguf"))


def words(machines: RayMachines, model: Path, text: Path) -> tuple[str | Path, ...]:
    return ("imatrix", "generate", model, "-f", text, *OPTIONS, "--cluster", machines.address)


def test_a_lost_worker_and_a_lost_machine_change_no_byte(
    machines: RayMachines, tiny_model: Path, long_text: Path, tmp_path: Path, alone: bytes
) -> None:
    with started(*words(machines, tiny_model, long_text), cwd=tmp_path) as running:
        machines.kill_one()
        running.wait_for(lambda: begun(tmp_path))
        machines.remove(machines.nodes[0])
        ran = running.finish()
    assert ran.code == 0, ran.err
    assert made(tmp_path) == alone
    assert "A worker on " in ran.err
    assert ran.out.count("\n") == 1  # nothing of Ray's is printed


def test_a_killed_command_continues_on_the_cluster_and_alone(
    machines: RayMachines, tiny_model: Path, long_text: Path, tmp_path: Path, alone: bytes
) -> None:
    command = words(machines, tiny_model, long_text)
    with started(*command, cwd=tmp_path) as running:
        running.wait_for(lambda: begun(tmp_path))
        running.kill_tree()
    assert eventually(lambda: not machines.computing())
    with started(*command, cwd=tmp_path) as running:
        running.wait_for(machines.computing)
        os.kill(running.pid, signal.SIGINT)
        ran = running.finish()
    assert ran.code == 130, ran.err
    again = run_command(*command[:-2], cwd=tmp_path)
    assert again.code == 0, again.err
    assert made(tmp_path) == alone


def test_files_that_no_machine_sees_are_sent(
    machines: RayMachines, tiny_model: Path, long_text: Path, tmp_path: Path, alone: bytes
) -> None:
    ran = run_command(*words(machines, tiny_model, long_text), "--no-shared-fs", "-v", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert ran.err.count(f"{tiny_model.name} (") == 2
    assert "is sent there" in ran.err
    assert made(tmp_path) == alone


def test_a_machine_that_cannot_compute_is_named_and_left_out(
    machines: RayMachines, tiny_model: Path, long_text: Path, tmp_path: Path, alone: bytes
) -> None:
    node = machines.add({"LLAMA_CPP_LIB_PATH": str(tmp_path)})
    try:
        ran = run_command(*words(machines, tiny_model, long_text), cwd=tmp_path)
    finally:
        machines.remove(node)
    assert ran.code == 0, ran.err
    assert "Left out of the cluster: " in ran.err
    assert "2 workers" in ran.err
    assert made(tmp_path) == alone
