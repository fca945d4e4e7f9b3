"""Measures levels: the source's log-probabilities once (or in several reference windows), then every level against them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.documents.corpus import Corpus, stage
from imatrix_runner.engines.abilities import RangeMeasurer
from imatrix_runner.engines.files.logits import LogitsHead, is_whole, note_path, scored_tokens
from imatrix_runner.engines.files.plausible import no_language_model, no_reference
from imatrix_runner.engines.files.token_scores import read_token_scores
from imatrix_runner.engines.jobs import ChunkRange
from imatrix_runner.engines.measures import (
    Divergence,
    MeasureJob,
    RangesJob,
    RangeSubject,
    ReferenceJob,
)
from imatrix_runner.errors import InterruptedRunError, InvalidDataError, NoSpaceError, RunnerError, from_os_error
from imatrix_runner.evaluate.disk_budget import next_range
from imatrix_runner.evaluate.held_out import REFERENCE, HeldOut, check_content
from imatrix_runner.evaluate.kld_statistics import perplexity_ratio, summarise
from imatrix_runner.evaluate.measure_ranges import compute_ranges, divided, missing_ranges, ranges_of
from imatrix_runner.evaluate.measurements import Measured, ReportEvaluation
from imatrix_runner.evaluate.precision import possible_ends, precise_after, relative_error
from imatrix_runner.evaluate.range_scores import RangeScoresFile, remove_waiting
from imatrix_runner.events import Finished, Sink, Started, warning
from imatrix_runner.files import encode_json, free_bytes, human_bytes
from imatrix_runner.journal import StepRecord
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from imatrix_runner.steps import step_id

_REFERENCE = "reference"
"""The step name of the source's own computation, in events and logs."""

_ROUNDING = 0.001
"""How far below 0 the rounding of a reference to 16 bits can push a mean KLD."""

_STRANGE = 0.02
"""Largest mean KLD, in nats, of a source against its own log-probabilities. 16-bit rounding and another build cause < 0.001."""


@dataclass(frozen=True)
class Subject:
    """Something to measure. ``inputs`` name what its figures depend on besides the held-out text; ``reason`` is why it is
    measured, empty where its figures are known."""

    name: str
    step: str
    file: Path
    inputs: Mapping[str, str]
    reason: str

    @property
    def todo(self) -> bool:
        return bool(self.reason)


@dataclass(frozen=True)
class Measurer:
    """Measures levels on one held-out text; its files lie in ``folder``."""

    held_out: HeldOut
    frozen: Frozen
    session: Session
    sink: Sink = field(repr=False)

    @property
    def folder(self) -> Path:
        return self.session.workspace.evaluation

    @property
    def _base(self) -> Path:
        return self.held_out.base or self.folder / REFERENCE

    @property
    def _source(self) -> Subject:
        return Subject("source", _REFERENCE, self.frozen.model.path, {}, "")

    def scored(self, subject: Subject) -> npt.NDArray[np.void]:
        """The token scores of a subject that was measured here, :data:`~imatrix_runner.engines.files.token_scores.TOKEN`
        [n]."""
        extent = self.held_out.extent
        tokens = read_token_scores(self._out(subject), self._fingerprint(subject), extent.n_ctx)[: extent.n_chunks]
        return tokens.reshape(-1)

    def knows(self, subject: Subject) -> bool:
        """Whether scores of all its tokens are stored, so that its file is not needed."""
        if self.held_out.until is not None:
            return self._precise_after(subject) is not None
        return self._done(subject) >= self.held_out.extent.n_chunks

    def _precise_after(self, subject: Subject) -> int | None:
        """The number of chunks with which its measurement ends; None if more are needed than those stored."""
        held_out = self.held_out
        assert held_out.until is not None
        return precise_after(self._kld(subject), held_out.until, len(held_out.order), held_out.extent.at_once)

    def _kld(self, subject: Subject) -> npt.NDArray[np.float64]:
        """The stored divergences, float64 [n_chunks, rows]."""
        return self.scored(subject)["kld"].astype(np.float64).reshape(-1, scored_tokens(self.held_out.extent.n_ctx))

    def measure(self, subjects: Sequence[Subject]) -> dict[str, Divergence | RunnerError]:
        """Return the figures of each subject by name, or its error. Errors that concern all of them are raised."""
        if self.held_out.until is not None:
            return self._measure_until_precise(subjects, self.held_out.until)
        return self._measure(subjects, self._record)

    def _measure_until_precise(self, subjects: Sequence[Subject], share: float) -> dict[str, Divergence | RunnerError]:
        """Like :meth:`measure`, with more and more chunks, until the error of each subject's KLD is below ``share`` of it."""
        extent, found = self.held_out.extent, dict[str, Divergence | RunnerError]()
        seconds = dict.fromkeys((subject.name for subject in subjects), 0.0)
        left = list(subjects)

        def add_time(subject: Subject, _found: Divergence, took: float) -> None:
            seconds[subject.name] += took

        for n_chunks in possible_ends(extent.n_chunks, extent.at_once):
            part = replace(self, held_out=self.held_out.first(n_chunks))
            outcomes = part._measure(left, add_time) if left else {}
            for subject in left:
                outcome = outcomes[subject.name]
                if isinstance(outcome, RunnerError):
                    found[subject.name] = outcome
                elif self._precise_after(subject) == n_chunks:
                    found[subject.name] = outcome
                    part._record(subject, outcome, seconds[subject.name])
            left = [subject for subject in left if subject.name not in found]
        self._warn_of_imprecise([subject for subject in subjects if isinstance(found[subject.name], Divergence)], share)
        return found

    def _warn_of_imprecise(self, subjects: Sequence[Subject], share: float) -> None:
        """Say which subjects the whole text was too short for."""
        n_chunks, name = self.held_out.extent.n_chunks, self.held_out.name
        ended = [subject for subject in subjects if self._precise_after(subject) == n_chunks]
        errors = {subject.name: relative_error(self._kld(subject)) for subject in ended}
        errors = {name: error for name, error in errors.items() if error >= share}
        if not errors:
            return
        worst = max(errors.values())
        needed = f"; about {math.ceil(n_chunks * (worst / share) ** 2)} would be needed" if math.isfinite(worst) else ""
        self.sink(
            warning(
                f"{', '.join(errors)}: all {n_chunks} chunks of {name} give no error below {100 * share:g} % (up to "
                f"{100 * worst:.1f} %){needed}."
            )
        )

    def _measure(self, subjects: Sequence[Subject], record: _Record) -> dict[str, Divergence | RunnerError]:
        """:meth:`measure` all chunks of the extent; ``record`` is called with each subject's figures and seconds."""
        found: dict[str, Divergence | RunnerError] = {}
        said: set[str] = set()
        self._make_folder()
        spread = self.session.engine.range_measurer
        if subjects and spread is not None and self.held_out.text is not None:
            return self._measure_in_ranges(spread, self.held_out.text, subjects, record)
        waiting = [_Waiting(subject, self._done(subject)) for subject in subjects]
        source = _Waiting(self._source, self._done(self._source))
        while waiting:
            chunks = self._next_range(waiting, source)
            if chunks is not None:
                self._refer(chunks, source)
            for each in waiting:
                outcome = self._measure_subject(each, chunks, said, record)
                if outcome is not None:
                    found[each.subject.name] = outcome
            waiting = [each for each in waiting if each.subject.name not in found]
        return found

    def repeat(self, subject: Subject, of: str) -> None:
        """Give a subject the figures of the level ``of``, whose file holds the same tensors."""
        record = self.session.journal[step_id("evaluate", of)]
        reason = f"it holds the same tensors as {of}"
        inputs = {**record.inputs, **subject.inputs}
        self.session.journal.record(subject.step, replace(record, inputs=inputs, reason=reason, seconds=0.0))

    def forget(self, subjects: Sequence[Subject]) -> None:
        """Delete the token scores of these subjects and of the source, so that they are measured from the first token."""
        for each in (self._source, *subjects):
            self._out(each).unlink(missing_ok=True)
        remove_waiting(self.folder)

    def tidy(self) -> None:
        """Remove the reference: it is large, and quick to make again. So are scores that wait for those of earlier chunks."""
        remove_waiting(self.folder)
        reference = self.folder / REFERENCE
        for path in (reference, note_path(reference), self.folder / _TEXT, self.folder / _CHECK):
            path.unlink(missing_ok=True)

    def _done(self, subject: Subject) -> int:
        """Number of chunks with stored token scores; 0 if the engine stores none."""
        if not self.session.engine.capabilities.scores_tokens:
            return 0
        return len(read_token_scores(self._out(subject), self._fingerprint(subject), self.held_out.extent.n_ctx))

    def _next_range(self, waiting: Sequence[_Waiting], source: _Waiting) -> ChunkRange | None:
        """Return the chunks of the next reference window; None if nothing is left to compute."""
        extent, done = self.held_out.extent, [each.done for each in waiting]
        if self.held_out.base is not None:  # which holds everything, from the first chunk on
            return ChunkRange(0, extent.n_chunks) if min(done) < extent.n_chunks else None
        if self.session.engine.capabilities.scores_tokens:
            done.append(source.done)
        return next_range(done, extent, self.held_out.fit.chunks)

    def _refer(self, chunks: ChunkRange, source: _Waiting) -> None:
        """Make sure that :attr:`_base` holds the source's log-probabilities of these chunks, and store its own token scores."""
        held_out, sink = self.held_out, self.sink
        if held_out.text is None:
            return
        inputs = {**held_out.inputs, "chunks": f"{chunks.count} from {chunks.first}"}
        fingerprint = encode_json(inputs).decode()
        head = LogitsHead(held_out.extent.n_ctx, held_out.extent.n_vocab, chunks.count)
        exact = source.done >= chunks.end or not self.session.engine.capabilities.scores_tokens
        if exact and is_whole(self._base, head, fingerprint):
            self._require_language_model(head)
            return
        text = self.folder / _TEXT
        stage(held_out.text, text)
        part = "" if chunks.count == held_out.extent.n_chunks else f" (chunks {chunks.first} to {chunks.end - 1})"
        sink(Started(_REFERENCE, f"reference {self.frozen.model.name}{part}", chunks.count, "chunks"))
        began = time.monotonic()
        job = ReferenceJob(
            _REFERENCE,
            self.frozen.model.path,
            text,
            chunks,
            self._base,
            held_out.options,
            fingerprint,
            self.session.log("evaluate-reference"),
            (self._out(self._source), self._fingerprint(self._source)),
            order=held_out.numbers(chunks),
        )
        try:
            self.session.engine.make_reference(job, sink)
        except NoSpaceError as error:
            raise self._explained(error) from error
        self.frozen.check_unchanged()
        self._require_language_model(head)
        source.done = max(source.done, chunks.end)
        seconds = time.monotonic() - began
        sink(Finished(_REFERENCE, "done", human_bytes(head.n_bytes), seconds))
        record = StepRecord.now(held_out.inputs, [], "levels are measured", seconds, commands=[self._command()])
        self.session.journal.record(step_id("reference", f"{chunks.first}-{chunks.end}"), record)

    def _require_language_model(self, head: LogitsHead) -> None:
        """Raise :class:`InvalidDataError` if the reference does not depend on the text."""
        if why := no_language_model(self._base, head):
            raise InvalidDataError(*no_reference(self.frozen.model.name, why))

    def check_given(self) -> None:
        """Check that a given file of log-probabilities was written from this source: its mean KLD against them must be near 0.

        The vocabulary alone cannot show this, because models of one family share it. Raises :class:`InvalidDataError`.
        """
        check_content(self._base)
        self._make_folder()
        out = self.folder / _CHECK
        self.sink(Started("check", f"is {self.held_out.name} of {self.frozen.model.name}", None, "chunks"))
        limit = self.held_out.options.chunks_at_once
        job = replace(self._job(replace(self._source, step="check"), out, 0), limit=limit)
        told = self.session.engine.measure_level(job, self.sink)
        found = told or summarise(read_token_scores(out, job.fingerprint, self.held_out.extent.n_ctx).reshape(-1))
        if not abs(found.kld.value) <= _STRANGE:  # NaN is refused, too
            raise InvalidDataError(
                f"{self.held_out.name} was written by another model than {self.frozen.model.name}",
                f"their predictions are {found.kld.value:.3g} nats apart; the same model stays below {_STRANGE:g}",
                "Give the file that was written from this model, or leave it out to have one made.",
            )
        self.sink(Finished("check", "done", f"KLD {found.kld.value:.2g}"))

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, "making room for the measurement", self.folder) from error

    def _measure_subject(
        self, waiting: _Waiting, chunks: ChunkRange | None, said: set[str], record: _Record
    ) -> Divergence | RunnerError | None:
        """Compare a subject with the current reference window; None while further windows follow. ``said``: the reasons of
        earlier failures, to which this adds its own."""
        subject, extent = waiting.subject, self.held_out.extent
        last = chunks is None or chunks.end >= extent.n_chunks
        if chunks is not None and waiting.done >= chunks.end and not last:
            return None
        began = time.monotonic()
        told: Divergence | None = None
        self.sink(Started(subject.step, f"measure {subject.name}", extent.n_chunks, "chunks"))
        try:
            if chunks is not None and waiting.done < chunks.end:
                told = self._compare(subject, chunks)
                waiting.done = chunks.end
                waiting.seconds += time.monotonic() - began
            if not last:
                self.sink(Finished(subject.step, "done", f"{waiting.done} of {extent.n_chunks} chunks", waiting.seconds))
                return None
            found = told or summarise(self.scored(subject))
            _require_numbers(found, subject, extent.n_vocab)
        except (InterruptedRunError, NoSpaceError):
            raise
        except RunnerError as error:
            self.sink(Finished(subject.step, "failed", once(error.why, said), time.monotonic() - began))
            self.frozen.check_unchanged()
            return error
        record(subject, found, waiting.seconds)
        return found

    def _record(self, subject: Subject, found: Divergence, seconds: float) -> None:
        """Report a subject's figures, and put them into the journal."""
        measured = self._facts(subject, found)
        self.sink(Finished(subject.step, "done", describe(measured), seconds))
        inputs = {**self.held_out.whole_inputs, **subject.inputs}
        record = StepRecord.now(inputs, [], subject.reason, seconds, commands=[self._command()], facts=measured)
        self.session.journal.record(subject.step, record)

    def _measure_in_ranges(
        self, measurer: RangeMeasurer, text: Corpus, subjects: Sequence[Subject], record_figures: _Record
    ) -> dict[str, Divergence | RunnerError]:
        """Like :meth:`measure`, with an engine that computes ranges of chunks in any order."""
        ranges = ranges_of(self.frozen.model, self.session.engine, self.held_out)
        named = [
            RangeSubject(each.step, each.name, each.file, self.session.log(each.step.replace(" ", "-"))) for each in subjects
        ]
        job = RangesJob(
            _REFERENCE,
            self.frozen.model.path,
            self.folder / _TEXT,
            tuple(named),
            (),
            self.held_out.options,
            self.session.log("evaluate-reference"),
        )
        found: dict[str, Divergence | RunnerError] = {}
        said: set[str] = set()
        with ExitStack() as files:
            source, *each = (
                files.enter_context(
                    closing(RangeScoresFile(self._out(one), self._fingerprint(one), self.held_out.options, ranges))
                )
                for one in (self._source, *subjects)
            )
            missing = divided(missing_ranges(ranges, source, each), measurer.at_once)
            job = replace(job, ranges=tuple(replace(one, order=self.held_out.numbers(one.chunks)) for one in missing))
            if job.ranges:
                stage(text, job.text)
                compute_ranges(measurer, job, source, each, self.sink)
                self.frozen.check_unchanged()
                record = StepRecord.now(
                    self.held_out.inputs, [], "levels are measured", source.seconds, commands=[self._command()]
                )
                whole = f"{job.ranges[0].chunks.first}-{job.ranges[-1].chunks.end}"
                self.session.journal.record(step_id("reference", whole), record)
            for subject, scores in zip(subjects, each, strict=True):
                self.sink(Started(subject.step, f"measure {subject.name}", ranges[-1].end, "chunks"))
                found[subject.name] = self._finish(subject, scores, said, record_figures)
        return found

    def _finish(self, subject: Subject, scores: RangeScoresFile, said: set[str], record: _Record) -> Divergence | RunnerError:
        """The figures of a subject whose ranges were computed, or its error. ``said``: the reasons of earlier failures."""
        try:
            if scores.error is not None:
                raise scores.error
            found = summarise(self.scored(subject))
            _require_numbers(found, subject, self.held_out.extent.n_vocab)
        except NoSpaceError:
            raise
        except RunnerError as error:
            self.sink(Finished(subject.step, "failed", once(error.why, said), scores.seconds))
            return error
        record(subject, found, scores.seconds)
        return found

    def _compare(self, subject: Subject, chunks: ChunkRange) -> Divergence | None:
        try:
            return self.session.engine.measure_level(self._job(subject, self._out(subject), chunks.first), self.sink)
        except NoSpaceError as error:
            raise self._explained(error) from error

    def _job(self, subject: Subject, out: Path, first: int) -> MeasureJob:
        log = self.session.log(subject.step.replace(" ", "-"))
        limit = self.held_out.extent.n_chunks if self.held_out.base is not None else None
        return MeasureJob(
            subject.step, subject.file, self._base, out, self.held_out.options, self._fingerprint(subject), log, first, limit
        )

    def _out(self, subject: Subject) -> Path:
        return self.folder / f"{subject.name.replace(' ', '-')}{'.spread' if self.held_out.order else ''}.scored"

    def _fingerprint(self, subject: Subject) -> str:
        """Fingerprint of the token scores. The number of chunks is left out, because a longer measurement continues a shorter
        one."""
        return encode_json({**self.held_out.inputs, **subject.inputs}).decode()

    def _facts(self, subject: Subject, found: Divergence) -> Measured:
        held_out, model = self.held_out, self.frozen.model
        source, ratio = found.ppl_base, found.ratio
        exact, mine = self.scored(self._source), self.scored(subject)
        if len(exact) == len(mine) == found.n_tokens:  # what the reference's file says of rare tokens is cut off at e^-16
            source, ratio = perplexity_ratio(mine["nll"], exact["nll"])
        evaluation = ReportEvaluation(
            held_out.name,
            held_out.sha256,
            held_out.extent.n_chunks,
            held_out.extent.n_ctx,
            found.n_tokens,
            self.session.engine.identity(),
            f"{model.name} {model.main_type}",
            source,
            held_out.overlap,
            until=held_out.until,
        )
        return Measured(found, ratio, evaluation)

    def _command(self) -> list[str]:
        """Words of the command that measures all levels again."""
        held_out, extent = self.held_out, self.held_out.extent
        words = ["imatrix-runner", "evaluate", self.frozen.model.source.location, "-c", str(extent.n_ctx)]
        if held_out.until is not None:
            words += ["--chunks", str(len(held_out.order)), "--until-precise", f"{100 * held_out.until:g}%"]
        else:
            words += ["--chunks", str(extent.n_chunks)]
        if held_out.base is not None:
            words += ["--kl-divergence-base", str(held_out.base)]
        elif held_out.text is not None and held_out.text.path != resource(HELD_OUT_TEXT):
            words += ["--text", str(held_out.text.path)]
        return words

    def _explained(self, error: NoSpaceError) -> NoSpaceError:
        """The error with the figures that help; unchanged if enough is free, because then a quota is used up."""
        need = self.held_out.fit.n_bytes
        if need <= free_bytes(self.session.workspace.root):
            return error
        return NoSpaceError(
            "The disk became full while levels were measured",
            f"the measurement takes {human_bytes(need)} at most, and something else took the space it counted on",
            "Free some space or lower --max-disk, then run the same command again: it continues.",
        )


_TEXT, _CHECK = "text.txt", "check.scored"

_Record = Callable[[Subject, Divergence, float], None]
"""Called with a subject, its figures, and the seconds that they took."""


@dataclass
class _Waiting:
    """A subject of whose chunks some are to come; ``seconds`` that went into it."""

    subject: Subject
    done: int
    seconds: float = 0.0


def _require_numbers(found: Divergence, subject: Subject, n_vocab: int) -> None:
    """Raise :class:`InvalidDataError` for figures that no comparison can have.

    A probability of exactly 0 makes no logit infinite, and every mean of what it is compared with. A mean KLD is below 0 by no
    more than rounding and the part of the probability that a reference keeps no log-probability of.
    """
    figures = (found.ppl, found.ppl_base, found.ratio, found.difference, found.kld, found.dp, found.dp_rms, found.same_top)
    if not all(math.isfinite(each.value) and math.isfinite(each.error) for each in figures):
        raise InvalidDataError(
            f"{subject.file.name} cannot be measured",
            "its figures are infinite: tokens that its source expects are impossible to it",
            "The file is damaged or overflows: make it again, or choose another type.",
        )
    if found.kld.value < -(_ROUNDING + n_vocab * math.exp(-16)):
        raise InvalidDataError(
            f"{subject.file.name} cannot be measured",
            f"its mean KLD is {found.kld.value:.3g}, and a divergence is never below 0",
            "The reference is damaged: measure again with --again, or give another --kl-divergence-base.",
        )


def once(why: str, said: set[str]) -> str:
    """A reason, or that it is one of those ``said`` already; then it is one of them."""
    before = why in said
    said.add(why)
    return "for the same reason" if before else why


def describe(measured: Measured) -> str:
    """One line for people: the three figures that are compared most."""
    found = measured.divergence
    return (
        f"KLD {found.kld.value:.4g} ± {found.kld.error:.2g}, "
        f"PPL {found.ppl.value:.4g} ({measured.ppl_ratio.value - 1:+.2%}), same top token {found.same_top.value:.1%}"
    )
