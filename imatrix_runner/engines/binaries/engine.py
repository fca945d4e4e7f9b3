"""llama.cpp's programs behind the :class:`~imatrix_runner.engines.base.Engine` contract."""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import psutil

from imatrix_runner.engines.base import (
    ChunkRange,
    CollectJob,
    CollectOptions,
    DryRun,
    OnPiece,
    Perplexity,
    Piece,
    Quantized,
    QuantizeJob,
    attempt,
)
from imatrix_runner.engines.binaries import perplexity
from imatrix_runner.engines.binaries.argv import imatrix_command, quantize_command, tokenize_command
from imatrix_runner.engines.binaries.handover import Handover
from imatrix_runner.engines.binaries.lines import ImatrixOutput, QuantizeOutput, parse_token_ids
from imatrix_runner.engines.binaries.messages import explain, missing_weights, rounded_context
from imatrix_runner.engines.binaries.skeleton import is_yet_to_be_made, make_skeleton
from imatrix_runner.engines.binaries.vocabulary import end_token, ends_texts
from imatrix_runner.engines.measures import Divergence, JudgeJob, ReferJob
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, from_os_error
from imatrix_runner.events import Metric, Progress, Sink
from imatrix_runner.models.finite import no_numbers, non_finite_tensor
from imatrix_runner.models.gguf_file import type_id
from imatrix_runner.process import Runner
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.capabilities import Capabilities, capabilities
from imatrix_runner.toolchain.probe import QuantType, Toolchain
from imatrix_runner.toolchain.repacking import REPACKS, Repacking
from imatrix_runner.toolchain.store import cache_dir

_AGAIN, _SOON = 3, 10.0
"""llama-imatrix writes its log asynchronously and may lose all of it when it fails at once, as for a model that it cannot load.
One that failed within so many seconds without a word is asked again so many times for its reason."""

# tools/imatrix/imatrix.cpp: LOG_ERR of IMatrixCollector::collect_imatrix.
_NON_FINITE = re.compile(r"non-finite values detected in (\S+)")


class BinariesEngine:
    """Drives the programs of one located toolchain through one :class:`~imatrix_runner.process.Runner`.

    What they can do beyond what their help says is found out when it first matters, and remembered in ``cache``.
    """

    name = "binaries"

    def __init__(self, toolchain: Toolchain, runner: Runner, repacking: Repacking = REPACKS, cache: Path | None = None) -> None:
        """``repacking``: what the programs proved (:func:`~imatrix_runner.toolchain.program_proof.prove_programs`)."""
        self.toolchain = toolchain
        self._runner = runner
        self._repacking = repacking
        self._cache = cache or cache_dir()

    @cached_property
    def capabilities(self) -> Capabilities:
        return capabilities(self.toolchain, self._cache)

    @cached_property
    def _handover(self) -> Handover:
        return Handover(self.capabilities.reads, self.toolchain.directory)

    def _handed(self, job: QuantizeJob) -> QuantizeJob:
        """The job with its imatrix in the format that llama-quantize reads."""
        return job if job.imatrix is None else replace(job, imatrix=self._handover.path(job.imatrix))

    def identity(self) -> str:
        return self.toolchain.identity()

    def arithmetic(self) -> str:
        return f"{self.identity()}{self._repacking.mark}"

    def _options(self, options: CollectOptions) -> CollectOptions:
        """As a job has them, but for what does not work on this processor."""
        return options if self._repacking.works else replace(options, repack=False)

    @property
    def types(self) -> tuple[QuantType, ...]:
        return self.toolchain.types

    @property
    def devices(self) -> tuple[str, ...]:
        return self.toolchain.devices

    def count_tokens(self, model: Path, text: Path, *, parse_special: bool, log: Path | None) -> int:
        """Count with llama-tokenize, which reads the vocabulary only."""
        pieces: list[str] = []

        def keep(stream: str, piece: str) -> None:
            if stream == "stdout":
                pieces.append(piece)

        with _as_imatrix_reads(text) as prompt:
            command = tokenize_command(model, prompt, self.toolchain, parse_special=parse_special)
            outcome = self._runner.run(command, log=log, on_text=keep)
        if not outcome.ok:
            raise explain(outcome, f"The calibration text {text.name} could not be tokenised")
        try:
            return parse_token_ids("".join(pieces), end_token(model))
        except ValueError as error:
            raise EngineError(
                "llama-tokenize gave no tokens", str(error), "Check the toolchain: imatrix-runner doctor"
            ) from error

    @property
    def counts_experts(self) -> bool:
        return self.capabilities.counts_experts

    def collect(self, job: CollectJob, sink: Sink, on_piece: OnPiece) -> None:
        """One llama-imatrix for each range: its own mid-run saves are torn, only a run that ended well can be trusted.

        Told ``Metric("ppl")`` is the perplexity of the job's chunks so far.
        """
        job = replace(job, options=self._options(job.options))
        done, total = 0, sum(chunks.count for chunks in job.ranges)
        before = Perplexity()
        for chunks in job.ranges:

            def tell(within: int, ppl: Perplexity, done: int = done, before: Perplexity = before) -> None:
                if (value := (before + ppl).value) is not None:
                    sink(Metric(job.step, "ppl", value))
                sink(Progress(job.step, done + within, total))

            piece = self._collect_range(job, chunks, tell)
            done, before = done + chunks.count, before + piece.perplexity
            if not on_piece(piece):
                return

    def _collect_range(self, job: CollectJob, chunks: ChunkRange, tell: Callable[[int, Perplexity], None]) -> Piece:
        path = job.folder / chunks.file_name
        part = path.with_name(f"part-{path.name}")  # .gguf still: older builds choose the format by it
        output = ImatrixOutput()
        began = time.monotonic()
        loaded_at = began

        def follow(stream: str, piece: str) -> None:
            nonlocal loaded_at
            was_loaded = output.loaded
            if not output.feed(stream, piece):
                return
            if output.chunk_size not in (None, job.options.n_ctx):
                raise rounded_context("llama-imatrix", job.options.n_ctx, output.chunk_size)
            if output.loaded and not was_loaded:
                loaded_at = time.monotonic()
            if output.wild:
                seen = f"its logits in chunk {chunks.first + output.wild}"
                raise no_numbers(job.model, seen, non_finite_tensor(job.model))
            tell(min(output.done, chunks.count), _perplexity(output, job.options))

        command = imatrix_command(job, chunks, part, self.toolchain, ends_texts=ends_texts(job.model))
        outcome = self._runner.run(command, log=job.log, on_text=follow)
        for _ in range(_AGAIN):
            if outcome.returncode <= 0 or outcome.tail or outcome.seconds > _SOON:
                break
            outcome = self._runner.run(command, log=job.log, on_text=follow)
        if not outcome.ok:
            if wild := next(filter(None, map(_NON_FINITE.search, outcome.tail)), None):
                seen = f"the activations that {wild[1]} meets in the chunks from {chunks.first + output.done + 1} on"
                raise no_numbers(job.model, seen, non_finite_tensor(job.model))
            error = explain(outcome, "llama-imatrix failed", writes=part)
            # Its log is written asynchronously: the line that says so is lost now and then.
            if isinstance(error, EngineError) and outcome.returncode > 0 and (tensor := non_finite_tensor(job.model)):
                raise no_numbers(job.model, f"numbers in its tensor {tensor}", "") from error
            raise error
        if output.n_chunks is not None and output.n_chunks != chunks.count:
            raise InvalidDataError(
                f"llama-imatrix computed {output.n_chunks} chunks instead of {chunks.count}",
                "the calibration text is shorter than it was when it was counted",
                "Run the same command again.",
            )
        try:
            part.replace(path)
        except OSError as error:  # it does not mind when it cannot write
            raise from_os_error(error, "looking for what llama-imatrix wrote", part) from error
        return Piece(chunks, path, outcome.seconds, loaded_at - began, _perplexity(output, job.options))

    def refer(self, job: ReferJob, sink: Sink) -> None:
        """Write the reference's log-probabilities, whole or not at all."""
        perplexity.refer(replace(job, options=self._options(job.options)), sink, self.toolchain, self._runner)

    def judge(self, job: JudgeJob, sink: Sink) -> Divergence:
        """Compare a level with the reference: the figures are what llama-perplexity prints of them."""
        return perplexity.judge(replace(job, options=self._options(job.options)), sink, self.toolchain, self._runner)

    def dry_run(self, job: QuantizeJob) -> DryRun:
        """What llama-quantize says itself, or what it makes of the model's skeleton where it cannot say."""
        # A program that reads only the legacy format may insist on every weight even when it plans.
        pending = job.imatrix is not None and self.capabilities.reads == "dat" and is_yet_to_be_made(job)
        if pending or not self.toolchain.knows("llama-quantize", "--dry-run"):
            return replace(self._try_skeleton(job), certain=False)
        output = QuantizeOutput()
        command = quantize_command(self._handed(job), self.toolchain, dry_run=True)
        outcome = self._runner.run(command, log=job.log, on_text=output.feed)
        if not outcome.ok:
            if job.imatrix is not None and (name := missing_weights(outcome)):
                return replace(self._try_skeleton(job, complete=True), certain=False, required=(name,))
            raise explain(outcome, f"llama-quantize cannot plan {job.ftype}")
        planned = output.as_dry_run()
        if all(type_id(kind) is not None for kind in planned.types.values()):
            return planned
        try:
            return replace(planned, row_bytes=self._try_skeleton(job).row_bytes)
        except (EngineError, InvalidDataError):
            return planned  # the sizes of the types that only it knows stay unknown; its log says why

    def _try_skeleton(self, job: QuantizeJob, *, complete: bool = False) -> DryRun:
        """Quantise the skeleton of the job's model, and read the types and sizes off the result. ``complete``: with imatrix
        data for every weight, so that its types can be told although data is missing."""
        with scratch_folder() as folder:
            skeleton = make_skeleton(job, folder, complete=complete)
            output = QuantizeOutput()
            outcome = self._runner.run(quantize_command(skeleton.job, self.toolchain), log=job.log, on_text=output.feed)
            if not outcome.ok:
                if job.imatrix is not None and not complete and (name := missing_weights(outcome)):
                    return replace(self._try_skeleton(job, complete=True), required=(name,))
                raise explain(outcome, f"llama-quantize cannot plan {job.ftype}", writes=skeleton.job.out)
            planned = output.as_dry_run()
            return replace(planned, row_bytes=skeleton.row_bytes(planned.types))

    def dry_runs(self, jobs: Sequence[QuantizeJob], log: Path | None) -> list[DryRun | RunnerError]:
        with ThreadPoolExecutor(max_workers=psutil.cpu_count() or 1) as pool:
            return list(pool.map(lambda job: attempt(self, replace(job, log=log)), jobs))

    def quantize(self, job: QuantizeJob, sink: Sink) -> Quantized:
        output = QuantizeOutput()

        def follow(stream: str, piece: str) -> None:
            if output.feed(stream, piece):
                sink(Progress(job.step, output.elements, note=f"{output.index}/{output.total} {output.tensor}"))

        command = quantize_command(self._handed(job), self.toolchain)
        outcome = self._runner.run(command, log=job.log, on_text=follow)
        if not outcome.ok:
            raise explain(outcome, f"llama-quantize failed on {job.ftype}", writes=job.out)
        return Quantized(outcome.seconds, tuple(output.fallbacks), tuple(output.without_weights))

    @property
    def one_pass(self) -> None:
        """llama-quantize writes one level per run."""
        return None

    def command(self, job: QuantizeJob) -> str:
        if job.imatrix is None or self.capabilities.reads == "gguf":
            return str(quantize_command(job, self.toolchain))
        legacy = job.imatrix.with_suffix(".dat")
        convert = ["imatrix-runner", "imatrix", "convert", str(job.imatrix), str(legacy)]
        return f"{shlex.join(convert)} && {quantize_command(replace(job, imatrix=legacy), self.toolchain)}"


def _perplexity(output: ImatrixOutput, options: CollectOptions) -> Perplexity:
    """What the printed value says: the mean nll of the chunks it covers (to four decimals), not how it varies."""
    if output.ppl is None or not 0 < output.ppl < math.inf:
        return Perplexity()
    tokens = output.ppl_chunks * options.scored_tokens
    return Perplexity(math.log(output.ppl) * tokens, None, tokens)


@contextmanager
def _as_imatrix_reads(text: Path) -> Iterator[Path]:
    """llama-imatrix drops one trailing newline of its ``-f`` file, llama-tokenize reads every byte; one token can decide
    whether the last chunk is whole."""
    data = text.read_bytes()
    if not data.endswith(b"\n"):
        yield text
        return
    with scratch_folder() as folder:
        copy = folder / "text"
        copy.write_bytes(data[:-1])
        yield copy
