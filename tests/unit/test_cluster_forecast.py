"""The model of a cluster: bounds that hold for any costs, and what holds the work back where that is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.advise.cluster_advice import START_SECONDS, ClusterRoom, advise_cluster
from imatrix_runner.advise.cluster_forecast import (
    ClusterShape,
    WorkPhase,
    WorkUnit,
    forecast_cluster,
    phase_seconds,
    stops_scaling,
    work_seconds,
)
from imatrix_runner.advise.timing_probe import Timing
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.imatrix.chunks import ChunkPlan
from imatrix_runner.imatrix.plan_generation import matrix_bytes
from imatrix_runner.models.model import open_gguf

COSTS = st.floats(0, 1000, allow_nan=False)


@st.composite
def phases(draw: st.DrawFn) -> WorkPhase:
    units = draw(st.lists(st.builds(WorkUnit, COSTS, COSTS, COSTS), min_size=1, max_size=12))
    return WorkPhase("any", tuple(units), draw(COSTS), draw(COSTS))


@given(phases(), st.integers(1, 20))
def test_no_number_of_workers_beats_any_of_the_bounds(phase: WorkPhase, workers: int) -> None:
    """Not the work divided by the workers, not the link, not the driver, not the longest unit; and never slower than all costs
    one after another."""
    seconds = phase_seconds(phase, ClusterShape(workers, 1.0))
    near = pytest.approx(seconds, rel=1e-9)
    moved, driver = sum(unit.n_bytes for unit in phase.units), sum(unit.driver_seconds for unit in phase.units)
    begins = phase.load_seconds + phase.sent_bytes
    for least in (phase.work / workers + phase.load_seconds, moved, driver, begins + max(unit.seconds for unit in phase.units)):
        assert least < seconds or least == near
    at_most = phase.work + moved + driver + phase.load_seconds + phase.sent_bytes * min(workers, len(phase.units))
    assert at_most > seconds or at_most == near


def test_one_worker_takes_the_sum_of_its_costs() -> None:
    phase = WorkPhase("p", tuple(WorkUnit(seconds) for seconds in (3.0, 5.0, 7.0)), load_seconds=2.0, sent_bytes=10.0)
    assert phase_seconds(phase, ClusterShape(1, 5.0)) == 2 + 2 + 15
    # The driver takes a result in while the next unit is computed; only the last one is waited for.
    slow = WorkPhase("p", (WorkUnit(3.0, 5.0, 1.0),) * 3)
    assert phase_seconds(slow, ClusterShape(1, 5.0)) == 9 + 1 + 1
    assert work_seconds([phase, slow], ClusterShape(1, 5.0, start_seconds=4.0)) == 4 + 19 + 11


def test_a_slow_driver_holds_workers_back() -> None:
    """Two units at a time: the third begins when the first result was taken in."""
    phase = WorkPhase("p", (WorkUnit(1.0, 0.0, 10.0),) * 4)
    assert phase_seconds(phase, ClusterShape(1, 1.0)) == 1 + 4 * 10


@pytest.mark.parametrize(
    ("phase", "workers", "bound"),
    [
        (WorkPhase("many units", (WorkUnit(1.0),) * 1000), 8, "workers"),
        (WorkPhase("wide results", (WorkUnit(1.0, 10.0),) * 1000), 64, "network"),
        (WorkPhase("a model that travels", (WorkUnit(1.0),) * 64, sent_bytes=50.0), 64, "network"),
        (WorkPhase("sums to add", (WorkUnit(1.0, 0.0, 1.0),) * 1000), 64, "driver"),
        (WorkPhase("a large model", (WorkUnit(1.0),) * 64, load_seconds=100.0), 64, "loading"),
        (WorkPhase("one unit", (WorkUnit(100.0),)), 64, "units"),
        (WorkPhase("one large unit", (WorkUnit(100.0), *(WorkUnit(1.0),) * 10)), 8, "units"),
    ],
    ids=lambda value: value.name if isinstance(value, WorkPhase) else "",
)
def test_the_bottleneck_is_named(phase: WorkPhase, workers: int, bound: str) -> None:
    assert forecast_cluster([phase], ClusterShape(workers, 1.0)).bound == bound


def test_where_it_stops_scaling() -> None:
    """A hundred units of 10 s and a driver that takes a second for each: ten workers keep it busy."""
    phase = WorkPhase("p", (WorkUnit(10.0, 0.0, 1.0),) * 100)
    assert stops_scaling([phase], ClusterShape(1, 1.0)) == 16
    found = forecast_cluster([phase], ClusterShape(64, 1.0))
    assert found.seconds == 110
    assert found.bound == "driver"
    assert found.efficiency == pytest.approx(1000 / (64 * 110))


def test_an_imatrix_is_forecast_from_a_probe(tiny_model: Path) -> None:
    """Workers of two threads, measured with one: twice as fast. What is sent follows from the ranges alone."""
    model = open_gguf(tiny_model, allow_requantize=False)
    ranges = tuple(ChunkRange(first, 10) for first in range(0, 60, 10))
    plan, options = ChunkPlan(ranges, 6, (), 60 * 512), CollectOptions()
    room = ClusterRoom((2, 2, 2), local=False)
    found = advise_cluster(model, plan, options, room, Timing(4.0, 2.0, 3.0), threads=1)
    assert (found.workers, found.n_ranges, found.range_chunks) == (3, 6, 10)
    assert found.sums_bytes == 6 * 2 * matrix_bytes(model)
    assert found.memory is not None
    assert found.memory > model.n_bytes
    by_workers = {each.workers: each for each in found.forecasts}
    assert by_workers[1].seconds == pytest.approx(START_SECONDS + 3 + 60, abs=0.1)
    assert by_workers[3].seconds == pytest.approx(START_SECONDS + 3 + 20, abs=0.1)
    assert {each.moved_bytes for each in found.forecasts} == {found.sums_bytes}
    assert found.stops in by_workers
    assert advise_cluster(model, plan, options, room, None, threads=1).forecasts == ()
