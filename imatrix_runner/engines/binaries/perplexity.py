"""Runs llama-perplexity for the reference's log-probabilities, and for a level's distance from them.

Neither its exit code nor its output can be trusted alone: once the model is loaded it always exits with 0, its log is written
asynchronously and sometimes loses the last lines, and the reference file announces all its chunks before the first is written
(tools/perplexity/perplexity.cpp, common/log.cpp). A reference is accepted if its file is complete, a comparison if its summary
is; a comparison that lost the end of its summary is run again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.engines.binaries.vocabulary import ends_texts, n_tokens
from imatrix_runner.engines.files.logits import LogitsHead, first_invalid_chunk, note_path, read_head, scored_tokens
from imatrix_runner.engines.files.logits_writer import copy_first_chunks
from imatrix_runner.engines.files.plausible import no_reference, uniform_guess
from imatrix_runner.engines.llama_cpp.flags import PERPLEXITY, measure_command, reference_command
from imatrix_runner.engines.llama_cpp.messages import explain, full_disk, recognise, rounded_context, with_log
from imatrix_runner.engines.llama_cpp.output import ImatrixOutput, Lines
from imatrix_runner.engines.measures import DP_FRACTIONS, KLD_FRACTIONS, Divergence, Estimate, MeasureJob, ReferenceJob
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, from_os_error
from imatrix_runner.events import Progress, Sink, detail, warning
from imatrix_runner.files import atomic_writer, discard, part_path, publish, require_space
from imatrix_runner.models.finite import non_finite_error, non_finite_tensor
from imatrix_runner.process import Outcome, Runner
from imatrix_runner.toolchain.probe import Toolchain

AGAIN, PATIENCE = 3, 15.0
"""A comparison with an incomplete summary is run again ``AGAIN`` times, or more often until all runs took ``PATIENCE`` seconds.
On a busy machine 16 of 20 runs of a 2 MB model lost lines, and none of 24 runs of two models of 100 MB and more: freeing those
takes the time that the log needs."""

_FEWEST = 100
"""llama-perplexity prints no summary for fewer scored tokens."""

# A row for each chunk, cumulative: chunk, PPL, ln(PPL(Q)/PPL(base)), KL divergence, Δp RMS, same top p.
_ROW = re.compile(r"^ *(\d{1,9}) +(\S+) ± +\S+ +\S+ ± +\S+ +(\S+) ± +\S+ ")
# "Mean    KLD:   0.008893 ±   0.000228", "99.9%   Δp:  8.027%", "Same top p: 91.961 ± 0.602 %"
_FIGURE = re.compile(r"^ *(\S[^:]*?) *: +([-+\w.]+)%?(?: ± +([-+\w.]+)(?: %)?)?$")
_WRONG = re.compile(r"kl_divergence ?: (failed .*|inconsistent .*|.* does not look like .*|.* has been computed with .*)")
_INVALID = re.compile(r"tensor '([^']*)' has invalid data|ggml_validate_row_data: found ")
# Lines that releases before 2025 do not print.
_LATER_KLD = frozenset((0.95, 0.9, 0.001))
_NAMES = {1.0: "Maximum", 0.5: "Median", 0.0: "Minimum"}


@dataclass
class DivergenceOutput:
    """Parses the output of one comparison.

    ``done`` counts chunks; ``ppl`` and ``kld`` are the means over them. ``non_finite_at``: the chunk, from 1, at which one of
    these was first NaN or infinite; 0 if none was. ``wrong``: the tool's own error message. ``invalid``: it found NaN or
    infinity in the file; ``bad_tensor`` is the first such tensor, if that line was not lost (ggml's own lines never are).
    """

    done: int = 0
    ppl: float = 0.0
    kld: float = 0.0
    wrong: str = ""
    invalid: bool = False
    bad_tensor: str = ""
    non_finite_at: int = 0
    _figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    _stdout: Lines = field(default_factory=Lines)
    _stderr: Lines = field(default_factory=Lines)

    def feed(self, stream: str, text: str) -> bool:
        """Take a block; true if another chunk is done."""
        before = self.done
        if stream == "stdout":
            for line in self._stdout.feed(text):
                self._line(line)
        else:
            for line in self._stderr.feed(text):
                if match := _WRONG.search(line):
                    self.wrong = self.wrong or match[1]
                elif match := _INVALID.search(line):
                    self.invalid, self.bad_tensor = True, self.bad_tensor or match[1] or ""
        return self.done != before

    def _line(self, line: str) -> None:
        if match := _ROW.match(line):
            self.done, self.ppl, self.kld = int(match[1]), _number(match[2]), _number(match[3])
            if not self.non_finite_at and not (math.isfinite(self.ppl) and math.isfinite(self.kld)):
                self.non_finite_at = self.done
        elif match := _FIGURE.match(line):
            self._figures[re.sub(r" +", " ", match[1])] = (_number(match[2]), _number(match[3] or "0"))

    def divergence(self, n_tokens: int) -> Divergence | None:
        """The summary's figures; None while lines of it are missing. Standard errors that print as nan, because level and
        source do not differ, are 0."""
        try:
            return self._divergence(n_tokens)
        except KeyError:
            return None

    def _kld_fractions(self) -> tuple[float, ...]:
        """The percentiles that this llama-perplexity prints. A summary can lose its end, but never lines before it."""
        older = "Same top p" in self._figures and not any(f"{_name(later)} KLD" in self._figures for later in _LATER_KLD)
        return tuple(fraction for fraction in KLD_FRACTIONS if not older or fraction not in _LATER_KLD)

    def _divergence(self, n_tokens: int) -> Divergence:
        correlation = self._figures["Cor(ln(PPL(Q)), ln(PPL(base)))"][0] / 100
        return Divergence(
            n_tokens=n_tokens,
            ppl=self._estimate("Mean PPL(Q)"),
            ppl_base=self._estimate("Mean PPL(base)"),
            correlation=correlation if math.isfinite(correlation) else 1.0,
            log_ratio=self._estimate("Mean ln(PPL(Q)/PPL(base))"),
            ratio=self._estimate("Mean PPL(Q)/PPL(base)"),
            difference=self._estimate("Mean PPL(Q)-PPL(base)"),
            kld=self._estimate("Mean KLD"),
            kld_at={fraction: self._figures[f"{_name(fraction)} KLD"][0] for fraction in self._kld_fractions()},
            dp=self._estimate("Mean Δp", 100),
            dp_at={fraction: self._figures[f"{_name(fraction)} Δp"][0] / 100 for fraction in DP_FRACTIONS},
            dp_rms=self._estimate("RMS Δp", 100),
            same_top=self._estimate("Same top p", 100),
        )

    def _estimate(self, label: str, of: float = 1) -> Estimate:
        value, error = self._figures[label]
        return Estimate(value / of, error / of if math.isfinite(error) else 0.0)


def make_reference(job: ReferenceJob, sink: Sink, tools: Toolchain, runner: Runner) -> None:
    """Write the reference's log-probabilities, completely or not at all: an interrupted run starts again from the beginning.

    Raises :class:`InvalidDataError` if the model produces NaN or infinite numbers or the text is too short, :class:`UsageError`
    for what llama-perplexity cannot do, :class:`EngineError` or a more specific error if it fails.
    """
    count = job.chunks.count
    require_enough(count, job.options.n_ctx)
    what = f"What {job.model.name} predicts could not be computed"
    note, part = note_path(job.out), part_path(job.out)
    command = reference_command(job, part, tools, ends_texts=ends_texts(job.model))
    for old in (note, job.out, part):  # two files would take more disk space than planned
        discard(old)
    output = ImatrixOutput()  # it prints its chunks as llama-imatrix does
    n_vocab = n_tokens(job.model)

    def follow(stream: str, block: str) -> None:
        if output.feed(stream, block) and output.ppl is not None:
            if output.non_finite_at:
                raise _no_numbers_in(job.model, output.non_finite_at)
            if n_vocab and output.ppl > 0 and (why := uniform_guess(math.log(output.ppl), n_vocab)):
                raise InvalidDataError(*no_reference(job.model.name, why))
            sink(Progress(job.step, output.done, count, f"PPL {output.ppl:.4f}"))

    try:
        outcome = runner.run(command, log=job.log, on_text=follow)
        if not outcome.ok:
            raise explain(outcome, what, writes=part)
        head = _whole(part, outcome, what)
        if head.n_ctx != job.options.n_ctx:
            raise rounded_context(PERPLEXITY, job.options.n_ctx, head.n_ctx)
        if (head.n_ctx, head.n_chunks) != (job.options.n_ctx, count):
            raise InvalidDataError(
                f"llama-perplexity computed {head.n_chunks} chunks of {head.n_ctx} tokens, not {count} of {job.options.n_ctx}",
                "the text is shorter than it was when it was counted",
                "Run the same command again.",
            )
        non_finite_at = first_invalid_chunk(part, head)
        if non_finite_at is not None:
            raise _no_numbers_in(job.model, non_finite_at + 1)
        publish(part, job.out)
    finally:
        discard(part)
    with atomic_writer(note) as handle:
        handle.write(job.fingerprint.encode())


def measure_level(job: MeasureJob, sink: Sink, tools: Toolchain, runner: Runner) -> Divergence:
    """Compare a level with the reference. Raises the same errors as :func:`make_reference`."""
    head = read_head(job.base)
    require_enough(head.n_chunks if job.limit is None else min(job.limit, head.n_chunks), head.n_ctx)
    _require_fit(job, head)
    with _only_so_many(job, head) as (base, head):
        return _compare(job, base, head, sink, tools, runner)


def _compare(job: MeasureJob, base: Path, head: LogitsHead, sink: Sink, tools: Toolchain, runner: Runner) -> Divergence:
    command = measure_command(job, base, tools, ends_texts=ends_texts(job.model))
    what = f"{job.model.name} could not be compared with its source"
    tries, seconds = 0, 0.0
    while tries <= AGAIN or seconds < PATIENCE:
        output = DivergenceOutput()

        def follow(stream: str, block: str, output: DivergenceOutput = output) -> None:
            if output.feed(stream, block):
                if output.non_finite_at:
                    raise _no_numbers_in(job.model, output.non_finite_at)
                sink(Progress(job.step, output.done, head.n_chunks, f"KLD {output.kld:.5f}"))

        outcome = runner.run(command, log=job.log, on_text=follow)
        tries, seconds = tries + 1, seconds + outcome.seconds
        if output.invalid:
            which = f"its tensor {output.bad_tensor}" if output.bad_tensor else "one of its tensors"
            raise non_finite_error(job.model, f"numbers in {which}", "")
        if not outcome.ok:
            raise explain(outcome, what)
        if output.wrong:
            raise recognise(outcome, what) or EngineError(what, output.wrong, with_log("Read the log.", outcome))
        found = output.divergence(head.n_chunks * head.rows)
        if found is not None:
            sink(Progress(job.step, head.n_chunks, head.n_chunks, f"KLD {found.kld.value:.5f}"))
            return found
        notice = warning if tries == 1 else detail
        sink(notice(f"llama-perplexity lost the end of its summary for {job.model.name} (run {tries}): running it again."))
    raise EngineError(
        what,
        f"llama-perplexity lost the end of its summary {tries} times: it writes its log asynchronously",
        with_log("Use --engine embedded, which computes the same figures.", outcome),
    )


def require_enough(n_chunks: int, n_ctx: int) -> None:
    """Raise :class:`InvalidDataError` if there are too few scored tokens for llama-perplexity's summary."""
    each = max(1, scored_tokens(n_ctx))
    if n_chunks * each < _FEWEST:
        raise InvalidDataError(
            f"{n_chunks} chunks of {n_ctx} tokens are too few for a comparison",
            f"llama-perplexity needs at least {_FEWEST} scored tokens, and these chunks have {n_chunks * each}",
            f"Use more chunks: --chunks {-(-_FEWEST // each)}",
        )


def _require_fit(job: MeasureJob, head: LogitsHead) -> None:
    """Raise :class:`InvalidDataError` if level and reference do not match: llama-perplexity would only warn, and go on."""
    vocabulary = n_tokens(job.model)
    if vocabulary not in (None, head.n_vocab):
        why = f"the level has a vocabulary of {vocabulary} tokens, the reference one of {head.n_vocab}"
    elif job.options.n_ctx != head.n_ctx:
        why = f"the reference was made with chunks of {head.n_ctx} tokens, not {job.options.n_ctx}"
    else:
        return
    raise InvalidDataError(
        f"{job.model.name} cannot be compared with {job.base.name}", why, "Compare a level with the model it was made from."
    )


@contextmanager
def _only_so_many(job: MeasureJob, head: LogitsHead) -> Iterator[tuple[Path, LogitsHead]]:
    """The reference, or a copy with only the wanted chunks: llama-perplexity compares with all chunks of the file."""
    if job.limit is None or job.limit >= head.n_chunks:
        yield job.base, head
        return
    copy = part_path(job.out)
    require_space(copy, replace(head, n_chunks=job.limit).n_bytes, f"{job.limit} chunks of {job.base.name}")
    try:
        fewer = copy_first_chunks(job.base, head, job.limit, copy)
    except OSError as error:
        discard(copy)
        raise from_os_error(error, f"copying {job.base.name}", copy) from error
    try:
        yield copy, fewer
    finally:
        discard(copy)


def _whole(part: Path, outcome: Outcome, what: str) -> LogitsHead:
    try:
        return read_head(part)
    except InvalidDataError as error:
        raise _why_not_whole(part, outcome, what, error) from error


def _why_not_whole(part: Path, outcome: Outcome, what: str, error: RunnerError) -> RunnerError:
    """The error for an incomplete file; llama-perplexity does not check its writes."""
    todo = with_log("Run the same command again.", outcome)
    return full_disk(what, part) or recognise(outcome, what) or EngineError(what, error.why, todo)


def _no_numbers_in(model: Path, chunk: int) -> InvalidDataError:
    """``chunk``: number, from 1, of the first chunk known to have NaN or infinite logits."""
    return non_finite_error(
        model, f"its logits in the first {chunk} chunks" if chunk > 1 else "its logits in chunk 1", non_finite_tensor(model)
    )


def _name(fraction: float) -> str:
    return _NAMES.get(fraction, f"{100 * fraction:.1f}%")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
