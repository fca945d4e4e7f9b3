"""Trials of roundings on many workers: a unit is one trial, in a model that each worker has loaded once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.cluster.node_worker import Node
from imatrix_runner.cluster.ordered_child import OnUnit, OrderedChild
from imatrix_runner.cluster.shared_files import SharedFile
from imatrix_runner.engines.cost_jobs import TrialResult, TrialsJob
from imatrix_runner.events import Event, Progress
from imatrix_runner.process import Orders


@dataclass(frozen=True)
class TrialsTask:
    """``job`` as the driver would do it, and the files that it names: of the model, its text, the imatrix, covariances."""

    job: TrialsJob
    files: tuple[SharedFile, ...]
    text: SharedFile
    imatrix: SharedFile | None
    covariances: tuple[SharedFile, ...]

    def open(self, node: Node) -> TryingWorker:
        job = replace(
            self.job,
            model=node.locals(self.files)[0],
            text=node.local(self.text),
            imatrix=node.local(self.imatrix) if self.imatrix is not None else None,
            covariances=node.locals(self.covariances)[0].parent if self.covariances else None,
        )
        return TryingWorker(job, node)


class TryingWorker:
    """A child process with the loaded model, which gets one trial after another."""

    def __init__(self, job: TrialsJob, node: Node) -> None:
        folder = node.scratch / "trials"
        options = replace(job.options, threads=job.options.threads or node.threads)
        self._job = replace(job, out=folder / "trials", options=options, log=node.scratch / "log", ordered=True)
        self._folder, self._node = folder, node
        self._finished = 0
        self._child: OrderedChild[TrialResult] = OrderedChild(self._serve)

    def run(self, number: int) -> TrialResult:
        """The result of one trial."""
        return self._child.run(number)

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def _serve(self, orders: Orders, on_unit: OnUnit[TrialResult]) -> None:
        def on_trial(place: int, result: TrialResult) -> None:
            self._finished += 1
            on_unit(place, result)

        self._folder.mkdir(parents=True, exist_ok=True)
        self._node.engine.ordered_trials(self._job, self._relay, orders, on_trial)

    def _relay(self, event: Event) -> None:
        """Note how many batches of the trial in work are done: the child counts those of all, and of the model as it is."""
        if isinstance(event, Progress) and (current := self._child.current) is not None:
            done = event.done - batches_of(self._job) * (1 + self._finished)
            self._node.note(current, max(0, done))


def batches_of(job: TrialsJob) -> int:
    """Batches of a trial that goes to its last chunk."""
    return math.ceil(len(job.chunks) / job.options.chunks_at_once)


def covariance_files(folder: Path | None) -> tuple[Path, ...]:
    """The files in a folder of covariances, in order of their names; none without a folder."""
    return tuple(sorted(path for path in folder.iterdir() if path.is_file())) if folder is not None else ()
