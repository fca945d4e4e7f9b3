"""A range measurer in this process: the embedded engine computes one range after another, in an order by chance."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from imatrix_runner.engines.abilities import OnScores
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.embedded.measure_range import measure_range
from imatrix_runner.engines.measures import RangeScores, RangesJob
from imatrix_runner.errors import InterruptedRunError
from imatrix_runner.events import Sink


@dataclass
class ShuffledRanges:
    """Interrupts the job before it hands over more than ``most`` scores. ``handed``: all scores that it has handed over."""

    folder: Path
    seed: int
    most: int = 1 << 30
    handed: list[RangeScores] = field(default_factory=list)
    engine: EmbeddedEngine | None = None
    at_once: int = 1

    def measure_ranges(self, job: RangesJob, sink: Sink, on_scores: OnScores) -> None:
        assert self.engine is not None
        self.folder.mkdir(exist_ok=True)
        numbers = list(range(len(job.ranges)))
        random.Random(self.seed).shuffle(numbers)
        for number in numbers:
            for scores in measure_range(self.engine, job, number, self.folder, sink):
                if len(self.handed) >= self.most:
                    raise InterruptedRunError("Interrupted", "as wanted", "")
                self.handed.append(scores)
                on_scores(scores)
        assert not list(self.folder.iterdir())
