"""Errors job: how far each tensor's numbers move when they are rounded to each wanted type."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingError, RoundingErrorsJob
from imatrix_runner.engines.files.cost_files import CostFile
from imatrix_runner.engines.protocol import Costed, Send
from imatrix_runner.engines.worker.cost.rounding import (
    Doing,
    Floats,
    Rounder,
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
    """Write the errors of every tensor that are not in the file yet, in the job's order; at a stop those that are complete."""
    with refusing("measuring rounding errors", job.out), closing(CostFile(job.out, job.fingerprint, RoundingError)) as file:
        send(Costed(_run(job, file, send)))


def _run(job: RoundingErrorsJob, file: CostFile[RoundingError], send: Send) -> bool:
    """Returns false if a stop ended it."""
    known = {record.tensor for record in file.records}
    todo = [each for each in job.tensors if each not in known]
    if not todo:
        return True
    # ggml builds its tables with OpenMP, whose threads would otherwise spin against each other on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    library, stop = load(), StdinStop()
    doing: Doing = {}
    report_aborts(library, doing, send)
    source = Source.open(library, job.sources, job)
    source.check(job.tensors)
    source.prepare(job, todo)
    groups = [tuple(group) for _, group in groupby(todo, lambda each: each.name)]

    def slabs() -> Iterator[Slab]:
        for group in groups:
            for slab in source.slabs(group):
                if stop.requested:
                    return
                yield slab

    total = sum(source.tensor(each.name).n_elements for each in job.tensors)
    done = total - sum(source.tensor(each.name).n_elements for each in todo)
    threads = max(1, job.threads or usable_cpus())
    names = [each.name for each in todo]
    with open_rounders(source, names, threads, doing, job.buffer_bytes) as rounders:
        sums, reported = np.zeros(0), 0.0
        for slab, added in rounders.map(_measure, slabs()):
            sums = added if slab.rows.start == 0 else sums + added
            done += slab.n_elements * len(slab.parts)
            if slab.rows.stop == slab.tensor.rows:
                file.append(_records([part.wanted for part in slab.parts], sums))
            if (now := time.monotonic()) - reported >= _PROGRESS_SECONDS:
                reported = now
                send(Progress(job.step, done, total, slab.name))
    return {record.tensor for record in file.records}.issuperset(job.tensors)


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
