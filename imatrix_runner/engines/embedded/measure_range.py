"""Measures one range of chunks in a folder of its own: the source's log-probabilities, then every level against them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import Path

from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.files.logits import LogitsHead, note_path, read_head
from imatrix_runner.engines.files.plausible import no_language_model, no_reference
from imatrix_runner.engines.files.token_scores import read_token_scores
from imatrix_runner.engines.jobs import ChunkRange
from imatrix_runner.engines.measures import MeasureJob, RangeScores, RangesJob, ReferenceJob
from imatrix_runner.errors import EngineError, InterruptedRunError, InvalidDataError, NoSpaceError, RunnerError
from imatrix_runner.events import Event, Progress, Sink

_SOURCE = "source"


def measure_range(
    engine: Engine, job: RangesJob, number: int, folder: Path, sink: Sink, leave_out: Collection[int] = ()
) -> Iterator[RangeScores]:
    """Yield the scores of the source, then those of each subject, on the range with this number in ``job.ranges``.

    ``folder`` holds the reference meanwhile; nothing is left in it. ``leave_out``: places of subjects that are not compared.
    Progress counts chunks of the range, those of the source included. Raises the errors of the source, and of the folder.
    """
    wanted = job.ranges[number]
    chunks, base = wanted.chunks, folder / "range.logits"
    subjects = [place for place in wanted.subjects if place not in leave_out]
    progress = _RangeProgress(job.step, chunks, chunks.count * (1 + len(subjects)), sink)
    try:
        began = time.monotonic()
        own = folder / "range.scored"
        engine.make_reference(
            ReferenceJob(
                job.step,
                job.model,
                job.text,
                chunks,
                base,
                job.options,
                _SOURCE,
                job.log,
                (own, _SOURCE),
                alone=True,
                order=wanted.order,
            ),
            progress,
        )
        head = read_head(base)
        if why := no_language_model(base, head):
            raise InvalidDataError(*no_reference(job.model.name, why))
        yield RangeScores(chunks, None, _take_scores(own, _SOURCE, head), time.monotonic() - began)
        for place in subjects:
            progress.begun += chunks.count
            began = time.monotonic()
            yield RangeScores(chunks, place, _scores_of(engine, job, place, chunks, base, progress), time.monotonic() - began)
    finally:
        for path in (base, note_path(base), folder / "range.scored"):
            path.unlink(missing_ok=True)


class _RangeProgress:
    """Passes the progress of one job after another on as that of the whole range. ``begun``: chunks before the current job."""

    def __init__(self, step: str, chunks: ChunkRange, total: int, sink: Sink) -> None:
        self._step, self._chunks, self._total, self._sink = step, chunks, total, sink
        self.begun = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            done = event.done if event.step == self._step else event.done - self._chunks.first
            self._sink(Progress(self._step, self.begun + done, self._total))


def _scores_of(engine: Engine, job: RangesJob, place: int, chunks: ChunkRange, base: Path, sink: Sink) -> bytes | RunnerError:
    """The scores of one subject, or its error. A child that died is started once more: perhaps it was killed."""
    subject, out = job.subjects[place], base.with_suffix(".scored")
    log = subject.log
    measuring = MeasureJob(subject.step, subject.file, base, out, job.options, subject.name, log, chunks.first, alone=True)
    try:
        try:
            engine.measure_level(measuring, sink)
        except EngineError:
            engine.measure_level(measuring, sink)
        return _take_scores(out, subject.name, read_head(base))
    except (InterruptedRunError, NoSpaceError):
        raise
    except RunnerError as error:
        return error


def _take_scores(path: Path, fingerprint: str, head: LogitsHead) -> bytes:
    """The bytes of a file of scores, which is removed."""
    found = read_token_scores(path, fingerprint, head.n_ctx).tobytes()
    path.unlink()
    return found
