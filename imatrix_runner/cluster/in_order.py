"""Results that come in any order, handed on in that of their units. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")


class InOrder(Generic[ResultT]):
    """``numbers``: of the units, in the order in which their results are wanted."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._following = deque(numbers)
        self._waiting: dict[int, ResultT] = {}
        self._n_units = len(numbers)

    def add(self, number: int, result: ResultT) -> list[ResultT]:
        """Take a result; returns those that come next, often none."""
        self._waiting[number] = result
        ready = []
        while self._following and self._following[0] in self._waiting:
            ready.append(self._waiting.pop(self._following.popleft()))
        return ready

    @property
    def done(self) -> int:
        """How many results were taken."""
        return self._n_units - len(self._following) + len(self._waiting)
