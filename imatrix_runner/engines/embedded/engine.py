"""llama-cpp-python behind the :class:`~imatrix_runner.engines.contract.Engine` contract: one worker process per job."""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from imatrix_runner.engines import protocol
from imatrix_runner.engines.abilities import RangeMeasurer, TokenisedTexts
from imatrix_runner.engines.audit_jobs import AuditJob, TensorFindings
from imatrix_runner.engines.contract import EngineCapabilities, OnRange
from imatrix_runner.engines.cost_jobs import RoundingError, RoundingErrorsJob, TrialResult, TrialsJob
from imatrix_runner.engines.covariance_jobs import CovarianceJob
from imatrix_runner.engines.embedded.bindings import Bindings, worker_command
from imatrix_runner.engines.embedded.native_build import NoNative, compile_kernels
from imatrix_runner.engines.embedded.plan_log import PlanLog
from imatrix_runner.engines.embedded.replies import Replies
from imatrix_runner.engines.files.kernel_proofs import recall_proofs
from imatrix_runner.engines.ftypes import quant_types
from imatrix_runner.engines.jobs import (
    CheckJob,
    ChunkRange,
    CollectedRange,
    CollectJob,
    CollectOptions,
    DryRun,
    Native,
    PartEnd,
    PassedLevel,
    PassedUnit,
    PassFigures,
    PassJob,
    Perplexity,
    PreparedPass,
    QuantizeJob,
)
from imatrix_runner.engines.llama_cpp.flags import quantize_options, split_words
from imatrix_runner.engines.llama_cpp.messages import explain, recognise, with_log
from imatrix_runner.engines.measures import AnswerJob, MeasureJob, ReferenceJob
from imatrix_runner.engines.roundings import STOCK
from imatrix_runner.engines.speed_jobs import SpeedJob, TimedRuns
from imatrix_runner.engines.task_jobs import TaskJob
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
from imatrix_runner.process import Orders, Outcome, Runner
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.pip_install import install_hint
from imatrix_runner.toolchain.quant_type import QuantType

OnErrors = Callable[[int, tuple[RoundingError, ...]], None]
"""Called with the place of a group of tensors in an ordered job, and their errors."""

OnTrial = Callable[[int, TrialResult], None]
"""Called with the place of a trial in an ordered job, and its result."""

_LONGEST_ARGUMENT = 30_000
"""Longer requests (many levels with many --tensor-type) go through a file: Windows takes 32767 characters, Linux 128 KiB."""

_ERRORS: dict[int, type[RunnerError]] = {
    kind.exit_code: kind for kind in (UsageError, ToolchainError, InvalidDataError, NoSpaceError)
}


def _not_measurable(model: Path, types: Sequence[str]) -> InvalidDataError:
    return InvalidDataError(
        f"{model.name} cannot be measured by the embedded engine",
        f"it has tensor types of a fork or an old release, which llama-cpp-python does not know ({', '.join(types)})",
        "Measure it with the programs that made it: imatrix-runner evaluate MODEL --llama-cpp DIRECTORY",
    )


class EmbeddedEngine:
    """Computes inside the libraries that ``bindings`` describe."""

    name = "embedded"
    capabilities = EngineCapabilities(
        loads_each_range=False,
        skips_projection=True,
        scores_tokens=True,
        takes_part_of_reference=True,
        cuts_written_levels=False,
    )

    def __init__(self, bindings: Bindings, runner: Runner, cache: Path | None = None) -> None:
        """``cache``: folder for the compiled native kernels; without it only ggml's are used."""
        self.bindings = bindings
        self._runner = runner
        self._cache = cache

    def identity(self) -> str:
        return self.bindings.identity()

    def arithmetic(self) -> str:
        """The identity, numpy's version (numpy adds up the sums), and a mark where weights cannot be repacked."""
        return f"{self.identity()}, numpy {importlib.metadata.version('numpy')}{self.bindings.repacking.mark}"

    @property
    def types(self) -> tuple[QuantType, ...]:
        return quant_types(self.bindings.ftypes)

    @property
    def devices(self) -> tuple[str, ...]:
        return self.bindings.devices

    def commands(self, job: QuantizeJob) -> tuple[tuple[str, ...], ...]:
        """The commands of llama-quantize and llama-gguf-split that write the same bytes; none for numbers that they do not
        round so."""
        if job.options.rounding != STOCK:
            return ()
        words = ["llama-quantize", *quantize_options(job.options)]
        words += ["--imatrix", job.imatrix.name] if job.imatrix is not None else []
        words += [str(job.source), str(job.out), job.ftype, *([str(job.threads)] if job.threads else [])]
        split = (("llama-gguf-split", *split_words(job)),) if job.shards else ()
        return (*((("cd", str(job.imatrix.parent)),) if job.imatrix is not None else ()), tuple(words), *split)

    def _options(self, options: CollectOptions) -> CollectOptions:
        """A job's options, without repacking where it does not work on this processor."""
        return options if self.bindings.repacking.works else replace(options, repack=False)

    def count_tokens(self, model: Path, text: Path, *, parse_special: bool, log: Path | None) -> int:
        replies = Replies()
        job = protocol.CountTokensJob(model, text, parse_special)
        self._ask(job, replies, log, f"The calibration text {text.name} could not be tokenised")
        return replies.only(protocol.Counted).n_tokens

    def tokenise(self, model: Path, texts: Sequence[str], *, parse_special: bool, log: Path | None) -> TokenisedTexts:
        """The tokens of each text by itself, without those that the vocabulary adds at its ends; and the vocabulary's facts."""
        with scratch_folder() as folder:
            (folder / "texts.json").write_bytes(msgspec.json.encode(list(texts)))
            out = folder / "tokens.npz"
            replies = Replies()
            job = protocol.TokeniseJob(model, folder / "texts.json", out, parse_special)
            self._ask(job, replies, log, "The texts could not be tokenised")
            reply = replies.only(protocol.Tokenized)
            with np.load(out) as arrays:
                bos, eos = (token if token >= 0 else None for token in (reply.bos, reply.eos))
                return TokenisedTexts(
                    n_vocab=reply.n_vocab,
                    special=reply.special,
                    bos=bos,
                    eos=eos,
                    add_bos=reply.add_bos,
                    ids=arrays["ids"],
                    sizes=arrays["sizes"],
                    lengths=arrays["lengths"],
                )

    @property
    def counts_experts(self) -> bool:
        return True

    def collect(self, job: CollectJob, sink: Sink, on_range: OnRange, orders: Orders | None = None) -> None:
        """Compute the job's ranges; of an ordered job those that ``orders`` give, until ``on_range`` returns False."""
        enough = threading.Event()

        def on_reply(reply: protocol.Reply) -> None:
            if isinstance(reply, protocol.Collected) and not enough.is_set() and not on_range(self._collected_range(reply)):
                enough.set()
            elif isinstance(reply, (Progress, Metric, Notice)):
                sink(reply)

        job = replace(job, options=self._options(job.options))
        what = "The imatrix could not be computed"
        self._ask(job, Replies(on_reply), job.log, what, writes=job.folder, enough=enough, orders=orders)

    def _collected_range(self, reply: protocol.Collected) -> CollectedRange:
        chunks, perplexity = ChunkRange(reply.first, reply.count), Perplexity(reply.nll, reply.nll2, reply.scored)
        return CollectedRange(chunks, reply.path, reply.seconds, reply.load_seconds, perplexity, self.bindings.features)

    def require_enough(self, n_chunks: int, n_ctx: int) -> None:
        """Accept any number: two chunks are enough for every figure, and callers never ask for fewer."""

    def make_reference(self, job: ReferenceJob, sink: Sink) -> None:
        """Write the reference's log-probabilities; a stop ends it after the batch, and the same job continues."""
        self._evaluate(job, sink, f"What {job.model.name} predicts could not be computed")

    def measure_level(self, job: MeasureJob, sink: Sink) -> None:
        """Compare a level with the reference; a stop ends it after the batch, and the same job continues."""
        try:
            self._evaluate(job, sink, f"{job.model.name} could not be compared with its source")
        except (EngineError, InvalidDataError, ToolchainError) as error:
            if strange := unknown_types(job.model):
                raise _not_measurable(job.model, strange) from error
            raise

    def _evaluate(self, job: ReferenceJob | MeasureJob, sink: Sink, what: str) -> None:
        replies = Replies(lambda reply: sink(reply) if isinstance(reply, Progress) else None)
        job = replace(job, options=self._options(job.options))
        self._ask(job, replies, job.log, what, writes=job.out, enough=threading.Event())
        if not replies.only(protocol.TokensMeasured).done:
            raise EngineError("The worker ended early", f"{job.out.name} is not complete", "Run the same command again.")

    @property
    def answerer(self) -> EmbeddedEngine:
        return self

    def answer(self, job: AnswerJob, sink: Sink) -> None:
        """Let a model answer prompts; a stop ends it after the current group, and the same job continues."""
        replies = Replies(lambda reply: sink(reply) if isinstance(reply, Progress) else None)
        what = f"{job.model.name} could not answer the prompts"
        job = replace(job, options=self._options(job.options))
        self._ask(job, replies, job.log, what, writes=job.out, enough=threading.Event())
        if not replies.only(protocol.Answered).done:
            raise EngineError("The worker ended early", f"{job.out.name} is not complete", "Run the same command again.")

    @property
    def speed_meter(self) -> EmbeddedEngine:
        return self

    def measure_speed(self, job: SpeedJob, sink: Sink) -> TimedRuns:
        """Time a file, in a process of its own."""
        replies = Replies(lambda reply: sink(reply) if isinstance(reply, Progress) else None)
        job = replace(job, options=self._options(job.options))
        self._ask(job, replies, job.log, f"The speed of {job.model.name} could not be measured", enough=threading.Event())
        timed = replies.only(protocol.Timed)
        if not timed.done:
            raise EngineError("The worker ended early", f"{job.model.name} was not timed", "Run the same command again.")
        return timed.runs

    @property
    def task_answerer(self) -> EmbeddedEngine:
        return self

    def answer_tasks(self, job: TaskJob, sink: Sink) -> None:
        """Compute requests of tasks with a model; a stop ends it after the current batch, and the same job continues."""
        replies = Replies(lambda reply: sink(reply) if isinstance(reply, Progress) else None)
        what = f"{job.model.name} could not compute the tasks"
        job = replace(job, options=self._options(job.options))
        self._ask(job, replies, job.log, what, writes=job.out, enough=threading.Event())
        if not replies.only(protocol.TasksAnswered).done:
            raise EngineError("The worker ended early", f"{job.out.name} is not complete", "Run the same command again.")

    @property
    def range_measurer(self) -> RangeMeasurer | None:
        """Levels are measured one after another, each loaded once."""
        return None

    @property
    def cost_meter(self) -> EmbeddedEngine:
        return self

    def rounding_errors(self, job: RoundingErrorsJob, sink: Sink) -> None:
        """Write the errors of each tensor's numbers; a stop ends it after the current slabs, and the same job continues."""
        self._cost(job, sink, f"The errors of rounding {job.sources[0].name} could not be measured")

    def ordered_errors(self, job: RoundingErrorsJob, sink: Sink, orders: Orders, on_errors: OnErrors) -> None:
        """Measure the groups of tensors of an ordered job that ``orders`` give, until they end. Progress is that of the current
        group; a stop ends it after the current slabs."""

        def on_reply(reply: protocol.Reply) -> None:
            if isinstance(reply, protocol.ErrorsMeasured):
                on_errors(reply.place, reply.errors)
            elif isinstance(reply, Progress):
                sink(reply)

        given = replace(job, native=self._native() if job.native_kernels else None)
        what = f"The errors of rounding {job.sources[0].name} could not be measured"
        self._ask(given, Replies(on_reply), job.log, what, writes=job.out, enough=threading.Event(), orders=orders)

    def trials(self, job: TrialsJob, sink: Sink) -> None:
        """Measure every trial; a stop ends it after the current batch, and the same job continues at that trial."""
        job = replace(job, options=self._options(job.options))
        self._cost(job, sink, f"What rounding tensors of {job.model.name} changes could not be measured")

    def ordered_trials(self, job: TrialsJob, sink: Sink, orders: Orders, on_trial: OnTrial) -> None:
        """Measure the trials of an ordered job that ``orders`` give, until they end; a stop ends it after the current batch."""

        def on_reply(reply: protocol.Reply) -> None:
            if isinstance(reply, protocol.TrialMeasured):
                on_trial(reply.place, reply.result)
            elif isinstance(reply, Progress):
                sink(reply)

        native = self._native() if job.native_kernels else None
        given = replace(job, options=self._options(job.options), native=native)
        what = f"What rounding tensors of {job.model.name} changes could not be measured"
        self._ask(given, Replies(on_reply), job.log, what, writes=job.out, enough=threading.Event(), orders=orders)

    @property
    def covariance_collector(self) -> EmbeddedEngine:
        return self

    def collect_covariances(self, job: CovarianceJob, sink: Sink) -> None:
        """Collect the covariances; a stop ends it after the current batch, and the same job continues."""
        native = self._compiled()
        if isinstance(native, NoNative):
            raise ToolchainError(
                "Covariances cannot be collected",
                f"the kernels that add them up could not be compiled: {native.why}",
                "Install gcc or clang, or name another compiler with CC; --rounding refined needs no covariances.",
            )
        replies = Replies(lambda reply: sink(reply) if isinstance(reply, Progress) else None)
        job = replace(job, options=self._options(job.options), native=native)
        what = f"The covariances of {job.model.name} could not be collected"
        self._ask(job, replies, job.log, what, writes=job.folder, enough=threading.Event())
        if not replies.only(protocol.CovariancesCollected).done:
            raise EngineError("The worker ended early", f"{job.folder.name} is not complete", "Run the same command again.")

    def _cost(self, job: RoundingErrorsJob | TrialsJob, sink: Sink, what: str) -> None:
        replies = Replies(lambda reply: sink(reply) if isinstance(reply, Progress) else None)
        given = replace(job, native=self._native() if job.native_kernels else None)
        try:
            self._ask(given, replies, job.log, what, writes=job.out, enough=threading.Event())
        except InterruptedRunError:
            raise
        except RunnerError:
            if replies.failed is not None or not self._died_in_kernel(job.native_kernels):
                raise
            return self._cost(replace(job, native_kernels=False), sink, what)
        if not replies.only(protocol.Costed).done:
            raise EngineError("The worker ended early", f"{job.out.name} is not complete", "Run the same command again.")
        return None

    def dry_run(self, job: QuantizeJob) -> DryRun:
        (planned,) = self.dry_runs([job], job.log)
        if isinstance(planned, RunnerError):
            raise planned
        return planned

    def dry_runs(self, jobs: Sequence[QuantizeJob], log: Path | None) -> list[DryRun | RunnerError]:
        results: list[DryRun | RunnerError] = []
        while todo := jobs[len(results) :]:
            replies, died = self._plan(todo, log)
            results += replies
            if died is not None:
                deaths = [_death(died, job) for job in todo[len(replies) :]]
                # Another worker continues after the level that killed this one. If it dies alike, the model is the cause.
                alike = bool(results) and all(isinstance(each, RunnerError) and each.why == deaths[0].why for each in results)
                results += deaths if alike else deaths[:1]
        return results

    def _plan(self, jobs: Sequence[QuantizeJob], log: Path | None) -> tuple[list[DryRun | RunnerError], Outcome | None]:
        """One worker's results, in order; and its outcome, with llama.cpp's messages, if it died at the next level."""
        replies, said = Replies(), PlanLog()

        def on_text(stream: str, text: str) -> None:
            replies.feed(stream, text)
            said.feed(stream, text)

        outcome = self._run(protocol.DryRunsJob(tuple(jobs)), on_text, log)
        results: list[DryRun | RunnerError] = []
        for index, reply in enumerate(replies.in_order((protocol.Planned, protocol.Failed))):
            if isinstance(reply, protocol.Planned):
                results.append(DryRun(reply.types, reply.fallbacks, reply.needs_imatrix))
            elif isinstance(reply, protocol.Failed):
                ended = replace(outcome, returncode=reply.exit_code, hung=False, out_of_memory=False)
                results.append(_error(reply, replace(ended, tail=said.about(index))))
        begun = said.levels > len(results) or not results
        return results, replace(outcome, tail=said.about(len(results)) or outcome.tail) if begun and len(results) < len(
            jobs
        ) else None

    @property
    def quantize(self) -> None:
        """:meth:`one_pass` makes levels, also a single one."""
        return None

    def one_pass(self, job: PassJob, sink: Sink) -> tuple[tuple[PassedLevel, ...], PassFigures]:
        """Make all levels of a job in one pass, each with its ledger. A stop leaves work that can be continued. If the library
        aborts the worker on one level, the pass continues with the others in a new worker."""
        spoiled: dict[str, PassedLevel] = {}
        while levels := tuple(level for level in job.levels if level.name not in spoiled):
            replies = Replies(lambda reply: sink(reply) if isinstance(reply, Progress) else None)
            try:
                self._pass(replace(job, levels=levels), replies)
            except InterruptedRunError:
                raise
            except RunnerError:
                lost = {level.name: level for level in replies.passed if level.why}
                if replies.failed is not None or not (lost or self._died_in_kernel(job.native_kernels)):
                    raise
                if not lost:
                    job = replace(job, native_kernels=False)
                spoiled |= lost
                continue
            passed = {level.name: level for level in replies.passed} | spoiled
            if len(replies.figures) != 1 or passed.keys() != {level.name for level in job.levels}:
                why = f"{len(passed)} of {len(job.levels)} levels"
                raise EngineError("The worker ended without a reply", why, "Report it; use --engine binaries.")
            return tuple(passed[level.name] for level in job.levels), replies.figures[0]
        return tuple(spoiled[level.name] for level in job.levels), PassFigures(0, 0, (), 0, 0, 0, 0, 0)

    def prepare_pass(self, job: PassJob) -> PreparedPass:
        """Create the outputs of a pass, or continue them, so that several workers can compute their parts of it."""
        replies = Replies()
        what, writes = "The levels could not be prepared", job.levels[0].job.out
        self._ask(protocol.PreparePassJob(job), replies, job.log, what, writes=writes, enough=threading.Event())
        slab = replies.prepared[-1].slab if replies.prepared else 0
        if not slab:
            raise EngineError("The worker ended without a reply", "it did not prepare the levels", "Report it.")
        return PreparedPass(tuple(work for reply in replies.prepared for work in reply.works), slab)

    def pass_part(
        self, job: PassJob, sink: Sink, on_unit: Callable[[PassedUnit], bool], orders: Orders | None = None
    ) -> PartEnd:
        """Compute the units of a job's part; of an ordered part those that ``orders`` give, until ``on_unit`` returns False.
        Where the library aborted the worker, the returned job goes on with what else was ordered, with new orders."""
        enough = threading.Event()

        def on_reply(reply: protocol.Reply) -> None:
            if isinstance(reply, protocol.UnitPassed) and not enough.is_set() and not on_unit(reply.unit):
                enough.set()
            elif isinstance(reply, Progress):
                sink(reply)

        replies = Replies(on_reply)
        try:
            self._pass(job, replies, enough, orders)
        except InterruptedRunError:
            raise
        except RunnerError:
            lost = {level.name: level for level in replies.passed if level.why}
            if replies.failed is not None or not (lost or self._died_in_kernel(job.native_kernels)):
                raise
            rest = tuple(level for level in job.levels if level.name not in lost)
            return PartEnd(replace(job, levels=rest, native_kernels=job.native_kernels and bool(lost)), tuple(lost.values()))
        return PartEnd(None)

    def _pass(
        self, job: PassJob, replies: Replies, enough: threading.Event | None = None, orders: Orders | None = None
    ) -> None:
        job = replace(job, native=self._native() if job.native_kernels else None)
        writes = job.levels[0].job.out
        what = "The levels could not be made"
        self._ask(job, replies, job.log, what, writes=writes, enough=enough or threading.Event(), orders=orders)

    def _died_in_kernel(self, native_kernels: bool) -> bool:
        """Whether the worker of a job with ``native_kernels`` died while it tested one; ggml's can then do the work."""
        native = self._native() if native_kernels else None
        return native is not None and bool(recall_proofs(native.proofs).trying)

    def _native(self) -> Native | None:
        made = self._compiled()
        return made if isinstance(made, Native) else None

    def _compiled(self) -> Native | NoNative:
        if self._cache is None:
            return NoNative("there is no folder for them")
        return compile_kernels(self._cache, self.bindings.digest)

    def check(self, job: CheckJob, sink: Sink) -> tuple[str, str]:
        """The first invalid tensor and why; both empty if there is none."""
        replies = Replies(lambda reply: sink(reply) if isinstance(reply, Progress) else None)
        self._ask(job, replies, job.log, "A level could not be checked", enough=threading.Event())
        checked = replies.only(protocol.Checked)
        return checked.tensor, checked.why

    @property
    def libraries_digest(self) -> str:
        return self.bindings.digest

    def fp_contract(self) -> str:
        """``off`` where the kernels, which are compiled so, gave ggml's bytes wherever both were compared."""
        native = self._native()
        proofs = recall_proofs(native.proofs) if native is not None else None
        return "off" if proofs is not None and proofs.proven and not proofs.refuted else ""

    def audit_tensors(self, job: AuditJob, sink: Sink) -> tuple[TensorFindings, ...]:
        """Compare tensors of a file with what llama-quantize makes of its source; nothing is written."""
        found: list[TensorFindings] = []

        def on_reply(reply: protocol.Reply) -> None:
            if isinstance(reply, protocol.TensorAudited):
                found.append(reply.found)
            elif isinstance(reply, Progress):
                sink(reply)

        replies, what = Replies(on_reply), f"{job.files[0].name} could not be compared with {job.sources[0].name}"
        given = replace(job, native=self._native() if job.native_kernels else None)
        try:
            self._ask(given, replies, job.log, what, enough=threading.Event())
        except InterruptedRunError:
            raise
        except RunnerError:
            if replies.failed is not None or not self._died_in_kernel(job.native_kernels):
                raise
            return self.audit_tensors(replace(job, native_kernels=False), sink)
        if not replies.only(protocol.Audited).done:
            raise EngineError("The worker ended early", "not every tensor was compared", "Run the same command again.")
        return tuple(found)

    def _run(
        self,
        job: protocol.Job,
        on_text: Callable[[str, str], object],
        log: Path | None,
        enough: threading.Event | None = None,
        orders: Orders | None = None,
    ) -> Outcome:
        command = worker_command(job, self.bindings.library)
        *program, argument = command.argv
        with scratch_folder() as folder:
            if len(argument) > _LONGEST_ARGUMENT:
                file = folder / "job.json"
                file.write_text(argument, encoding="utf-8")
                command = replace(command, argv=(*program, f"@{file}"))
            return self._runner.run(command, log=log, on_text=on_text, enough=enough, orders=orders)

    def _ask(
        self,
        job: protocol.Job,
        replies: Replies,
        log: Path | None,
        what: str,
        *,
        writes: Path | None = None,
        enough: threading.Event | None = None,
        orders: Orders | None = None,
    ) -> None:
        """Run a worker to its end. Raises a ``RunnerError`` for the failure that it reported, or for how it died."""
        outcome = self._run(job, replies.feed, log, enough, orders)
        if outcome.ok:
            return
        # Only llama.cpp's own output: the worker's replies do not contain the reason.
        outcome = replace(outcome, tail=tuple(line for line in outcome.tail if not line.startswith('{"type":')))
        if replies.failed is None:
            raise explain(outcome, what, writes=writes)
        raise _error(replies.failed, outcome, writes)


def _error(failed: protocol.Failed, outcome: Outcome, writes: Path | None = None) -> RunnerError:
    """A worker's reported failure as an error; where it only knows that llama.cpp failed, with llama.cpp's reason."""
    if failed.exit_code == EngineError.exit_code:
        known = recognise(outcome, failed.what, writes=writes)
        return known or EngineError(failed.what, failed.why, with_log(failed.todo, outcome))
    return _ERRORS.get(failed.exit_code, EngineError)(failed.what, failed.why, failed.todo or install_hint())


def _death(outcome: Outcome, job: QuantizeJob) -> RunnerError:
    """The error for a worker that ended while it planned a level."""
    if outcome.ok:
        return EngineError("The worker ended without a reply", f"it did not plan {job.ftype}", "Report it.")
    return explain(outcome, f"llama.cpp cannot plan {job.ftype}")
