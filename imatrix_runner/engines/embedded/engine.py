"""llama-cpp-python behind the :class:`~imatrix_runner.engines.base.Engine` contract: one worker process per job."""

from __future__ import annotations

import importlib.metadata
import shlex
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.base import (
    CheckJob,
    ChunkRange,
    CollectJob,
    CollectOptions,
    DryRun,
    OnePass,
    OnPiece,
    PassedLevel,
    PassFigures,
    PassJob,
    Perplexity,
    Piece,
    Quantized,
    QuantizeJob,
    attempt,
)
from imatrix_runner.engines.binaries.argv import quantize_options
from imatrix_runner.engines.binaries.messages import explain, recognise, with_log
from imatrix_runner.engines.embedded import protocol
from imatrix_runner.engines.embedded.compiled import Native, compile_kernels, recall_proofs
from imatrix_runner.engines.embedded.find import Bindings, worker_command
from imatrix_runner.engines.embedded.levels import quant_types
from imatrix_runner.engines.measures import AnswerJob, JudgeJob, ReferJob
from imatrix_runner.errors import (
    EngineError,
    InterruptedRunError,
    InvalidDataError,
    NoSpaceError,
    RunnerError,
    ToolchainError,
    UsageError,
)
from imatrix_runner.events import Metric, Notice, Progress, Sink
from imatrix_runner.models.gguf_file import unknown_types
from imatrix_runner.process import Outcome, Runner
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.probe import QuantType
from imatrix_runner.untrusted import UnreadableError

_LONGEST_ARGUMENT = 30_000
"""Longer requests (many levels with many --tensor-type) go through a file: Windows takes 32767 letters, Linux 128 KiB."""

_ERRORS: dict[int, type[RunnerError]] = {
    kind.exit_code: kind for kind in (UsageError, ToolchainError, InvalidDataError, NoSpaceError)
}


def _not_measurable(model: Path, types: Sequence[str]) -> InvalidDataError:
    return InvalidDataError(
        f"{model.name} cannot be measured by the embedded engine",
        f"llama-cpp-python's library does not know the tensor types of a fork or an old release ({', '.join(types)})",
        "Measure it with the programs that made it: imatrix-runner evaluate MODEL --llama-cpp DIRECTORY",
    )


@dataclass(frozen=True)
class Tokenised:
    """Tokens of several texts, one after another: ``ids`` int32 [n], ``sizes`` int32 [n] (bytes of each token's piece),
    ``lengths`` int64 [n_texts]; ``vocabulary`` is what the tokenizer knows of itself."""

    vocabulary: protocol.Tokenized
    ids: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]


class EmbeddedEngine:
    """Computes inside the libraries that ``bindings`` describe."""

    name = "embedded"

    def __init__(self, bindings: Bindings, runner: Runner, cache: Path | None = None) -> None:
        """``cache``: where kernels of ours are compiled to; without one ggml's serve alone."""
        self.bindings = bindings
        self._runner = runner
        self._cache = cache

    def identity(self) -> str:
        return self.bindings.identity()

    def arithmetic(self) -> str:
        """With numpy's version, through which the sums go, and a mark where weights cannot be repacked."""
        return f"{self.identity()}, numpy {importlib.metadata.version('numpy')}{self.bindings.repacking.mark}"

    @property
    def types(self) -> tuple[QuantType, ...]:
        return quant_types(self.bindings.ftypes)

    @property
    def devices(self) -> tuple[str, ...]:
        return self.bindings.devices

    def command(self, job: QuantizeJob) -> str:
        """The llama-quantize line that writes the same bytes."""
        words = ["llama-quantize", *quantize_options(job.options)]
        words += ["--imatrix", job.imatrix.name] if job.imatrix is not None else []
        line = shlex.join([*words, str(job.source), str(job.out), job.ftype, *([str(job.threads)] if job.threads else [])])
        return f"cd {shlex.quote(str(job.imatrix.parent))} && {line}" if job.imatrix is not None else line

    def _options(self, options: CollectOptions) -> CollectOptions:
        """As a job has them, but for what does not work on this processor."""
        return options if self.bindings.repacking.works else replace(options, repack=False)

    def count_tokens(self, model: Path, text: Path, *, parse_special: bool, log: Path | None) -> int:
        answers = _Answers()
        request = protocol.Tokenize(model.absolute(), text.absolute(), parse_special)
        self._ask(request, answers, log, f"The calibration text {text.name} could not be tokenised")
        return answers.only(protocol.Counted).n_tokens

    def tokenise(self, model: Path, texts: Sequence[str], *, parse_special: bool, log: Path | None) -> Tokenised:
        """The tokens of each text alone, without what the vocabulary adds at the ends; and what it knows of itself."""
        with scratch_folder() as folder:
            (folder / "texts.json").write_bytes(msgspec.json.encode(list(texts)))
            out = folder / "tokens.npz"
            answers = _Answers()
            request = protocol.TokenizeTexts(model.absolute(), folder / "texts.json", out, parse_special)
            self._ask(request, answers, log, "The texts could not be tokenised")
            told = answers.only(protocol.Tokenized)
            with np.load(out) as arrays:
                return Tokenised(told, arrays["ids"], arrays["sizes"], arrays["lengths"])

    @property
    def counts_experts(self) -> bool:
        return True

    def collect(self, job: CollectJob, sink: Sink, on_piece: OnPiece) -> None:
        enough = threading.Event()

        def hear(answer: protocol.Answer) -> None:
            if isinstance(answer, protocol.Collected) and not enough.is_set() and not on_piece(_piece(answer)):
                enough.set()
            elif isinstance(answer, (Progress, Metric, Notice)):
                sink(answer)

        request = protocol.Collect(
            job.step,
            job.model.absolute(),
            job.text.absolute(),
            tuple((piece.first, piece.count) for piece in job.ranges),
            job.folder.absolute(),
            self._options(job.options),
            job.fingerprint,
        )
        self._ask(request, _Answers(hear), job.log, "The imatrix could not be computed", writes=job.folder, enough=enough)

    def refer(self, job: ReferJob, sink: Sink) -> None:
        """Write the reference's log-probabilities; a stop ends it after the batch, and the same job continues."""
        request = protocol.Refer(
            job.step,
            job.model.absolute(),
            job.text.absolute(),
            job.out.absolute(),
            job.chunks.first,
            job.chunks.count,
            self._options(job.options),
            job.fingerprint,
            (job.scored[0].absolute(), job.scored[1]) if job.scored is not None else None,
        )
        self._evaluate(request, job.log, sink, f"What {job.model.name} predicts could not be computed", job.out)

    def judge(self, job: JudgeJob, sink: Sink) -> None:
        """Compare a level with the reference; a stop ends it after the batch, and the same job continues."""
        model, base, out = job.model.absolute(), job.base.absolute(), job.out.absolute()
        options = self._options(job.options)
        request = protocol.Judge(job.step, model, base, out, job.first, job.limit, options, job.fingerprint)
        try:
            self._evaluate(request, job.log, sink, f"{job.model.name} could not be compared with its source", job.out)
        except (EngineError, InvalidDataError, ToolchainError) as error:
            if strange := unknown_types(job.model):
                raise _not_measurable(job.model, strange) from error
            raise

    def _evaluate(
        self, request: protocol.Refer | protocol.Judge, log: Path | None, sink: Sink, what: str, writes: Path
    ) -> None:
        answers = _Answers(lambda answer: sink(answer) if isinstance(answer, Progress) else None)
        self._ask(request, answers, log, what, writes=writes, enough=threading.Event())
        if not answers.only(protocol.Judged).done:
            raise EngineError("The worker ended early", f"{writes.name} is not complete", "Run the same command again.")

    def answer(self, job: AnswerJob, sink: Sink) -> None:
        """Let a model answer prompts; a stop ends it after the group at work, and the same job continues."""
        model, prompts, out = job.model.absolute(), job.prompts.absolute(), job.out.absolute()
        options = self._options(job.options)
        request = protocol.Generate(job.step, model, prompts, out, job.n_predict, options, job.fingerprint)
        answers = _Answers(lambda answer: sink(answer) if isinstance(answer, Progress) else None)
        what = f"{job.model.name} could not answer the prompts"
        self._ask(request, answers, job.log, what, writes=job.out, enough=threading.Event())
        if not answers.only(protocol.Answered).done:
            raise EngineError("The worker ended early", f"{job.out.name} is not complete", "Run the same command again.")

    def dry_run(self, job: QuantizeJob) -> DryRun:
        answers = _Answers()
        self._ask(_quantize(job, dry_run=True), answers, job.log, f"llama.cpp cannot plan {job.ftype}")
        planned = answers.only(protocol.Planned)
        return DryRun(planned.types, planned.fallbacks, planned.needs_imatrix)

    def dry_runs(self, jobs: Sequence[QuantizeJob], log: Path | None) -> list[DryRun | RunnerError]:
        answers = _Answers()
        request = protocol.Plan(tuple(_quantize(job, dry_run=True) for job in jobs))
        self._run(request, answers, log)
        found = iter(answers.in_order((protocol.Planned, protocol.Failed)))
        return [self._dry_run_or_error(job, next(found, None)) for job in jobs]

    def _dry_run_or_error(self, job: QuantizeJob, answer: protocol.Answer | None) -> DryRun | RunnerError:
        """What failed, or what the worker no longer got to when it died, is asked for alone: that explains it."""
        if isinstance(answer, protocol.Planned):
            return DryRun(answer.types, answer.fallbacks, answer.needs_imatrix)
        return attempt(self, job)

    def quantize(self, job: QuantizeJob, sink: Sink) -> Quantized:
        answers = _Answers(lambda answer: sink(answer) if isinstance(answer, Progress) else None)
        request = _quantize(job, dry_run=False)
        outcome = self._ask(request, answers, job.log, f"llama.cpp failed on {job.ftype}", writes=job.out)
        written = answers.only(protocol.Written)
        return Quantized(outcome.seconds, written.fallbacks, written.without_weights)

    @property
    def one_pass(self) -> OnePass:
        return self._single_pass

    def _single_pass(self, job: PassJob, sink: Sink) -> tuple[tuple[PassedLevel, ...], PassFigures]:
        """Make all levels of a job at once, beside their ledgers. A stop leaves what can be continued; a level on which the
        library gives up (and takes the worker with it) does not take the others with it."""
        spoiled: dict[str, PassedLevel] = {}
        while levels := tuple(level for level in job.levels if level.name not in spoiled):
            answers = _Answers(lambda answer: sink(answer) if isinstance(answer, Progress) else None)
            try:
                self._pass(replace(job, levels=levels), answers)
            except InterruptedRunError:
                raise
            except RunnerError:
                lost = {level.name: level for level in answers.passed if level.why}
                if answers.failed is not None or not (lost or self._died_in_kernel(job)):
                    raise
                if not lost:
                    job = replace(job, own_kernels=False)
                spoiled |= lost
                continue
            told = {level.name: level for level in answers.passed} | spoiled
            if len(answers.figures) != 1 or told.keys() != {level.name for level in job.levels}:
                why = f"{len(told)} of {len(job.levels)} levels"
                raise EngineError("The worker ended without an answer", why, "Report it; use --engine binaries.")
            return tuple(told[level.name] for level in job.levels), answers.figures[0]
        return tuple(spoiled[level.name] for level in job.levels), PassFigures(0, 0, (), 0, 0, 0, 0, 0)

    def _pass(self, job: PassJob, answers: _Answers) -> None:
        request = protocol.Pass(
            job.step,
            job.sources,
            job.levels,
            job.donors,
            job.lineage,
            job.imatrix,
            job.threads,
            job.buffer_bytes,
            self._native() if job.own_kernels else None,
        )
        writes = job.levels[0].job.out
        self._ask(request, answers, job.log, "The levels could not be made", writes=writes, enough=threading.Event())

    def _died_in_kernel(self, job: PassJob) -> bool:
        """Whether a worker that died was trying out a kernel of ours; ggml's do as well."""
        native = self._native() if job.own_kernels else None
        return native is not None and bool(recall_proofs(native.proofs).trying)

    def _native(self) -> Native | None:
        if self._cache is None:
            return None
        made = compile_kernels(self._cache, self.bindings.digest)
        return made if isinstance(made, Native) else None

    def check(self, job: CheckJob, sink: Sink) -> tuple[str, str]:
        """The first tensor that is not right and why; both empty if all are."""
        answers = _Answers(lambda answer: sink(answer) if isinstance(answer, Progress) else None)
        request = protocol.Check(job.step, job.files, job.ledger, job.threads)
        self._ask(request, answers, job.log, "A level could not be read again", enough=threading.Event())
        checked = answers.only(protocol.Checked)
        return checked.tensor, checked.why

    def _run(
        self, request: protocol.Request, answers: _Answers, log: Path | None, enough: threading.Event | None = None
    ) -> Outcome:
        command = worker_command(request, self.bindings.library)
        *program, argument = command.argv
        with scratch_folder() as folder:
            if len(argument) > _LONGEST_ARGUMENT:
                file = folder / "request.json"
                file.write_text(argument, encoding="utf-8")
                command = replace(command, argv=(*program, f"@{file}"))
            return self._runner.run(command, log=log, on_text=answers.feed, enough=enough)

    def _ask(
        self,
        request: protocol.Request,
        answers: _Answers,
        log: Path | None,
        what: str,
        *,
        writes: Path | None = None,
        enough: threading.Event | None = None,
    ) -> Outcome:
        """Run a worker to its end. What it says went wrong, or how it died, becomes an error of ours."""
        outcome = self._run(request, answers, log, enough)
        if outcome.ok:
            return outcome
        # Only what llama.cpp wrote: our own lines say nothing about the reason.
        outcome = replace(outcome, tail=tuple(line for line in outcome.tail if not line.startswith('{"type":')))
        failed = answers.failed
        if failed is None:
            raise explain(outcome, what, writes=writes)
        if failed.exit_code == EngineError.exit_code:
            known = recognise(outcome, failed.what, writes=writes)
            raise known or EngineError(failed.what, failed.why, with_log(failed.todo, outcome))
        raise _ERRORS.get(failed.exit_code, EngineError)(failed.what, failed.why, failed.todo)


class _Answers:
    """Cuts a worker's stdout into answers; keeps what is not told on."""

    def __init__(self, hear: Callable[[protocol.Answer], object] | None = None) -> None:
        self._hear = hear
        self._rest = ""
        self._kept: list[protocol.Answer] = []
        self.failed: protocol.Failed | None = None

    def feed(self, stream: str, text: str) -> None:
        if stream != "stdout":
            return
        *lines, self._rest = (self._rest + text).split("\n")
        if len(self._rest) > protocol.MOST_BYTES:
            raise _not_an_answer(f"a line of more than {protocol.MOST_BYTES} bytes", self._rest)
        for line in lines:
            try:
                answer = protocol.decode_answer(line)
            except UnreadableError as error:
                raise _not_an_answer(str(error), line) from error
            if isinstance(answer, protocol.Failed):
                self.failed = answer
            elif self._hear is not None:
                self._hear(answer)
            self._kept.append(answer)

    def in_order(self, kinds: tuple[type[protocol.Answer], ...]) -> list[protocol.Answer]:
        """The answers of some kinds, as they came."""
        return [answer for answer in self._kept if isinstance(answer, kinds)]

    @property
    def passed(self) -> list[PassedLevel]:
        """The levels of a pass that it told of."""
        return [answer.level for answer in self._kept if isinstance(answer, protocol.Passed) and answer.level is not None]

    @property
    def figures(self) -> list[PassFigures]:
        return [answer.figures for answer in self._kept if isinstance(answer, protocol.Passed) and answer.figures is not None]

    def only(self, kind: type[protocol.AnswerT]) -> protocol.AnswerT:
        """The one answer of a kind that the worker owes."""
        found = [answer for answer in self._kept if isinstance(answer, kind)]
        if len(found) != 1:
            raise EngineError(
                "The worker ended without an answer", f"{len(found)} instead of one", "Report it; use --engine binaries."
            )
        return found[0]


def _not_an_answer(why: str, line: str) -> EngineError:
    return EngineError(
        "The worker's answer could not be read",
        f"{why}: {line[:200]!r}",
        "Use --engine binaries. Another program that prints into this worker's output is the likely cause; if there is none, "
        "report it.",
    )


def _piece(answer: protocol.Collected) -> Piece:
    perplexity = Perplexity(answer.nll, answer.nll2, answer.scored)
    return Piece(ChunkRange(answer.first, answer.count), answer.path, answer.seconds, answer.load_seconds, perplexity)


def _quantize(job: QuantizeJob, *, dry_run: bool) -> protocol.Quantize:
    imatrix = job.imatrix.absolute() if job.imatrix is not None else None
    out = job.out.absolute()
    return protocol.Quantize(job.step, job.source.absolute(), out, job.ftype, job.options, imatrix, job.threads, dry_run)
