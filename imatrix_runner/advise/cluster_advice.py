"""What an imatrix takes on a cluster: ranges, memory of each worker, bytes over the network, time, and where more workers stop
to help. Pure: the time of a chunk was measured on this machine, the shape of the cluster was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from imatrix_runner.advise.cluster_forecast import (
    ClusterForecast,
    ClusterShape,
    WorkPhase,
    WorkUnit,
    forecast_cluster,
    stops_scaling,
)
from imatrix_runner.advise.memory import context_memory
from imatrix_runner.advise.timing_probe import Timing
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.imatrix.chunks import ChunkPlan, saving_seconds
from imatrix_runner.imatrix.plan_generation import matrix_bytes
from imatrix_runner.models.model import Model

NETWORK_BYTES_PER_SECOND, LOCAL_BYTES_PER_SECOND = 1.25e9, 2e9
"""Assumed: a network of 10 Gbit/s, and one machine's memory as Ray uses it."""

START_SECONDS = 15.0
"""Assumed: until Ray is connected and each worker has proven its machine. The first time on a machine takes longer."""

_F64 = 2
"""Sums travel in float64, and take twice the bytes of a matrix."""


@dataclass(frozen=True)
class ClusterRoom:
    """Workers of a cluster: ``threads`` of each. ``local``: they are processes of this machine."""

    threads: tuple[int, ...]
    local: bool


@dataclass(frozen=True)
class ClusterAdvice:
    """An imatrix on a cluster. ``threads``: of each worker, on average; ``range_chunks``: chunks of a full range; ``memory``:
    bytes that each worker takes (None: not known); ``sums_bytes``: of all ranges' sums, which go to the driver;
    ``model_bytes``: sent to each worker that does not find the model. ``forecasts``: with one worker, with those that there
    are, and with as many as bring something (``stops``); none where nothing was timed."""

    workers: int
    threads: float
    n_ranges: int
    range_chunks: int
    memory: int | None
    sums_bytes: int
    model_bytes: int
    bytes_per_second: float
    forecasts: tuple[ClusterForecast, ...] = ()
    stops: int | None = None


def advise_cluster(
    model: Model, plan: ChunkPlan, options: CollectOptions, room: ClusterRoom, timing: Timing | None, threads: int
) -> ClusterAdvice:
    """Forecast a text's ``plan``. ``timing`` was measured with ``threads`` threads of this machine; workers are taken to be as
    fast per thread."""
    sums = _F64 * matrix_bytes(model)
    held = context_memory(model, max(options.n_ctx, options.n_batch)).n_bytes
    memory = None if held is None else model.n_bytes + held + sums
    ranges = plan.ranges[: plan.n_asked]
    rate = LOCAL_BYTES_PER_SECOND if room.local else NETWORK_BYTES_PER_SECOND
    each_threads = sum(room.threads) / len(room.threads)
    found = ClusterAdvice(
        len(room.threads),
        each_threads,
        len(ranges),
        max(each.count for each in ranges),
        memory,
        sums * len(ranges),
        model.n_bytes,
        rate,
    )
    if timing is None:
        return found
    speed = each_threads / threads
    saving = saving_seconds(matrix_bytes(model))
    units = tuple(WorkUnit(each.count * timing.seconds_per_chunk / speed, sums, saving) for each in ranges)
    phases = [WorkPhase("imatrix", units, timing.load_seconds)]
    shape = ClusterShape(1, rate, START_SECONDS)
    stops = stops_scaling(phases, shape)
    forecasts = _forecasts(phases, shape, (1, len(room.threads), stops))
    return replace(found, forecasts=forecasts, stops=stops)


def _forecasts(phases: Sequence[WorkPhase], shape: ClusterShape, workers: Sequence[int]) -> tuple[ClusterForecast, ...]:
    return tuple(forecast_cluster(phases, replace(shape, workers=count)) for count in sorted({*workers}))
