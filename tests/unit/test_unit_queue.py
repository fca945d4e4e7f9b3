"""Which worker gets which unit: all have work while there is some, and lost units come first."""

from __future__ import annotations

from imatrix_runner.cluster.in_order import InOrder
from imatrix_runner.cluster.unit_queue import UnitQueue


def given(queue: UnitQueue, workers: int) -> dict[int, list[int]]:
    """Let every worker take in turn, as often as it may hold units."""
    for worker in [*range(workers)] * queue.at_once:
        queue.take(worker, workers)
    return {worker: queue.running(worker) for worker in range(workers)}


def test_no_worker_waits_for_two_while_another_is_idle() -> None:
    assert given(UnitQueue(range(2)), 2) == {0: [0], 1: [1]}
    assert given(UnitQueue(range(3)), 2) == {0: [0], 1: [1]}
    assert given(UnitQueue(range(9)), 2) == {0: [0, 2], 1: [1, 3]}
    assert given(UnitQueue(range(9), at_once=1), 2) == {0: [0], 1: [1]}
    alone = UnitQueue(range(2))
    assert given(alone, 1) == {0: [0, 1]}
    assert alone.take(0, 1) is None


def test_a_lost_unit_is_given_next_and_counted() -> None:
    queue = UnitQueue(range(4))
    given(queue, 2)
    assert queue.lost(0) == 1
    assert queue.take(1, 1) == 0
    assert queue.lost(0) == 2
    assert queue.done(1)
    assert not queue.done(1)
    for number in (0, 2, 3):
        assert not queue.over
        queue.done(number)
    assert queue.over


def test_units_are_not_begun_too_far_ahead() -> None:
    queue = UnitQueue(range(9), ahead=3, at_once=9)
    assert [queue.take(0, 1) for _ in range(4)] == [0, 1, 2, None]
    queue.done(1)
    assert queue.take(0, 1) is None
    queue.done(0)
    assert [queue.take(0, 1) for _ in range(3)] == [3, 4, None]


def test_results_are_handed_on_in_order() -> None:
    results: InOrder[str] = InOrder([2, 5, 3])
    assert results.add(5, "b") == []
    assert results.done == 1
    assert results.add(2, "a") == ["a", "b"]
    assert results.add(3, "c") == ["c"]
    assert results.done == 3
