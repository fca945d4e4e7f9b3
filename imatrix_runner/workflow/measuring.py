"""Measuring: the source's log-probabilities once (or part by part), then every level against them."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.calibration.corpus import stage
from imatrix_runner.engines.base import ChunkRange
from imatrix_runner.engines.embedded.scored import read_scored
from imatrix_runner.engines.logits_file import LogitsHead, is_whole, note_path
from imatrix_runner.engines.measures import Divergence, JudgeJob, ReferJob
from imatrix_runner.engines.plausible import no_language_model, no_reference
from imatrix_runner.errors import InterruptedRunError, InvalidDataError, NoSpaceError, RunnerError, from_os_error
from imatrix_runner.evaluate.passes import next_range
from imatrix_runner.evaluate.statistics import perplexity_ratio, summarise
from imatrix_runner.events import Finished, Sink, Started
from imatrix_runner.files import encode_json, free_bytes, human_bytes
from imatrix_runner.journal import Record
from imatrix_runner.report.document import ReportEvaluation
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from imatrix_runner.workflow.choice import EMBEDDED
from imatrix_runner.workflow.context import Session
from imatrix_runner.workflow.measured import EVALUATE, REFER, Measured, as_facts
from imatrix_runner.workflow.source import Frozen
from imatrix_runner.workflow.yardstick import REFERENCE, Yardstick, check_content

_ROUNDING = 0.001
"""Mean KLD below 0 that the 16 bits of a reference can make up."""

_STRANGE = 0.02
"""Mean KLD in nats of a source against its own log-probabilities. Their 16 bits and another build cost less than 0.001."""


@dataclass(frozen=True)
class Subject:
    """Something to measure. ``inputs`` name what its figures depend on besides the yardstick; ``reason`` is why it is measured,
    empty where its figures are known."""

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
    """Measures subjects with one yardstick; its files lie in ``folder``."""

    yardstick: Yardstick
    frozen: Frozen
    session: Session
    sink: Sink = field(repr=False)

    @property
    def folder(self) -> Path:
        return self.session.workspace.evaluation

    @property
    def _base(self) -> Path:
        return self.yardstick.base or self.folder / REFERENCE

    @property
    def _source(self) -> Subject:
        return Subject("source", REFER, self.frozen.model.path, {}, "")

    def scored(self, subject: Subject) -> npt.NDArray[np.void]:
        """The scored tokens of a subject that was measured here, :data:`~imatrix_runner.engines.embedded.judging.TOKEN` [n]."""
        extent = self.yardstick.extent
        tokens = read_scored(self._out(subject), self._fingerprint(subject), extent.n_ctx)[: extent.n_chunks]
        return tokens.reshape(-1)

    def knows(self, subject: Subject) -> bool:
        """Whether all its tokens were scored before, so that its file is not needed."""
        return self._done(subject) >= self.yardstick.extent.n_chunks

    def measure(self, subjects: Sequence[Subject]) -> dict[str, Divergence | RunnerError]:
        """The figures of each by name, or why it has none. What concerns all of them is raised."""
        found: dict[str, Divergence | RunnerError] = {}
        said: set[str] = set()
        self._make_folder()
        waiting = [_Waiting(subject, self._done(subject)) for subject in subjects]
        source = _Waiting(self._source, self._done(self._source))
        while waiting:
            chunks = self._next_range(waiting, source)
            if chunks is not None:
                self._refer(chunks, source)
            for each in waiting:
                outcome = self._judge(each, chunks, said)
                if outcome is not None:
                    found[each.subject.name] = outcome
            waiting = [each for each in waiting if each.subject.name not in found]
        return found

    def repeat(self, subject: Subject, of: str) -> None:
        """Give a subject the figures of the level ``of``, whose file holds the same tensors."""
        record = self.session.journal[f"{EVALUATE} {of}"]
        reason = f"it holds the same tensors as {of}"
        inputs = {**record.inputs, **subject.inputs}
        self.session.journal.record(subject.step, replace(record, inputs=inputs, reason=reason, seconds=0.0))

    def forget(self, subjects: Sequence[Subject]) -> None:
        """Drop what is known of these and of the source: they are measured from the first token on."""
        for each in (self._source, *subjects):
            self._out(each).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the reference: it is large, and quickly made again."""
        reference = self.folder / REFERENCE
        for path in (reference, note_path(reference), self.folder / _TEXT, self.folder / _CHECK):
            path.unlink(missing_ok=True)

    def _done(self, subject: Subject) -> int:
        """Chunks whose tokens are scored. llama-perplexity tells no tokens."""
        if self.session.engine.name != EMBEDDED:
            return 0
        return len(read_scored(self._out(subject), self._fingerprint(subject), self.yardstick.extent.n_ctx))

    def _next_range(self, waiting: Sequence[_Waiting], source: _Waiting) -> ChunkRange | None:
        """What the next reference holds; None where nothing is to be computed."""
        extent, done = self.yardstick.extent, [each.done for each in waiting]
        if self.yardstick.base is not None:  # which holds everything, from the first chunk on
            return ChunkRange(0, extent.n_chunks) if min(done) < extent.n_chunks else None
        if self.session.engine.name == EMBEDDED:
            done.append(source.done)
        return next_range(done, extent, self.yardstick.fit.chunks)

    def _refer(self, chunks: ChunkRange, source: _Waiting) -> None:
        """Have the source's log-probabilities of these chunks in :attr:`_base`, and what it says itself of their tokens."""
        yardstick, sink = self.yardstick, self.sink
        if yardstick.text is None:
            return
        inputs = {**yardstick.inputs, "chunks": f"{chunks.count} from {chunks.first}"}
        fingerprint = encode_json(inputs).decode()
        head = LogitsHead(yardstick.extent.n_ctx, yardstick.extent.n_vocab, chunks.count)
        exact = source.done >= chunks.end or self.session.engine.name != EMBEDDED
        if exact and is_whole(self._base, head, fingerprint):
            self._require_language_model(head)
            return
        text = self.folder / _TEXT
        stage(yardstick.text, text)
        part = "" if chunks.count == yardstick.extent.n_chunks else f" (chunks {chunks.first} to {chunks.end - 1})"
        sink(Started(REFER, f"reference {self.frozen.model.name}{part}", chunks.count, "chunks"))
        began = time.monotonic()
        job = ReferJob(
            REFER,
            self.frozen.model.path,
            text,
            chunks,
            self._base,
            yardstick.options,
            fingerprint,
            self.session.log("evaluate-reference"),
            (self._out(self._source), self._fingerprint(self._source)),
        )
        try:
            self.session.engine.refer(job, sink)
        except NoSpaceError as error:
            raise self._explained(error) from error
        self.frozen.check_unchanged()
        self._require_language_model(head)
        source.done = max(source.done, chunks.end)
        seconds = time.monotonic() - began
        sink(Finished(REFER, "done", human_bytes(head.n_bytes), seconds))
        record = Record.now(yardstick.inputs, [], "levels are measured", seconds, command=self._command())
        self.session.journal.record(f"{REFER} {chunks.first}-{chunks.end}", record)

    def _require_language_model(self, head: LogitsHead) -> None:
        """Raise :class:`InvalidDataError` for a reference that says nothing about the text."""
        if why := no_language_model(self._base, head):
            raise InvalidDataError(*no_reference(self.frozen.model.name, why))

    def check_given(self) -> None:
        """Whether somebody's log-probabilities are those of this source: it must be next to nothing away from them.

        The vocabulary alone does not tell: models of one family share it. Raises :class:`InvalidDataError`.
        """
        check_content(self._base)
        self._make_folder()
        out = self.folder / _CHECK
        self.sink(Started("check", f"is {self.yardstick.name} of {self.frozen.model.name}", None, "chunks"))
        limit = self.yardstick.options.chunks_at_once
        job = replace(self._job(replace(self._source, step="check"), out, 0), limit=limit)
        told = self.session.engine.judge(job, self.sink)
        found = told or summarise(read_scored(out, job.fingerprint, self.yardstick.extent.n_ctx).reshape(-1))
        if not abs(found.kld.value) <= _STRANGE:  # NaN is refused, too
            raise InvalidDataError(
                f"{self.yardstick.name} was written by another model than {self.frozen.model.name}",
                f"their predictions are {found.kld.value:.3g} nats apart; the same model stays below {_STRANGE:g}",
                "Give the file that was written from this model, or leave it out to have one made.",
            )
        self.sink(Finished("check", "done", f"KLD {found.kld.value:.2g}"))

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, "making room for the measurement", self.folder) from error

    def _judge(self, waiting: _Waiting, chunks: ChunkRange | None, said: set[str]) -> Divergence | RunnerError | None:
        """Compare a subject with what is referred to now; None while there is more to come. ``said``: reasons of failures that
        were given, to which this adds its own."""
        subject, extent = waiting.subject, self.yardstick.extent
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
        measured = self._facts(subject, found)
        self.sink(Finished(subject.step, "done", describe(measured), waiting.seconds))
        inputs = {**self.yardstick.inputs, "chunks": str(extent.n_chunks), **subject.inputs}
        record = Record.now(inputs, [], subject.reason, waiting.seconds, command=self._command(), facts=as_facts(measured))
        self.session.journal.record(subject.step, record)
        return found

    def _compare(self, subject: Subject, chunks: ChunkRange) -> Divergence | None:
        try:
            return self.session.engine.judge(self._job(subject, self._out(subject), chunks.first), self.sink)
        except NoSpaceError as error:
            raise self._explained(error) from error

    def _job(self, subject: Subject, out: Path, first: int) -> JudgeJob:
        log = self.session.log(subject.step.replace(" ", "-"))
        limit = self.yardstick.extent.n_chunks if self.yardstick.base is not None else None
        return JudgeJob(
            subject.step, subject.file, self._base, out, self.yardstick.options, self._fingerprint(subject), log, first, limit
        )

    def _out(self, subject: Subject) -> Path:
        return self.folder / f"{subject.name.replace(' ', '-')}.scored"

    def _fingerprint(self, subject: Subject) -> str:
        """Of the scored tokens: chunks are left out, for more of them continue."""
        return encode_json({**self.yardstick.inputs, **subject.inputs}).decode()

    def _facts(self, subject: Subject, found: Divergence) -> Measured:
        yardstick, model = self.yardstick, self.frozen.model
        source, ratio = found.ppl_base, found.ratio
        exact, mine = self.scored(self._source), self.scored(subject)
        if len(exact) == len(mine) == found.n_tokens:  # what the reference's file says of rare tokens is cut off at e^-16
            source, ratio = perplexity_ratio(mine["nll"], exact["nll"])
        evaluation = ReportEvaluation(
            yardstick.name,
            yardstick.sha256,
            yardstick.extent.n_chunks,
            yardstick.extent.n_ctx,
            found.n_tokens,
            self.session.engine.identity(),
            f"{model.name} {model.main_type}",
            source,
            yardstick.overlap,
        )
        return Measured(found, ratio, evaluation)

    def _command(self) -> str:
        """The line that measures all levels again."""
        yardstick, extent = self.yardstick, self.yardstick.extent
        words = ["imatrix-runner", "evaluate", self.frozen.model.source.location, "-c", str(extent.n_ctx)]
        words += ["--chunks", str(extent.n_chunks)]
        if yardstick.base is not None:
            words += ["--kl-divergence-base", str(yardstick.base)]
        elif yardstick.text is not None and yardstick.text.path != resource(HELD_OUT_TEXT):
            words += ["--text", str(yardstick.text.path)]
        return shlex.join(words)

    def _explained(self, error: NoSpaceError) -> NoSpaceError:
        """The error with the figures that help; as it is where enough is free: then it is a quota that was used up."""
        need = self.yardstick.fit.n_bytes
        if need <= free_bytes(self.session.workspace.root):
            return error
        return NoSpaceError(
            "The disk became full while levels were measured",
            f"the measurement takes {human_bytes(need)} at most, and something else took the space it counted on",
            "Free some space or lower --max-disk, then run the same command again: it continues.",
        )


_TEXT, _CHECK = "text.txt", "check.scored"


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
