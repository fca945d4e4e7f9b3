"""Measuring levels on many workers: a unit is a range of chunks, on which a worker computes the source's log-probabilities and
compares every level with them. Only token scores return."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.cluster.node_worker import Node
from imatrix_runner.cluster.shared_files import SharedFile
from imatrix_runner.cluster.worker_rates import worker_name
from imatrix_runner.engines.embedded.measure_range import measure_range
from imatrix_runner.engines.measures import RangeScores, RangesJob
from imatrix_runner.errors import InterruptedRunError, RunnerError, from_os_error
from imatrix_runner.events import Event, Progress


@dataclass(frozen=True)
class MeasuredUnit:
    """The scores of one range and the worker; not those of all subjects (``whole`` false) if a request to stop came."""

    scores: tuple[RangeScores, ...]
    whole: bool
    worker: str


@dataclass(frozen=True)
class MeasureTask:
    """``job`` as the driver would do it, and the files that it names: of the source, its text, of each subject."""

    job: RangesJob
    source: tuple[SharedFile, ...]
    text: SharedFile
    subjects: tuple[tuple[SharedFile, ...], ...]

    def open(self, node: Node) -> MeasuringWorker:
        log = node.scratch / "log"
        subjects = tuple(
            replace(subject, file=node.locals(files)[0], log=log)
            for subject, files in zip(self.job.subjects, self.subjects, strict=True)
        )
        options = replace(self.job.options, threads=self.job.options.threads or node.threads)
        model, text = node.locals(self.source)[0], node.local(self.text)
        return MeasuringWorker(replace(self.job, model=model, text=text, subjects=subjects, options=options, log=log), node)


class MeasuringWorker:
    """Measures ranges, one at a time, in a folder of its own."""

    def __init__(self, job: RangesJob, node: Node) -> None:
        self._job, self._node = job, node
        self._folder: Path = node.scratch / "measure"
        self._turn = threading.Lock()
        self._closed = False
        self._failed: dict[int, int] = {}

    def run(self, number: int) -> MeasuredUnit:
        """The scores of one range. A second call waits until the first is done."""
        with self._turn:
            self._check()
            return self._measure(number)

    def close(self) -> None:
        """End the range in work at its next batch."""
        self._closed = True
        with self._turn:
            pass

    def _measure(self, number: int) -> MeasuredUnit:
        first = self._job.ranges[number].chunks.first
        # The first error in the order of the text counts: later ranges need not be tried.
        leave_out = [place for place, failed in self._failed.items() if failed < first]
        found: list[RangeScores] = []

        def relay(event: Event) -> None:
            self._check()  # raised in the middle of a job, this ends its child
            if isinstance(event, Progress):
                self._node.note(number, event.done)

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for scores in measure_range(self._node.engine, self._job, number, self._folder, relay, leave_out):
                found.append(scores)
                if scores.subject is not None and isinstance(scores.scores, RunnerError):
                    self._failed[scores.subject] = min(first, self._failed.get(scores.subject, first))
        except InterruptedRunError:
            if not found:
                raise
            return MeasuredUnit(tuple(found), whole=False, worker=worker_name())
        except OSError as error:
            raise from_os_error(error, "measuring on a worker of the cluster", self._folder) from error
        return MeasuredUnit(tuple(found), whole=True, worker=worker_name())

    def _check(self) -> None:
        self._node.stop.check()
        if self._closed:
            raise InterruptedRunError("The worker was closed", "its task is over", "Run the command again.")
