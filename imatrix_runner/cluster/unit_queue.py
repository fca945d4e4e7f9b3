"""Which worker does which unit of work: a queue that gives lost units out again. Pure: it knows numbers, no machines."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

MOST_LOSSES = 5
"""A unit that has lost this many workers is taken to be the cause."""

MOST_FAILURES = 3
"""How often a unit is tried whose child processes fail."""

AT_ONCE = 2
"""Units that a worker has at once at most: it need not wait for the next one while a result travels."""


class UnitQueue:
    """Units in the order in which they are begun. ``ahead``: no unit is begun that many places after the first one that is not
    done (None: no bound), so that results which are used in order do not pile up. ``at_once``: units that a worker has at
    once."""

    def __init__(self, numbers: Sequence[int], *, ahead: int | None = None, at_once: int = AT_ONCE) -> None:
        self._numbers = tuple(numbers)
        self._order = {number: place for place, number in enumerate(numbers)}
        self._waiting = deque(numbers)
        self._running: dict[int, int] = {}
        self._losses: Counter[int] = Counter()
        self._done: set[int] = set()
        self._first = 0
        self._ahead = ahead
        self.at_once = at_once

    @property
    def over(self) -> bool:
        return len(self._done) == len(self._numbers)

    def running(self, worker: int) -> list[int]:
        """The units that a worker has."""
        return [number for number, who in self._running.items() if who == worker]

    def take(self, worker: int, workers: int) -> int | None:
        """The next unit for one of ``workers`` workers; None if it has enough, or if there is none that may be begun.

        A worker that has one gets another only while there is one for every worker: none is to wait in turn at one worker while
        another is idle.
        """
        has = len(self.running(worker))
        if not self._waiting or has >= self.at_once or (has and len(self._waiting) < workers):
            return None
        if self._ahead is not None and self._order[self._waiting[0]] >= self._first + self._ahead:
            return None
        number = self._waiting.popleft()
        self._running[number] = worker
        return number

    def done(self, number: int) -> bool:
        """Note that a unit is done; returns whether it was not before."""
        self._running.pop(number, None)
        fresh = number not in self._done
        self._done.add(number)
        while self._first < len(self._numbers) and self._numbers[self._first] in self._done:
            self._first += 1
        return fresh

    def put_back(self, number: int) -> None:
        """Let a unit be taken again, before all others."""
        self._running.pop(number, None)
        self._waiting.appendleft(number)

    def lost(self, number: int) -> int:
        """Put back a unit whose worker was lost while it had it; returns how many workers it has lost by now."""
        self.put_back(number)
        self._losses[number] += 1
        return self._losses[number]
