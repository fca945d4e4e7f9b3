"""llama.cpp's programs behind the :class:`~imatrix_runner.engines.contract.Engine` contract."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import psutil

from imatrix_runner.engines.binaries import perplexity
from imatrix_runner.engines.binaries.handover import Handover
from imatrix_runner.engines.binaries.skeleton import is_yet_to_be_made, make_skeleton
from imatrix_runner.engines.binaries.vocabulary import end_token, ends_texts
from imatrix_runner.engines.contract import EngineCapabilities, OnRange, attempt
from imatrix_runner.engines.jobs import (
    ChunkRange,
    CollectedRange,
    CollectJob,
    CollectOptions,
    DryRun,
    Perplexity,
    Quantized,
    QuantizeJob,
)
from imatrix_runner.engines.llama_cpp.flags import (
    imatrix_command,
    quantize_command,
    require_splitter,
    split_command,
    tokenize_command,
)
from imatrix_runner.engines.llama_cpp.messages import explain, missing_weights, rounded_context
from imatrix_runner.engines.llama_cpp.output import ImatrixOutput, QuantizeOutput, parse_token_ids
from imatrix_runner.engines.measures import Divergence, MeasureJob, ReferenceJob
from imatrix_runner.errors import EngineError, InvalidDataError, RunnerError, from_os_error
from imatrix_runner.events import Metric, Progress, Sink
from imatrix_runner.models.finite import non_finite_error, non_finite_tensor
from imatrix_runner.models.gguf_file import type_id
from imatrix_runner.process import Runner
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.capabilities import Capabilities, capabilities
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.quant_type import QuantType
from imatrix_runner.toolchain.repacking import REPACKS, Repacking
from imatrix_runner.toolchain.store import cache_dir

_AGAIN, _SOON = 3, 10.0
"""llama-imatrix writes its log asynchronously and may lose all of it when it fails at once, as for a model that it cannot load.
If it fails within ``_SOON`` seconds without output, it is run again up to ``_AGAIN`` times to get the reason."""

# tools/imatrix/imatrix.cpp: LOG_ERR of IMatrixCollector::collect_imatrix.
_NON_FINITE = re.compile(r"non-finite values detected in (\S+)")


class BinariesEngine:
    """Drives the programs of one located toolchain through one :class:`~imatrix_runner.process.Runner`.

    Capabilities that their help does not show are tested when first needed, and remembered in ``cache``.
    """

    name = "binaries"
    capabilities = EngineCapabilities(
        loads_each_range=True,
        skips_projection=False,
        scores_tokens=False,
        takes_part_of_reference=False,
        cuts_written_levels=True,
    )

    def __init__(self, toolchain: Toolchain, runner: Runner, repacking: Repacking = REPACKS, cache: Path | None = None) -> None:
        """``repacking``: result of :func:`~imatrix_runner.toolchain.program_proof.prove_programs`."""
        self.toolchain = toolchain
        self._runner = runner
        self._repacking = repacking
        self._cache = cache or cache_dir()

    @cached_property
    def _programs(self) -> Capabilities:
        return capabilities(self.toolchain, self._cache)

    @cached_property
    def _handover(self) -> Handover:
        return Handover(self._programs.reads, self.toolchain.directory)

    def _handed(self, job: QuantizeJob) -> QuantizeJob:
        """The job with its imatrix in the format that llama-quantize reads."""
        return job if job.imatrix is None else replace(job, imatrix=self._handover.path(job.imatrix))

    def identity(self) -> str:
        return self.toolchain.identity()

    def arithmetic(self) -> str:
        return f"{self.identity()}{self._repacking.mark}"

    def _options(self, options: CollectOptions) -> CollectOptions:
        """A job's options, without repacking where it does not work on this processor."""
        return options if self._repacking.works else replace(options, repack=False)

    @property
    def types(self) -> tuple[QuantType, ...]:
        return self.toolchain.types

    @property
    def devices(self) -> tuple[str, ...]:
        return self.toolchain.devices

    def count_tokens(self, model: Path, text: Path, *, parse_special: bool, log: Path | None) -> int:
        """Count with llama-tokenize, which reads the vocabulary only."""
        blocks: list[str] = []

        def keep(stream: str, block: str) -> None:
            if stream == "stdout":
                blocks.append(block)

        with _as_imatrix_reads(text) as prompt:
            command = tokenize_command(model, prompt, self.toolchain, parse_special=parse_special)
            outcome = self._runner.run(command, log=log, on_text=keep)
        if not outcome.ok:
            raise explain(outcome, f"The calibration text {text.name} could not be tokenised")
        try:
            return parse_token_ids("".join(blocks), end_token(model))
        except ValueError as error:
            raise EngineError(
                "llama-tokenize printed no tokens", str(error), "Check the toolchain: imatrix-runner doctor"
            ) from error

    @property
    def counts_experts(self) -> bool:
        return self._programs.counts_experts

    def collect(self, job: CollectJob, sink: Sink, on_range: OnRange) -> None:
        """Run llama-imatrix once per range: its saves during a run are torn, only a completed run can be trusted.

        ``Metric("ppl")`` is the perplexity of the job's chunks so far.
        """
        job = replace(job, options=self._options(job.options))
        done, total = 0, sum(chunks.count for chunks in job.ranges)
        before = Perplexity()
        for chunks in job.ranges:

            def report(within: int, ppl: Perplexity, done: int = done, before: Perplexity = before) -> None:
                if (value := (before + ppl).value) is not None:
                    sink(Metric(job.step, "ppl", value))
                sink(Progress(job.step, done + within, total))

            collected = self._collect_range(job, chunks, report)
            done, before = done + chunks.count, before + collected.perplexity
            if not on_range(collected):
                return

    def _collect_range(self, job: CollectJob, chunks: ChunkRange, report: Callable[[int, Perplexity], None]) -> CollectedRange:
        path = job.folder / chunks.file_name
        part = path.with_name(f"part-{path.name}")  # keeps .gguf: older builds choose the format by it
        output = ImatrixOutput()
        began = time.monotonic()
        loaded_at = began

        def follow(stream: str, block: str) -> None:
            nonlocal loaded_at
            was_loaded = output.loaded
            if not output.feed(stream, block):
                return
            if output.chunk_size not in (None, job.options.n_ctx):
                raise rounded_context("llama-imatrix", job.options.n_ctx, output.chunk_size)
            if output.loaded and not was_loaded:
                loaded_at = time.monotonic()
            if output.non_finite_at:
                seen = f"its logits in chunk {chunks.first + output.non_finite_at}"
                raise non_finite_error(job.model, seen, non_finite_tensor(job.model))
            report(min(output.done, chunks.count), _perplexity(output, job.options))

        command = imatrix_command(job, chunks, part, self.toolchain, ends_texts=ends_texts(job.model))
        outcome = self._runner.run(command, log=job.log, on_text=follow)
        for _ in range(_AGAIN):
            if outcome.returncode <= 0 or outcome.tail or outcome.seconds > _SOON:
                break
            outcome = self._runner.run(command, log=job.log, on_text=follow)
        if not outcome.ok:
            if non_finite := next(filter(None, map(_NON_FINITE.search, outcome.tail)), None):
                seen = f"the activations that {non_finite[1]} meets in the chunks from {chunks.first + output.done + 1} on"
                raise non_finite_error(job.model, seen, non_finite_tensor(job.model))
            error = explain(outcome, "llama-imatrix failed", writes=part)
            # Its log is written asynchronously, and the line with the reason is sometimes lost.
            if isinstance(error, EngineError) and outcome.returncode > 0 and (tensor := non_finite_tensor(job.model)):
                raise non_finite_error(job.model, f"numbers in its tensor {tensor}", "") from error
            raise error
        if output.n_chunks is not None and output.n_chunks != chunks.count:
            raise InvalidDataError(
                f"llama-imatrix computed {output.n_chunks} chunks instead of {chunks.count}",
                "the calibration text is shorter than it was when it was counted",
                "Run the same command again.",
            )
        try:
            part.replace(path)
        except OSError as error:  # llama-imatrix exits with 0 even if it could not write
            raise from_os_error(error, "moving llama-imatrix's output", part) from error
        return CollectedRange(chunks, path, outcome.seconds, loaded_at - began, _perplexity(output, job.options))

    def require_enough(self, n_chunks: int, n_ctx: int) -> None:
        perplexity.require_enough(n_chunks, n_ctx)

    def make_reference(self, job: ReferenceJob, sink: Sink) -> None:
        """Write the reference's log-probabilities, completely or not at all."""
        perplexity.make_reference(replace(job, options=self._options(job.options)), sink, self.toolchain, self._runner)

    def measure_level(self, job: MeasureJob, sink: Sink) -> Divergence:
        """Compare a level with the reference; the figures are those that llama-perplexity prints."""
        return perplexity.measure_level(replace(job, options=self._options(job.options)), sink, self.toolchain, self._runner)

    def dry_run(self, job: QuantizeJob) -> DryRun:
        """The plan of llama-quantize's dry run, or the types that it gives the model's skeleton where it has none."""
        require_splitter(job.options, self.toolchain)
        # A program that reads only the legacy format may insist on data for every weight even in a dry run.
        pending = job.imatrix is not None and self._programs.reads == "dat" and is_yet_to_be_made(job)
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
            return planned  # the sizes of types that only llama-quantize knows stay unknown; its log has the reason

    def _try_skeleton(self, job: QuantizeJob, *, complete: bool = False) -> DryRun:
        """Quantise the skeleton of the job's model, and read types and sizes from the result. ``complete``: use imatrix data
        for every weight, so that the types are known although the real imatrix lacks data."""
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
        """Write a level with llama-quantize; llama-gguf-split then cuts it into shards, where the job wants some."""
        output = QuantizeOutput()

        def follow(stream: str, block: str) -> None:
            if output.feed(stream, block):
                sink(Progress(job.step, output.elements, note=f"{output.index}/{output.total} {output.tensor}"))

        command = quantize_command(self._handed(job), self.toolchain)
        outcome = self._runner.run(command, log=job.log, on_text=follow)
        if not outcome.ok:
            raise explain(outcome, f"llama-quantize failed on {job.ftype}", writes=job.out)
        seconds = outcome.seconds + (self._split(job) if job.shards else 0.0)
        return Quantized(seconds, tuple(output.fallbacks), tuple(output.without_weights))

    def _split(self, job: QuantizeJob) -> float:
        """Cut a written level into shards, and remove it. Returns the seconds."""
        outcome = self._runner.run(split_command(job, self.toolchain), log=job.log)
        if not outcome.ok:
            raise explain(outcome, f"llama-gguf-split failed on {job.ftype}", writes=job.out)
        try:
            job.out.unlink()
        except OSError as error:
            raise from_os_error(error, "removing the level in one file", job.out) from error
        return outcome.seconds

    @property
    def one_pass(self) -> None:
        """llama-quantize writes one level per run."""
        return None

    @property
    def answerer(self) -> None:
        """llama.cpp's programs print the text of an answer, not its tokens."""
        return None

    @property
    def task_answerer(self) -> None:
        """llama.cpp's programs compute their own few tasks only."""
        return None

    @property
    def range_measurer(self) -> None:
        """Levels are measured one after another."""
        return None

    @property
    def cost_meter(self) -> None:
        """llama.cpp's programs cannot change the weights of a loaded model."""
        return None

    @property
    def speed_meter(self) -> None:
        """llama-bench is not among the programs."""
        return None

    @property
    def covariance_collector(self) -> None:
        """llama-imatrix adds up squares, not products."""
        return None

    def commands(self, job: QuantizeJob) -> tuple[tuple[str, ...], ...]:
        split = split_command(job, self.toolchain).typed if job.shards else ()
        if job.imatrix is None or self._programs.reads == "gguf":
            return (*quantize_command(job, self.toolchain).typed, *split)
        legacy = job.imatrix.with_suffix(".dat")
        convert = ("imatrix-runner", "imatrix", "convert", str(job.imatrix), str(legacy))
        return (convert, *quantize_command(replace(job, imatrix=legacy), self.toolchain).typed, *split)


def _perplexity(output: ImatrixOutput, options: CollectOptions) -> Perplexity:
    """From the printed perplexity: the nll of the chunks it covers (four decimals), without its squares."""
    if output.ppl is None or not 0 < output.ppl < math.inf:
        return Perplexity()
    tokens = output.ppl_chunks * options.scored_tokens
    return Perplexity(math.log(output.ppl) * tokens, None, tokens)


@contextmanager
def _as_imatrix_reads(text: Path) -> Iterator[Path]:
    """The text, or a copy without its last newline: llama-imatrix drops one trailing newline of its ``-f`` file, llama-tokenize
    reads every byte, and one token can decide whether the last chunk is complete."""
    data = text.read_bytes()
    if not data.endswith(b"\n"):
        yield text
        return
    with scratch_folder() as folder:
        copy = folder / "text"
        copy.write_bytes(data[:-1])
        yield copy
