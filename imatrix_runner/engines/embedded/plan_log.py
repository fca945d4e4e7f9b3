"""llama.cpp's messages about each level, where one worker plans many levels; they hold the reason of a failure."""

from __future__ import annotations

from collections import deque

from imatrix_runner.engines.protocol import LEVEL_MARK
from imatrix_runner.process import TAIL_LINES, printable_line


class PlanLog:
    """Splits a worker's stderr at the marks between levels, and keeps the last lines about each."""

    def __init__(self) -> None:
        self._rest = ""
        self._levels: list[deque[str]] = []

    def feed(self, stream: str, text: str) -> None:
        if stream != "stderr":
            return
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.startswith(LEVEL_MARK):
                self._levels.append(deque(maxlen=TAIL_LINES))
            elif self._levels and line.strip():
                self._levels[-1].append(printable_line(line))

    @property
    def levels(self) -> int:
        """How many levels were started."""
        return len(self._levels)

    def about(self, index: int) -> tuple[str, ...]:
        """The last lines about the level at ``index`` of the plan."""
        return tuple(self._levels[index]) if index < len(self._levels) else ()
