"""Places the names of a plot's points so that none covers another or a point; Vega-Lite places each independently."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

Align = Literal["left", "center", "right"]

_GAP: Final = 9
_POINT: Final = 6
_HEIGHT: Final = 15
_CHARACTER: Final = 7.4
"""Width in pixels of a character at 12 pixels, for capitals and digits, of which levels' names consist."""
_BOLD: Final = 8.7
"""The same in bold at 13 pixels, in which recommended levels are named."""


@dataclass(frozen=True)
class Spot:
    """A point in pixels, y downwards. ``must``: its name is written even without room nearby, unless it is wider than the
    plot."""

    x: float
    y: float
    text: str
    must: bool = False

    @property
    def length(self) -> float:
        """Width of its name; an upper bound if it must be written, because it may be in bold."""
        return len(self.text) * (_BOLD if self.must else _CHARACTER)


@dataclass(frozen=True)
class Label:
    """The place of a name: ``dx`` and ``dy`` in pixels from its point to the text's vertical middle. ``shown``: it has room."""

    dx: float
    dy: float
    align: Align
    shown: bool


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom

    def within(self, width: float, height: float) -> bool:
        return self.left >= 0 and self.right <= width and self.top >= 0 and self.bottom <= height


# First the places away from the front, which falls from left to right.
_PLACES: Final[tuple[tuple[float, float, Align], ...]] = (
    (_GAP, -8, "left"),
    (_GAP, 0, "left"),
    (0, -14, "center"),
    (-_GAP, 8, "right"),
    (-_GAP, 0, "right"),
    (0, 15, "center"),
    (_GAP, 9, "left"),
    (-_GAP, -8, "right"),
)


_FARTHER: Final[tuple[tuple[float, float, Align], ...]] = (
    *((_GAP, dy, "left") for dy in (-24.0, 24.0, -40.0, 40.0)),
    *((-_GAP, dy, "right") for dy in (24.0, -24.0, 40.0, -40.0)),
    *((0.0, dy, "center") for dy in (-30.0, 30.0, -46.0, 46.0)),
)
"""Further places for a name that must be written."""


def place(
    spots: Sequence[Spot],
    width: float,
    height: float,
    *,
    avoid: Sequence[tuple[float, float]] = (),
    line: Sequence[tuple[float, float]] = (),
) -> list[Label]:
    """A label for every spot of a plot of this size; those that must be shown are placed first.

    ``avoid``: more points; ``line``: the corners of a line that no label should cross.
    """
    taken = [_around(spot.x, spot.y) for spot in spots] + [_around(x, y) for x, y in avoid]
    taken += [_around(x, y, 2) for one, other in pairwise(line) for x, y in _between(one, other)]
    labels: list[_Box] = []
    found: dict[int, Label] = {}
    for at in sorted(range(len(spots)), key=lambda at: not spots[at].must):
        spot = spots[at]
        own = taken[at]
        inside = [
            (choice, box)
            for choice in (_PLACES + _FARTHER if spot.must else _PLACES)
            for box in [_box(spot, *choice)]
            if box.within(width, height)
        ]
        free = next((each for each in inside if not any(each[1].meets(other) for other in taken if other is not own)), None)
        if free is None and spot.must:  # over a point or the line rather than over another name
            free = next((each for each in inside if not any(each[1].meets(other) for other in labels)), None)
        if free is None:
            found[at] = Label(*_PLACES[0], shown=spot.must and spot.length <= width)
        else:
            found[at] = Label(*free[0], shown=True)
            taken.append(free[1])
            labels.append(free[1])
    return [found[at] for at in range(len(spots))]


def _around(x: float, y: float, radius: float = _POINT) -> _Box:
    return _Box(x - radius, y - radius, x + radius, y + radius)


def _between(one: tuple[float, float], other: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """Points between two others, at most 8 pixels apart, without the ends."""
    steps = max(1, math.ceil(math.dist(one, other) / 8))
    for step in range(1, steps):
        share = step / steps
        yield one[0] + share * (other[0] - one[0]), one[1] + share * (other[1] - one[1])


def _box(spot: Spot, dx: float, dy: float, align: Align) -> _Box:
    left = spot.x + dx - {"left": 0.0, "center": spot.length / 2, "right": spot.length}[align]
    return _Box(left, spot.y + dy - _HEIGHT / 2, left + spot.length, spot.y + dy + _HEIGHT / 2)
