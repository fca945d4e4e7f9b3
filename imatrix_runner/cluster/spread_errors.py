"""Errors of rounding on many workers: a unit is one tensor of the source, with all types that it is rounded to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from imatrix_runner.cluster.node_worker import Node
from imatrix_runner.cluster.ordered_child import OnUnit, OrderedChild
from imatrix_runner.cluster.shared_files import SharedFile
from imatrix_runner.engines.cost_jobs import RoundingError, RoundingErrorsJob
from imatrix_runner.events import Event, Progress
from imatrix_runner.process import Orders

GroupErrors = tuple[RoundingError, ...]


@dataclass(frozen=True)
class ErrorsTask:
    """``job`` as the driver would do it, and the files that it names: of the model, the imatrix, covariances."""

    job: RoundingErrorsJob
    files: tuple[SharedFile, ...]
    imatrix: SharedFile | None
    covariances: tuple[SharedFile, ...]

    def open(self, node: Node) -> RoundingWorker:
        job = replace(
            self.job,
            sources=tuple(node.locals(self.files)),
            imatrix=node.local(self.imatrix) if self.imatrix is not None else None,
            covariances=node.locals(self.covariances)[0].parent if self.covariances else None,
        )
        return RoundingWorker(job, node)


class RoundingWorker:
    """A child process that gets one group of tensors after another."""

    def __init__(self, job: RoundingErrorsJob, node: Node) -> None:
        threads = job.threads or node.threads
        self._job = replace(job, out=node.scratch / "errors", threads=threads, log=node.scratch / "log", ordered=True)
        self._node = node
        self._child: OrderedChild[GroupErrors] = OrderedChild(self._serve)

    def run(self, number: int) -> GroupErrors:
        """The errors of one group."""
        return self._child.run(number)

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def _serve(self, orders: Orders, on_unit: OnUnit[GroupErrors]) -> None:
        self._node.engine.ordered_errors(self._job, self._relay, orders, on_unit)

    def _relay(self, event: Event) -> None:
        if isinstance(event, Progress) and (current := self._child.current) is not None:
            self._node.note(current, event.done)
