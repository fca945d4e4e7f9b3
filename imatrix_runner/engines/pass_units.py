"""Cuts what a pass has to compute into units for several workers. Pure: where the cuts are changes no byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from imatrix_runner.engines.pass_parts import PassWork, WantedPair

LEAST_COST = 500_000_000
"""A unit of this cost takes a thread about half a second: orders and replies hardly count."""

_PER_WORKER = 16
"""Units of each worker at least, where that does not make them too small: the last one to end makes the others wait for a
sixteenth of the time at most."""

_READ = 2
_NANOSECONDS = {
    "q8_0": 4,
    "q2_0": 4,
    "q4_0": 6,
    "q6_k": 6,
    "q5_0": 7,
    "q3_k": 8,
    "q1_0": 8,
    "tq1_0": 3,
    "tq2_0": 3,
    "f32": 1,
    "f16": 2,
    "iq2_s": 40,
    "iq2_xxs": 47,
    "iq2_xs": 52,
    "iq3_s": 58,
    "iq3_xxs": 75,
    "iq1_m": 144,
    "iq1_s": 156,
}
_OTHERS = 15
"""What reading and widening an element takes, and quantising it to each type, as measured with the native kernels on one
processor. Only the ratios matter."""


def pair_cost(work: PassWork, pair: WantedPair) -> int:
    """Return the cost of quantising a tensor to one type, in nanoseconds of a thread."""
    return work.elements * _NANOSECONDS.get(pair.type.lower(), _OTHERS)


def work_cost(work: PassWork) -> int:
    """Return the cost of a tensor with all its types, reading included."""
    return work.elements * _READ + sum(pair_cost(work, pair) for pair in work.pairs)


def cut_units(works: Sequence[PassWork], n_workers: int, *, least: int = LEAST_COST) -> tuple[tuple[PassWork, ...], ...]:
    """Return units for ``n_workers`` workers, the costliest first.

    A tensor that is larger than a unit is divided by its types; it is then read several times. Smaller ones are put together.
    ``least``: the cost that a unit should have at least.
    """
    total = sum(map(work_cost, works))
    size = max(least, total // max(1, n_workers * _PER_WORKER))
    pieces = [piece for work in works for piece in _divided(work, size)]
    pieces.sort(key=work_cost, reverse=True)  # stable: equal ones stay in the order of the model's file
    units: list[tuple[int, list[PassWork]]] = []
    for piece in pieces:
        cost = work_cost(piece)
        if units and units[-1][0] + cost <= size:
            units[-1] = (units[-1][0] + cost, [*units[-1][1], piece])
        else:
            units.append((cost, [piece]))
    return tuple(tuple(unit) for _, unit in sorted(units, key=lambda unit: -unit[0]))


def _divided(work: PassWork, size: int) -> list[PassWork]:
    """The work in pieces of at most ``size``, if that is possible."""
    if work_cost(work) <= size:
        return [work]
    groups: list[tuple[int, list[WantedPair]]] = []
    for pair in work.pairs:
        cost = pair_cost(work, pair)
        if groups and work.elements * _READ + groups[-1][0] + cost <= size:
            groups[-1] = (groups[-1][0] + cost, [*groups[-1][1], pair])
        else:
            groups.append((cost, [pair]))
    return [replace(work, pairs=tuple(pairs)) for _, pairs in groups]
