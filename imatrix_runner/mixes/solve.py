"""The best type for each tensor under a budget: the multiple-choice knapsack problem, solved exactly. Pure.

Each :class:`Item` gets one :class:`Choice`; bytes and costs add up. ``within`` minimises the cost for a size, ``reaching`` the
size for a cost. Both are one problem, the least ``value`` under a bound on the ``load``, with the two sums exchanged:

1. Choices that another one beats in both sums are removed. The linear relaxation, in which an item may mix two choices, is
   solved by taking steps along the lower convex hulls, best ratio first. Its value is a bound on all solutions, its whole part
   a solution.
2. A choice whose reduced cost is larger than the distance of that bound to the best known solution is in no better solution.
   Usually some items keep two or three choices and all others one (D. Pisinger, "A minimal algorithm for the multiple-choice
   knapsack problem", 1995).
3. Dynamic programming over what is left, with one state for each pair of sums that no other state beats. A state is dropped
   when its bound (its sums, and the relaxation of the remaining items in the remaining room) is above the best known solution.

Steps 2 and 3 run first with few states, which finds a good solution, then with as many as it takes. If that is more than
``max_states``, those with the lowest bounds are kept; the solution is then not proven to be the best, and ``gap`` is a bound on
what is missing. A table over all sizes, the textbook's way, has millions of states where hundreds suffice here.

Sums are integers, so that their order does not matter: bytes, and costs in units of a power of two, about 2^-52 of the largest
sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import human_bytes

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

MAX_STATES = 1 << 13
"""States of one item at most: more than ten times as many as models of 0.5 to 70 B parameters need."""
_FEW_STATES = 256
_COST_BITS = 52
_LEAST_EXPONENT = -1000  # of the unit of costs; 2^-1074 is the least power of two
_TOLERANCE = 2.0**-44
"""Rounding errors of float64 bounds, as a share of the largest sum: more than they are, so that no best solution is dropped."""


@dataclass(frozen=True)
class Choice:
    """A type that an item may get: what all its tensors then take in the file, and what the rounding costs (nats)."""

    type: str
    n_bytes: int
    cost: float


@dataclass(frozen=True)
class Item:
    """Tensors that share one type (fused tensors, experts of one kernel); mostly one alone."""

    names: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Solution:
    """``picks``: the place of each item's choice. ``exact``: no solution is better; else ``gap`` is the share of the minimised
    sum (the cost for ``within``, the bytes for ``reaching``) by which the best solution can be lower at most."""

    picks: tuple[int, ...]
    n_bytes: int
    cost: float
    exact: bool
    gap: float = 0.0


def _unbeaten(load: I64, value: I64) -> I64:
    """The pairs for which no other one is as low in both sums, by rising load; of equal pairs the first."""
    order = np.lexsort((value, load))
    falling = value[order]
    lowest = np.minimum.accumulate(falling)
    return order[np.concatenate(([True], falling[1:] < lowest[:-1]))]


def _sums(steps: I64) -> I64:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(steps)))


@dataclass(frozen=True)
class _Points:
    """The choices of an item that no other one beats: ``load`` strictly rising, ``value`` strictly falling; ``place``: where
    each stands among the item's choices."""

    load: I64
    value: I64
    place: I64

    def only(self, kept: npt.NDArray[np.bool_]) -> _Points:
        return _Points(self.load[kept], self.value[kept], self.place[kept])

    def exchanged(self) -> _Points:
        """With loads and values in each other's role."""
        return _Points(self.value[::-1], self.load[::-1], self.place[::-1])

    def hull(self) -> list[int]:
        """Which points are corners of the lower convex hull."""
        load, value = self.load.tolist(), self.value.tolist()
        corners: list[int] = []
        for new in range(len(load)):
            while len(corners) > 1:
                first, last = corners[-2:]
                # The last corner lies on or above the line from the one before it to the new point.
                fall = (value[first] - value[last]) * (load[new] - load[first])
                if fall > (value[first] - value[new]) * (load[last] - load[first]):
                    break
                corners.pop()
            corners.append(new)
        return corners


@dataclass(frozen=True)
class _Relaxation:
    """Fall of the value by room: piecewise linear through the corners (``room``, ``fall``), then constant."""

    room: I64
    fall: I64
    slope: F64

    def at(self, room: I64) -> F64:
        last = np.searchsorted(self.room, room, side="right") - 1
        whole = self.fall[last].astype(np.float64)
        return whole + self.slope[last] * (room - self.room[last])


@dataclass(frozen=True)
class _Steps:
    """All steps from one corner of a hull to the next, best ratio of ``fall`` (value) to ``rise`` (load) first. ``item`` and
    ``corner``: the point that a step leads to."""

    rise: I64
    fall: I64
    item: I64
    corner: I64

    @classmethod
    def of(cls, items: Sequence[_Points]) -> _Steps:
        rows: list[tuple[int, int, int, int]] = []
        for number, item in enumerate(items):
            corners = item.hull()
            for one, other in pairwise(corners):
                rise, fall = item.load[other] - item.load[one], item.value[one] - item.value[other]
                rows.append((int(rise), int(fall), number, other))
        rise, fall, owner, corner = np.array(rows, np.int64).reshape(-1, 4).T
        # Within an item ratios fall, and equal ones keep their order: a step never comes before the one that it starts from.
        order = np.argsort(-(fall / rise), kind="stable")
        return cls(rise[order], fall[order], owner[order], corner[order])

    def relaxation(self, items: npt.NDArray[np.bool_]) -> _Relaxation:
        """The best that some of the items can still bring, by the room for them."""
        mine = items[self.item]
        rise, fall = self.rise[mine], self.fall[mine]
        return _Relaxation(_sums(rise), _sums(fall), np.append(fall / rise, 0.0))


@dataclass(frozen=True)
class _Found:
    """A solution: which point of each item, the sum of its values, and a lower bound of every solution's."""

    points: tuple[int, ...]
    value: int
    bound: float


@dataclass(frozen=True)
class _Stage:
    """How the states of one item's stage came about: from which state before, by which point."""

    parent: npt.NDArray[np.int32]
    point: npt.NDArray[np.uint8]


def _least(items: Sequence[_Points], cap: int, max_states: int) -> _Found:
    """The least sum of values whose loads are at most ``cap``, of those the one with the least loads."""
    largest = sum(int(item.value[0]) for item in items)
    slack = 1 + largest * _TOLERANCE
    best = _whole_part(items, cap)
    for states in (min(_FEW_STATES, max_states), max_states):
        kept = _promising(items, cap, best.value + slack)
        found = _search([item.only(mask) for item, mask in zip(items, kept, strict=True)], cap, best.value + slack, states)
        if found is not None:
            chosen = zip(kept, found.points, strict=True)
            points = tuple(int(np.flatnonzero(mask)[point]) for mask, point in chosen)
            if found.value <= best.value:
                best = _Found(points, found.value, best.bound)
            best = _Found(best.points, best.value, max(best.bound, min(found.bound, best.value)))
        if best.bound >= best.value:
            break
    return best


def _whole_part(items: Sequence[_Points], cap: int) -> _Found:
    """The steps of the relaxation that fit, in order; an item stays where a step of it does not fit."""
    steps = _Steps.of(items)
    at = [0] * len(items)
    room = cap - sum(int(item.load[0]) for item in items)
    value = sum(int(item.value[0]) for item in items)
    bound = value - float(steps.relaxation(np.ones(len(items), bool)).at(np.array([room]))[0])
    blocked: set[int] = set()
    rows = zip(steps.rise.tolist(), steps.fall.tolist(), steps.item.tolist(), steps.corner.tolist(), strict=True)
    for rise, fall, item, corner in rows:
        if item in blocked or rise > room:
            blocked.add(item)
            continue
        room, value, at[item] = room - rise, value - fall, corner
    return _Found(tuple(at), value, bound)


def _promising(items: Sequence[_Points], cap: int, limit: float) -> list[npt.NDArray[np.bool_]]:
    """Which points of each item can be in a solution whose value is at most ``limit``."""
    steps = _Steps.of(items)
    room = cap - sum(int(item.load[0]) for item in items)
    relaxed = steps.relaxation(np.ones(len(items), bool))
    price = float(relaxed.slope[np.searchsorted(relaxed.room, room, side="right") - 1])
    reduced = [item.value + price * (item.load - item.load[0]) for item in items]
    least = [float(each.min()) for each in reduced]
    bound = math.fsum(least) - price * room
    return [each - low + bound <= limit for each, low in zip(reduced, least, strict=True)]


def _search(items: Sequence[_Points], cap: int, limit: float, max_states: int) -> _Found | None:
    """Dynamic programming over items with more than one point, those with the widest choice of loads first; None if no
    solution has a value of at most ``limit``."""
    spans = [int(item.load[-1] - item.load[0]) for item in items]
    order = sorted((number for number, span in enumerate(spans) if span), key=lambda number: (-spans[number], number))
    steps = _Steps.of(items)
    left = np.ones(len(items), bool)
    load = np.array([sum(int(item.load[0]) for item in items)], np.int64)
    value = np.array([sum(int(item.value[0]) for item in items)], np.int64)
    stages: list[_Stage] = []
    dropped = math.inf
    for number in order:
        item = items[number]
        left[number] = False
        load = (load[:, None] + (item.load - item.load[0])).ravel()
        value = (value[:, None] + (item.value - item.value[0])).ravel()
        alive = np.flatnonzero(load <= cap)
        bound = value[alive] - steps.relaxation(left).at(cap - load[alive])
        alive, bound = alive[bound <= limit], bound[bound <= limit]
        if not len(alive):
            return None
        unbeaten = _unbeaten(load[alive], value[alive])
        alive, bound = alive[unbeaten], bound[unbeaten]
        if len(alive) > max_states:
            by_bound = np.argsort(bound, kind="stable")
            dropped = min(dropped, float(bound[by_bound[max_states]]))
            alive = alive[np.sort(by_bound[:max_states])]
        parent, point = np.divmod(alive, len(item.load))
        stages.append(_Stage(parent.astype(np.int32), point.astype(np.uint8)))
        load, value = load[alive], value[alive]
    state = int(np.lexsort((load, value))[0])
    found = int(value[state])
    at = [0] * len(items)
    for number, stage in zip(reversed(order), reversed(stages), strict=True):
        at[number] = int(stage.point[state])
        state = int(stage.parent[state])
    return _Found(tuple(at), found, min(dropped, float(found)))


@dataclass(frozen=True)
class Solver:
    """Items, prepared for any number of budgets. ``fixed_bytes``: what the file holds besides (its header, tensors without a
    choice), so that all sizes are those of the file."""

    items: tuple[Item, ...]
    fixed_bytes: int
    max_states: int
    _points: tuple[_Points, ...]
    _unit: float

    @classmethod
    def of(cls, items: Sequence[Item], fixed_bytes: int = 0, max_states: int = MAX_STATES) -> Solver:
        """Raises ValueError for an item without choices and for a cost that is negative or not finite."""
        for item in items:
            if not item.choices or any(not 0 <= choice.cost < math.inf for choice in item.choices):
                raise ValueError(f"{', '.join(item.names)}: needs choices with costs that are finite and not negative")
        largest = math.fsum(max(choice.cost for choice in item.choices) for item in items)
        unit = 2.0 ** max(math.frexp(largest)[1] - _COST_BITS, _LEAST_EXPONENT)
        return cls(tuple(items), fixed_bytes, max_states, tuple(_points(item, unit) for item in items), unit)

    def within(self, budget_bytes: int) -> Solution:
        """The least cost in a file of at most ``budget_bytes``; of equal ones the smallest file. Raises
        :class:`InvalidDataError` for a budget outside :meth:`range`."""
        least, most = self.range()
        if not least <= budget_bytes <= most:
            smaller = budget_bytes < least
            raise InvalidDataError(
                f"No mix of this model {'fits into' if smaller else 'is as large as'} {human_bytes(budget_bytes)}",
                f"its files are between {human_bytes(least)} ({least:,} bytes) and {human_bytes(most)} ({most:,} bytes)",
                "Choose a size in that range, or allow smaller types." if smaller else "Choose a size in that range.",
            )
        found = _least(self._points, budget_bytes - self.fixed_bytes, self.max_states)
        return self._solution(self._points, found)

    def reaching(self, cost: float) -> Solution:
        """The smallest file with at most this cost; of equal ones the one with the least cost. Raises
        :class:`InvalidDataError` if every file costs more."""
        least, most = (sum(int(item.value[end]) for item in self._points) * self._unit for end in (-1, 0))
        if not cost >= least:
            raise InvalidDataError(
                f"No mix of this model has a KLD of {cost:.4g}",
                f"with its largest types it has {least:.4g}, with its smallest {most:.4g}",
                "Choose a KLD in that range, or allow larger types.",
            )
        exchanged = [item.exchanged() for item in self._points]
        found = _least(exchanged, math.floor(min(cost / self._unit, 2.0**62)), self.max_states)
        return self._solution(exchanged, found)

    def range(self) -> tuple[int, int]:
        """The sizes of the smallest and of the largest file, with the smallest and the largest type of every item."""
        sizes = [[choice.n_bytes for choice in item.choices] for item in self.items]
        return self.fixed_bytes + sum(map(min, sizes)), self.fixed_bytes + sum(map(max, sizes))

    def _solution(self, points: Sequence[_Points], found: _Found) -> Solution:
        picks = tuple(int(item.place[point]) for item, point in zip(points, found.points, strict=True))
        chosen = [item.choices[pick] for item, pick in zip(self.items, picks, strict=True)]
        n_bytes = self.fixed_bytes + sum(choice.n_bytes for choice in chosen)
        cost = sum(_units(choice.cost, self._unit) for choice in chosen) * self._unit
        exact = found.bound >= found.value
        return Solution(picks, n_bytes, cost, exact, 0.0 if exact else 1 - max(0.0, found.bound) / found.value)


def _units(cost: float, unit: float) -> int:
    return round(cost / unit)


def _points(item: Item, unit: float) -> _Points:
    n_bytes = np.array([choice.n_bytes for choice in item.choices], np.int64)
    costs = np.array([_units(choice.cost, unit) for choice in item.choices], np.int64)
    place = _unbeaten(n_bytes, costs)
    return _Points(n_bytes[place], costs[place], place)
