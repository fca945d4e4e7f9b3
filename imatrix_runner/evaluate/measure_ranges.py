"""Measures levels in ranges of chunks, with an engine that computes them in any order."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace

from imatrix_runner.engines.abilities import RangeMeasurer
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.files.logits import LogitsHead
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.engines.measures import MeasuredRange, RangeScores, RangesJob
from imatrix_runner.evaluate.disk_budget import DEFAULT_BYTES
from imatrix_runner.evaluate.held_out import HeldOut
from imatrix_runner.evaluate.range_scores import RangeScoresFile
from imatrix_runner.events import Finished, Sink, Started
from imatrix_runner.imatrix.chunks import range_chunks
from imatrix_runner.imatrix.plan_generation import active_params
from imatrix_runner.models.model import Model

_LEAST_RANGE = 4
"""Fewest chunks of a range."""


def ranges_of(model: Model, engine: Engine, held_out: HeldOut) -> tuple[ChunkRange, ...]:
    """The ranges of the whole text: they follow from the model and the options alone."""
    gpu = bool(engine.devices) and held_out.options.n_gpu_layers != "0"
    extent, options = held_out.extent, held_out.options
    size = measured_chunks(active_params(model), model.n_bytes, extent.n_vocab, options, gpu=gpu)
    return cut(extent.n_chunks, size)


def measured_chunks(n_params: int, n_bytes: int, n_vocab: int, options: CollectOptions, *, gpu: bool) -> int:
    """How many chunks a range should have, in whole batches.

    So that loading a model of ``n_bytes`` is a small part of computing the chunks, and a reference of a vocabulary of
    ``n_vocab`` tokens takes no more of a worker's disk than a measurement does otherwise. ``n_params`` are those active per
    token.
    """
    cheap = range_chunks(n_params, n_bytes, 0, options, gpu=gpu, least=_LEAST_RANGE)
    batch = LogitsHead(options.n_ctx, n_vocab, options.chunks_at_once).n_bytes
    return min(cheap, max(1, DEFAULT_BYTES // batch) * options.chunks_at_once)


def cut(n_chunks: int, size: int) -> tuple[ChunkRange, ...]:
    """Cut a text into ranges of ``size`` chunks; the last may be shorter."""
    return tuple(ChunkRange(first, min(size, n_chunks - first)) for first in range(0, n_chunks, size))


def missing_ranges(
    ranges: Sequence[ChunkRange], source: RangeScoresFile, subjects: Sequence[RangeScoresFile]
) -> tuple[MeasuredRange, ...]:
    """The ranges on which scores of the source or of a subject are missing, each with the places of these subjects."""
    found = (
        MeasuredRange(chunks, tuple(place for place, scores in enumerate(subjects) if scores.lacks(chunks)))
        for chunks in ranges
    )
    return tuple(each for each in found if each.subjects or source.lacks(each.chunks))


def divided(ranges: Sequence[MeasuredRange], workers: int) -> tuple[MeasuredRange, ...]:
    """Return ranges such that several workers have two each, if there are enough subjects: ranges then come several times, each
    time with other subjects.

    The source is computed for each of them, but no score depends on what is compared next to it.
    """
    if workers < 2 or not ranges:
        return tuple(ranges)
    parts = math.ceil(2 * workers / len(ranges))
    return tuple(
        replace(each, subjects=subjects)
        for each in ranges
        for subjects in _shares(each.subjects, min(parts, len(each.subjects)))
    )


def _shares(subjects: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
    """Cut a list into ``parts`` neighbouring shares whose lengths differ by at most one; one share for fewer than two."""
    parts = max(1, parts)
    marks = [len(subjects) * part // parts for part in range(parts + 1)]
    return [subjects[begin:end] for begin, end in itertools.pairwise(marks)]


def compute_ranges(
    measurer: RangeMeasurer, job: RangesJob, source: RangeScoresFile, subjects: Sequence[RangeScoresFile], sink: Sink
) -> None:
    """Compute the job's ranges, and keep the scores of the source and of each subject (in the order of the job's)."""

    def keep(found: RangeScores) -> None:
        scores = source if found.subject is None else subjects[found.subject]
        scores.take(found.chunks, found.scores, found.seconds)

    levels = "1 level" if len(subjects) == 1 else f"{len(subjects)} levels"
    count = len({each.chunks for each in job.ranges})
    ranges = "1 range" if count == 1 else f"{count} ranges"
    sink(Started(job.step, f"{levels} and their source on {ranges} of chunks", job.n_chunks, "chunks"))
    began = time.monotonic()
    measurer.measure_ranges(job, sink, keep)
    sink(Finished(job.step, "done", f"{job.n_chunks} chunks", time.monotonic() - began))
