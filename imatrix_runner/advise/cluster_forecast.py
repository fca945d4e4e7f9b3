"""How long work takes on a cluster, what bounds it, and from how many workers on more of them bring little.

A small discrete-event model of what :mod:`imatrix_runner.cluster` does. Pure: everything follows from unit costs that were
measured elsewhere. Each worker loads the model once in a phase and takes unit after unit. Results go through one link to the
driver, which takes them in one after another. A worker has at most two units whose results were not taken in, so a slow driver
holds workers back instead of filling memory. Phases follow one another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Bound = Literal["workers", "network", "driver", "loading", "units"]
"""What holds the work back: too few workers; the link to the driver; the driver, which takes results in; the start of Ray and
the loading of the model by each worker; or too few units for the workers."""

BOUNDS: tuple[Bound, ...] = ("workers", "network", "driver", "loading", "units")

MOST_WORKERS = 4096

LEAST_GAIN = 0.1
"""Twice as many workers must save this share of the time, or the work has stopped scaling."""


@dataclass(frozen=True)
class WorkUnit:
    """A unit of work: ``seconds`` on one worker, bytes of its result, and ``driver_seconds`` to take that in."""

    seconds: float
    n_bytes: float = 0.0
    driver_seconds: float = 0.0


@dataclass(frozen=True)
class WorkPhase:
    """Units that may be computed in any order, in this order. Before its first unit each worker is sent ``sent_bytes`` (of a
    model that is not on a shared disk) and takes ``load_seconds`` to load it."""

    name: str
    units: tuple[WorkUnit, ...]
    load_seconds: float = 0.0
    sent_bytes: float = 0.0

    @property
    def work(self) -> float:
        """Worker seconds of all units."""
        return sum(unit.seconds for unit in self.units)

    def moved(self, workers: int) -> float:
        """Bytes that go over the network with this many workers."""
        return sum(unit.n_bytes for unit in self.units) + self.sent_bytes * min(workers, len(self.units))


Phases: TypeAlias = Sequence[WorkPhase]


@dataclass(frozen=True)
class ClusterShape:
    """A cluster of equal workers. ``bytes_per_second``: of the link that all results and models go through, in each direction;
    ``start_seconds``: until all workers are there."""

    workers: int
    bytes_per_second: float
    start_seconds: float = 0.0


@dataclass(frozen=True)
class ClusterForecast:
    """``seconds`` of each phase, by name; ``start_seconds`` come before. ``bound``: what, made twice as good, would save most;
    ``saved``: the share that this would save."""

    workers: int
    phases: dict[str, float]
    start_seconds: float
    work_seconds: float
    moved_bytes: float
    bound: Bound
    saved: float

    @property
    def seconds(self) -> float:
        return self.start_seconds + sum(self.phases.values())

    @property
    def efficiency(self) -> float:
        """The share of the workers' time in which they compute units."""
        return self.work_seconds / (self.seconds * self.workers) if self.seconds else 1.0


def phase_seconds(phase: WorkPhase, shape: ClusterShape) -> float:
    """Seconds from the start of a phase until the driver has all results."""
    waiting = iter(phase.units)
    link_out = link_in = driver = 0.0
    taken = dict.fromkeys(range(shape.workers), 0.0)
    events: list[tuple[float, int, WorkUnit | None]] = []
    for worker in range(min(shape.workers, len(phase.units))):
        link_out += phase.sent_bytes / shape.bytes_per_second
        heapq.heappush(events, (link_out + phase.load_seconds, worker, None))
    while events:
        now, worker, done = heapq.heappop(events)
        if done is None:  # the worker begins its next unit
            if (unit := next(waiting, None)) is not None:
                # Two events of a worker never wait at the same time, so that units are never compared.
                heapq.heappush(events, (now + unit.seconds, worker, unit))
            continue
        link_in = max(link_in, now) + done.n_bytes / shape.bytes_per_second
        driver = max(driver, link_in) + done.driver_seconds
        heapq.heappush(events, (max(now, taken[worker]), worker, None))
        taken[worker] = driver
    return driver


def work_seconds(phases: Phases, shape: ClusterShape) -> float:
    """Seconds of all phases, one after another."""
    return shape.start_seconds + sum(phase_seconds(phase, shape) for phase in phases)


def forecast_cluster(phases: Phases, shape: ClusterShape) -> ClusterForecast:
    """Forecast all phases on a cluster."""
    each = {phase.name: phase_seconds(phase, shape) for phase in phases}
    total = shape.start_seconds + sum(each.values())
    gains = {bound: total - work_seconds(*_twice_as_good(bound, phases, shape)) for bound in BOUNDS}
    bound = max(BOUNDS, key=lambda name: gains[name])
    work, moved = sum(phase.work for phase in phases), sum(phase.moved(shape.workers) for phase in phases)
    return ClusterForecast(
        shape.workers, each, shape.start_seconds, work, moved, bound, max(0.0, gains[bound]) / total if total else 0.0
    )


def stops_scaling(phases: Phases, shape: ClusterShape) -> int:
    """The least power of two of workers that twice as many would not make faster by :data:`LEAST_GAIN`; at most
    :data:`MOST_WORKERS`."""
    workers, now = 1, work_seconds(phases, replace(shape, workers=1))
    while workers < MOST_WORKERS:
        then = work_seconds(phases, replace(shape, workers=2 * workers))
        if then > now * (1 - LEAST_GAIN):
            break
        workers, now = 2 * workers, then
    return workers


def _twice_as_good(bound: Bound, phases: Phases, shape: ClusterShape) -> tuple[Phases, ClusterShape]:
    """The same work where one thing is twice as good."""
    if bound == "workers":
        return phases, replace(shape, workers=2 * shape.workers)
    if bound == "network":
        return phases, replace(shape, bytes_per_second=2 * shape.bytes_per_second)
    if bound == "driver":
        faster = [tuple(replace(unit, driver_seconds=unit.driver_seconds / 2) for unit in phase.units) for phase in phases]
        return [replace(phase, units=units) for phase, units in zip(phases, faster, strict=True)], shape
    if bound == "loading":
        shape = replace(shape, start_seconds=shape.start_seconds / 2)
        return [replace(phase, load_seconds=phase.load_seconds / 2) for phase in phases], shape
    halves = [tuple(_half(unit) for unit in phase.units for _ in range(2)) for phase in phases]
    return [replace(phase, units=units) for phase, units in zip(phases, halves, strict=True)], shape


def _half(unit: WorkUnit) -> WorkUnit:
    return WorkUnit(unit.seconds / 2, unit.n_bytes / 2, unit.driver_seconds / 2)
