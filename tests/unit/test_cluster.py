"""What decides on a cluster, without one: addresses, units, machines, files."""

from __future__ import annotations

import pickle
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.cluster.cluster_options import ClusterOptions, checked_address
from imatrix_runner.cluster.node_facts import NodeFacts, unlike, why_left_out
from imatrix_runner.cluster.node_worker import Problem
from imatrix_runner.cluster.shared_files import BLOCK, SharedFile
from imatrix_runner.cluster.unit_queue import AT_ONCE, UnitQueue
from imatrix_runner.cluster.worker_rates import WorkerRates
from imatrix_runner.errors import NoSpaceError, UsageError
from support.command_line import run_command

HERE = NodeFacts("here", "0.1.0", "3.11.7", "library 1", "library 1, numpy 2", "AVX2 = 1", 1 << 34, ())


@pytest.mark.parametrize(
    ("address", "endpoint", "workers"),
    [
        ("auto", None, None),
        ("local:3", None, 3),
        ("ray://head:10001", ("head", 10001), None),
        ("ray://head", ("head", 10001), None),
        ("10.0.0.1:6379", ("10.0.0.1", 6379), None),
    ],
)
def test_addresses(address: str, endpoint: tuple[str, int] | None, workers: int | None) -> None:
    options = ClusterOptions(checked_address(address))
    assert (options.endpoint, options.local_workers) == (endpoint, workers)


@pytest.mark.parametrize(
    "address", ["", "local:0", "local:", "local:x", "head", "http://head:1", "ray://", "ray://a b:1", "local:99999"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="Invalid --cluster"):
        checked_address(address)


@given(
    st.integers(0, 12),
    st.integers(1, 4),
    st.none() | st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60),
)
def test_every_unit_is_done_once_whatever_is_lost(
    count: int, workers: int, ahead: int | None, turns: list[tuple[int, bool]]
) -> None:
    queue, done = UnitQueue(range(count), ahead=ahead), list[int]()

    def turn(worker: int, lost: bool) -> None:
        while (number := queue.take(worker, workers)) is not None:
            assert ahead is None or number < min(set(range(count)) - set(done)) + ahead
        assert len(queue.running(worker)) <= AT_ONCE
        for number in queue.running(worker)[:1]:
            if lost:
                queue.lost(number)
            elif queue.done(number):
                done.append(number)

    for worker, lost in turns:
        turn(worker % workers, lost)
    while not queue.over:
        for worker in range(workers):
            turn(worker, lost=False)
    assert sorted(done) == list(range(count))


def test_losses_are_counted_by_unit() -> None:
    queue = UnitQueue((5, 3))
    assert (queue.take(0, 1), queue.take(0, 1), queue.take(0, 1)) == (5, 3, None)
    assert [queue.lost(5), queue.lost(3)] == [1, 1]
    assert queue.take(1, 1) == 3
    assert queue.lost(3) == 2
    assert queue.done(3)
    assert not queue.done(3)  # a worker that was thought lost answers


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (HERE, ""),
        (replace(HERE, host="there", features="AVX512 = 1", memory=1), ""),
        (replace(HERE, program="0.2.0"), "imatrix-runner there is 0.2.0, here 0.1.0"),
        (replace(HERE, identity="library 2"), "the library there is library 2, here library 1"),
        (replace(HERE, arithmetic="library 1, numpy 3"), "the arithmetic there is library 1, numpy 3, here library 1, numpy 2"),
        (replace(HERE, trouble="it crashes"), "it crashes"),
    ],
)
def test_machines_that_would_compute_something_else(other: NodeFacts, why: str) -> None:
    assert why_left_out(other, HERE) == why


def test_unlike_processors_are_noticed() -> None:
    assert unlike([HERE, HERE]) == ()
    assert unlike([HERE, replace(HERE, features="AVX512 = 1"), HERE]) == ("AVX2 = 1", "AVX512 = 1")


@pytest.mark.parametrize("size", [0, 1, 5000, 300_000])
def test_a_file_is_known_by_its_content(size: int, tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(bytes(range(256)) * (size // 256) + bytes(size % 256))
    file = SharedFile.of(path)
    other.write_bytes(path.read_bytes())
    assert file.is_at(other)
    assert b"".join(block for _, block in file.blocks()) == path.read_bytes()
    assert [place for place, _ in file.blocks()] == [*range(0, max(size, 1), BLOCK)]
    other.write_bytes(bytes(each ^ 1 for each in path.read_bytes()))
    assert file.is_at(other) == (size == 0)
    other.write_bytes(path.read_bytes() + b"x")
    assert not file.is_at(other)
    assert not file.is_at(tmp_path / "missing")


def test_an_error_travels_with_its_machine() -> None:
    problem = pickle.loads(pickle.dumps(Problem.of(NoSpaceError("What", "why", "Do."))))
    assert (problem.exit_code, problem.what, problem.why, problem.todo) == (8, "What", "why", "Do.")
    assert problem.host == socket.gethostname()


def test_a_cluster_that_is_not_there(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        ran = run_command("imatrix", "generate", tiny_model, "--cluster", address, cwd=tmp_path)
        assert ran.code == 3
        assert f"The Ray cluster at {address} cannot be reached" in ran.err
        assert "ray start --head" in ran.err


def test_programs_cannot_be_spread(tiny_model: Path, tmp_path: Path) -> None:
    ran = run_command("imatrix", "generate", tiny_model, "--cluster", "local:1", "--engine", "binaries", cwd=tmp_path)
    assert ran.code == 2
    assert "--cluster needs the embedded engine" in ran.err


def test_rates_of_few_workers_are_named_and_of_many_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("imatrix_runner.cluster.worker_rates.time.monotonic", lambda: now)
    rates = WorkerRates("chunks")
    now = 10.0
    assert str(rates) == ""
    rates.add("box2 7", 20)
    rates.add("box1 8", 5)
    rates.add("box1 8", 5)
    assert str(rates) == "box1 1 chunks/s, box2 2 chunks/s"
    for number in range(4):
        rates.add(f"box3 {number}", 30)
    assert str(rates) == "6 workers, 1 to 3 chunks/s each"
