"""Errors job: how far each tensor's numbers move when they are rounded to each wanted type."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingError, RoundingErrorsJob, tensor_groups
from imatrix_runner.engines.files.cost_files import CostFile
from imatrix_runner.engines.protocol import Costed, ErrorsMeasured, Send
from imatrix_runner.engines.worker.cost.rounding import (
    Doing,
    Floats,
    Rounder,
    Rounders,
    Slab,
    Source,
    open_rounders,
    refusing,
    report_aborts,
)
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.llama_context import usable_cpus
from imatrix_runner.engines.worker.quantize.rounding.row_rounder import expert_rows
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.events import Progress

Sums = npt.NDArray[np.float64]

_PROGRESS_SECONDS = 0.2


def rounding_errors(job: RoundingErrorsJob, send: Send) -> None:
    """Write the errors of every tensor that are not in the file yet, in the job's order; at a stop those that are complete.

    Of an ordered job send the errors, and write none.
    """
    if job.ordered:
        with refusing("measuring rounding errors", job.out), _open(job, job.tensors, send) as work:
            send(Costed(work.serve()))
        return
    with refusing("measuring rounding errors", job.out), closing(CostFile(job.out, job.fingerprint, RoundingError)) as file:
        known = {record.tensor for record in file.records}
        todo = [each for each in job.tensors if each not in known]
        if todo:
            with _open(job, todo, send) as work:
                work.run(todo, file)
        send(Costed({record.tensor for record in file.records}.issuperset(job.tensors)))


@contextmanager
def _open(job: RoundingErrorsJob, todo: Sequence[RoundedTensor], send: Send) -> Iterator[_Errors]:
    """Prepare to round ``todo``."""
    # ggml builds its tables with OpenMP, whose threads would otherwise spin against each other on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    library, stop = load(), StdinStop()
    doing: Doing = {}
    report_aborts(library, doing, send)
    source = Source.open(library, job.sources, job)
    source.check(job.tensors)
    source.prepare(job, todo)
    threads = max(1, job.threads or usable_cpus())
    with open_rounders(source, [each.name for each in todo], threads, doing, job.buffer_bytes) as rounders:
        yield _Errors(job, source, rounders, stop, send)


@dataclass
class _Errors:
    job: RoundingErrorsJob
    source: Source
    rounders: Rounders
    stop: StdinStop
    send: Send
    reported: float = 0.0

    def run(self, todo: Sequence[RoundedTensor], file: CostFile[RoundingError]) -> None:
        """Write the errors of ``todo``, up to a stop."""
        total = self._n_elements(self.job.tensors)
        done = total - self._n_elements(todo)
        for records in self._measured(tensor_groups(todo), done, total):
            file.append(records)

    def serve(self) -> bool:
        """Send the errors of the groups that the parent orders, until it ends; returns false if that ended one of them."""
        groups = tensor_groups(self.job.tensors)
        for place in self.stop.units(range(len(groups)), ordered=True):
            records = [*self._measured(groups[place : place + 1], 0, self._n_elements(groups[place]))]
            if not records:
                return False
            self.send(ErrorsMeasured(place, tuple(records[0])))
        return True

    def _measured(self, groups: Sequence[Sequence[RoundedTensor]], done: int, total: int) -> Iterator[list[RoundingError]]:
        """Yield the errors of each group, up to a stop. Progress goes from ``done`` to ``total`` elements."""
        sums = np.zeros(0)
        for slab, added in self.rounders.map(_measure, self._slabs(groups)):
            sums = added if slab.rows.start == 0 else sums + added
            done += slab.n_elements * len(slab.parts)
            if slab.rows.stop == slab.tensor.rows:
                yield _records([part.wanted for part in slab.parts], sums)
            if (now := time.monotonic()) - self.reported >= _PROGRESS_SECONDS:
                self.reported = now
                self.send(Progress(self.job.step, done, total, slab.name))

    def _slabs(self, groups: Sequence[Sequence[RoundedTensor]]) -> Iterator[Slab]:
        for group in groups:
            for slab in self.source.slabs(group):
                if self.stop.requested:
                    return
                yield slab

    def _n_elements(self, tensors: Sequence[RoundedTensor]) -> int:
        """Elements to round, counted once for each type."""
        return sum(self.source.tensor(each.name).n_elements for each in tensors)


def _measure(rounder: Rounder, slab: Slab) -> Sums:
    """float64 [1 + 2 * n_parts]: the slab's norm, and each part's weighted and squared error."""
    rounder.read(slab)
    numbers = rounder.widen(slab)
    sums = np.empty(1 + 2 * len(slab.parts))
    sums[0] = _weighted_squares(numbers, slab)[0]
    for index, part in enumerate(slab.parts):
        rounded = rounder.round(slab, part)
        sums[1 + 2 * index : 3 + 2 * index] = _weighted_squares(np.subtract(numbers, rounded, out=rounded), slab)
    return sums


def _weighted_squares(numbers: Floats, slab: Slab) -> tuple[float, float]:
    """Sums of importance * x^2 and of x^2 over ``numbers`` [rows, n_per_row] of a slab."""
    weighted = squared = 0.0
    for expert, rows in expert_rows(slab.tensor, slab.rows):
        first = rows.start - slab.rows.start
        columns = np.square(numbers[first : first + len(rows)], dtype=np.float64).sum(axis=0)
        some = float(columns.sum())
        squared += some
        if slab.importance is None:
            weighted += some
        else:
            n = len(columns)
            weighted += float((columns * slab.importance[expert * n : (expert + 1) * n]).sum())
    return weighted, squared


def _records(wanted: Sequence[RoundedTensor], sums: Sums) -> list[RoundingError]:
    norm, *errors = sums.tolist()
    pairs = zip(errors[::2], errors[1::2], strict=True)
    return [RoundingError(tensor, weighted, squared, norm) for tensor, (weighted, squared) in zip(wanted, pairs, strict=True)]
