"""llama-perplexity: the reference's log-probabilities, and a level's distance from them.

Neither its exit code nor its words can be trusted alone: after the model is loaded it ends with 0 whatever happened, its log is
written asynchronously and loses the last lines now and then, and the file of the reference announces all its chunks before the
first is written (tools/perplexity/perplexity.cpp, common/log.cpp). So a reference counts when its file is whole, and a
comparison when its summary is; one that lost the end of its summary is made again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from imatrix_runner.engines.binaries.argv import PERPLEXITY, judge_command, refer_command
from imatrix_runner.engines.binaries.lines import ImatrixOutput, Lines
from imatrix_runner.engines.binaries.messages import explain, full_disk, recognise, rounded_context, with_log
from imatrix_runner.engines.binaries.vocabulary import ends_texts, n_tokens
from imatrix_runner.engines.logits_file import LogitsHead, first_wild_chunk, note_path, read_head, scored_tokens
from imatrix_runner.engines.measures import DP_FRACTIONS, KLD_FRACTIONS, Divergence, Estimate, JudgeJob, ReferJob
from imatrix_runner.engines.plausible import no_reference, uniform_guess
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, from_os_error
from imatrix_runner.events import Progress, Sink, detail, warning
from imatrix_runner.files import atomic_writer, discard, part_path, publish, require_space
from imatrix_runner.models.finite import no_numbers, non_finite_tensor
from imatrix_runner.process import Outcome, Runner
from imatrix_runner.toolchain.probe import Toolchain

AGAIN, PATIENCE = 3, 15.0
"""A comparison without a whole summary is made again so many times, and more often within so many seconds of them all. Of a
model of 2 MB 16 of 20 runs lost lines on a busy machine, of two of 100 MB and more none of 24: freeing those takes the time
that the log needs."""

_FEWEST = 100
"""Of fewer scored tokens llama-perplexity prints no summary."""

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
    """Follows one comparison.

    ``done`` counts chunks; ``ppl`` and ``kld`` are the means over them, ``wild`` is how many there were when these first were
    no numbers. ``wrong`` is what the tool itself says went wrong. ``invalid``: it found NaN or infinity in the file, and
    ``bad_tensor`` is where first, if that line was not lost (ggml's own lines never are).
    """

    done: int = 0
    ppl: float = 0.0
    kld: float = 0.0
    wrong: str = ""
    invalid: bool = False
    bad_tensor: str = ""
    wild: int = 0
    _figures: dict[str, tuple[float, float]] = field(default_factory=dict)
    _stdout: Lines = field(default_factory=Lines)
    _stderr: Lines = field(default_factory=Lines)

    def feed(self, stream: str, text: str) -> bool:
        """Take a piece; true if another chunk is done."""
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
            if not self.wild and not (math.isfinite(self.ppl) and math.isfinite(self.kld)):
                self.wild = self.done
        elif match := _FIGURE.match(line):
            self._figures[re.sub(r" +", " ", match[1])] = (_number(match[2]), _number(match[3] or "0"))

    def divergence(self, n_tokens: int) -> Divergence | None:
        """What the summary says; None while lines of it are missing. Errors that print as nan, where level and source do not
        differ, are 0."""
        try:
            return self._divergence(n_tokens)
        except KeyError:
            return None

    def _kld_fractions(self) -> tuple[float, ...]:
        """The percentiles that this llama-perplexity prints: what is lost is the end of a summary, never a part before it."""
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


def refer(job: ReferJob, sink: Sink, tools: Toolchain, runner: Runner) -> None:
    """Write the reference's log-probabilities. They are there whole, or not at all: a run that was ended begins anew.

    Raises :class:`InvalidDataError` where the model computes no numbers or the text is too short, :class:`UsageError` for what
    llama-perplexity cannot do, :class:`EngineError` or a more exact error where it fails.
    """
    count = job.chunks.count
    require_enough(count, job.options.n_ctx)
    what = f"What {job.model.name} predicts could not be computed"
    note, part = note_path(job.out), part_path(job.out)
    command = refer_command(job, part, tools, ends_texts=ends_texts(job.model))
    for old in (note, job.out, part):  # two would take more of the disk than was reckoned with
        discard(old)
    output = ImatrixOutput()  # it prints its chunks as llama-imatrix does
    n_vocab = n_tokens(job.model)

    def follow(stream: str, piece: str) -> None:
        if output.feed(stream, piece) and output.ppl is not None:
            if output.wild:
                raise _no_numbers_in(job.model, output.wild)
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
        wild = first_wild_chunk(part, head)
        if wild is not None:
            raise _no_numbers_in(job.model, wild + 1)
        publish(part, job.out)
    finally:
        discard(part)
    with atomic_writer(note) as handle:
        handle.write(job.fingerprint.encode())


def judge(job: JudgeJob, sink: Sink, tools: Toolchain, runner: Runner) -> Divergence:
    """Compare a level with the reference. Raises what :func:`refer` does."""
    head = read_head(job.base)
    require_enough(head.n_chunks if job.limit is None else min(job.limit, head.n_chunks), head.n_ctx)
    _require_fit(job, head)
    with _only_so_many(job, head) as (base, head):
        return _compare(job, base, head, sink, tools, runner)


def _compare(job: JudgeJob, base: Path, head: LogitsHead, sink: Sink, tools: Toolchain, runner: Runner) -> Divergence:
    command = judge_command(job, base, tools, ends_texts=ends_texts(job.model))
    what = f"{job.model.name} could not be compared with its source"
    tries, seconds = 0, 0.0
    while tries <= AGAIN or seconds < PATIENCE:
        output = DivergenceOutput()

        def follow(stream: str, piece: str, output: DivergenceOutput = output) -> None:
            if output.feed(stream, piece):
                if output.wild:
                    raise _no_numbers_in(job.model, output.wild)
                sink(Progress(job.step, output.done, head.n_chunks, f"KLD {output.kld:.5f}"))

        outcome = runner.run(command, log=job.log, on_text=follow)
        tries, seconds = tries + 1, seconds + outcome.seconds
        if output.invalid:
            which = f"its tensor {output.bad_tensor}" if output.bad_tensor else "one of its tensors"
            raise no_numbers(job.model, f"numbers in {which}", "")
        if not outcome.ok:
            raise explain(outcome, what)
        if output.wrong:
            raise recognise(outcome, what) or EngineError(what, output.wrong, with_log("Read the log.", outcome))
        found = output.divergence(head.n_chunks * head.rows)
        if found is not None:
            sink(Progress(job.step, head.n_chunks, head.n_chunks, f"KLD {found.kld.value:.5f}"))
            return found
        tell = warning if tries == 1 else detail
        sink(tell(f"llama-perplexity lost the end of what it says of {job.model.name} (run {tries}): it is asked again."))
    raise EngineError(
        what,
        f"llama-perplexity lost the end of its summary {tries} times: it writes its log asynchronously",
        with_log("Use --engine embedded, which computes the same figures and loses none.", outcome),
    )


def require_enough(n_chunks: int, n_ctx: int) -> None:
    """Raise :class:`InvalidDataError` for fewer tokens than llama-perplexity sums up."""
    each = max(1, scored_tokens(n_ctx))
    if n_chunks * each < _FEWEST:
        raise InvalidDataError(
            f"{n_chunks} chunks of {n_ctx} tokens are too few to compare with",
            f"llama-perplexity tells nothing of fewer than {_FEWEST} scored tokens, and these are {n_chunks * each}",
            f"Take more chunks: --chunks {-(-_FEWEST // each)}",
        )


def _require_fit(job: JudgeJob, head: LogitsHead) -> None:
    """llama-perplexity itself would say that they do not fit, and go on."""
    vocabulary = n_tokens(job.model)
    if vocabulary not in (None, head.n_vocab):
        why = f"one has a vocabulary of {vocabulary} tokens, the other of {head.n_vocab}"
    elif job.options.n_ctx != head.n_ctx:
        why = f"that was written with chunks of {head.n_ctx} tokens, not {job.options.n_ctx}"
    else:
        return
    raise InvalidDataError(
        f"{job.model.name} cannot be compared with {job.base.name}", why, "Compare a level with the model it was made from."
    )


@contextmanager
def _only_so_many(job: JudgeJob, head: LogitsHead) -> Iterator[tuple[Path, LogitsHead]]:
    """The reference with no more chunks than are wanted, a copy if need be: llama-perplexity compares with all of them."""
    if job.limit is None or job.limit >= head.n_chunks:
        yield job.base, head
        return
    fewer = replace(head, n_chunks=job.limit)
    copy = part_path(job.out)
    require_space(copy, fewer.n_bytes, f"{job.limit} chunks of {job.base.name}")
    try:
        with job.base.open("rb") as source, copy.open("wb") as target:
            target.write(fewer.pack())
            _copy(source, target, head.tokens_at, fewer.rows_at - fewer.tokens_at)
            _copy(source, target, head.rows_at, fewer.n_bytes - fewer.rows_at)
    except OSError as error:
        discard(copy)
        raise from_os_error(error, f"copying {job.base.name}", copy) from error
    try:
        yield copy, fewer
    finally:
        discard(copy)


def _copy(source: IO[bytes], target: IO[bytes], begin: int, n_bytes: int) -> None:
    source.seek(begin)
    while n_bytes and (block := source.read(min(n_bytes, 8 << 20))):
        target.write(block)
        n_bytes -= len(block)


def _whole(part: Path, outcome: Outcome, what: str) -> LogitsHead:
    try:
        return read_head(part)
    except InvalidDataError as error:
        raise _why_not_whole(part, outcome, what, error) from error


def _why_not_whole(part: Path, outcome: Outcome, what: str, error: RunnerError) -> RunnerError:
    """It does not look whether what it writes is written."""
    todo = with_log("Run the same command again.", outcome)
    return full_disk(what, part) or recognise(outcome, what) or EngineError(what, error.why, todo)


def _no_numbers_in(model: Path, chunk: int) -> InvalidDataError:
    """``chunk``: the first that is known to have such logits, from 1."""
    return no_numbers(
        model, f"its logits in the first {chunk} chunks" if chunk > 1 else "its logits in chunk 1", non_finite_tensor(model)
    )


def _name(fraction: float) -> str:
    return _NAMES.get(fraction, f"{100 * fraction:.1f}%")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
