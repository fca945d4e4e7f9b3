"""The contract between the rooms that plan work and the engines that compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from imatrix_runner.engines.jobs import (
    CollectedRange,
    CollectJob,
    DryRun,
    PassedLevel,
    PassFigures,
    PassJob,
    Quantized,
    QuantizeJob,
)
from imatrix_runner.errors import InterruptedRunError, RunnerError
from imatrix_runner.events import Sink
from imatrix_runner.toolchain.quant_type import QuantType

if TYPE_CHECKING:
    from imatrix_runner.engines.abilities import (
        Answerer,
        CostMeter,
        CovarianceCollector,
        RangeMeasurer,
        SpeedMeter,
        TaskAnswerer,
    )
    from imatrix_runner.engines.measures import Divergence, MeasureJob, ReferenceJob

OnRange = Callable[[CollectedRange], bool]
"""Called after each finished range, in order; return False to end the job early."""

OneLevel = Callable[[QuantizeJob, Sink], Quantized]
"""Writes one level."""

OnePass = Callable[[PassJob, Sink], tuple[tuple[PassedLevel, ...], PassFigures]]
"""Writes all levels of a job, each with its ledger in its folder; after a stop the same job continues from what is done."""


def attempt(engine: Engine, job: QuantizeJob) -> DryRun | RunnerError:
    """Return the result of one dry run, or the error it raised; an interruption is raised."""
    try:
        return engine.dry_run(job)
    except InterruptedRunError:
        raise
    except RunnerError as error:
        return error


@dataclass(frozen=True)
class EngineCapabilities:
    """How an engine works, where engines differ. Callers decide by these flags, never by the engine's name.

    ``loads_each_range``: the model is loaded again for every range of chunks. ``skips_projection``: the output projection is
    not computed where no perplexity is wanted. ``scores_tokens``: :meth:`Engine.measure_level` writes the scores of every
    token, so that a reference may hold part of the text and a measurement can be continued; otherwise it returns the figures
    for the whole text. ``takes_part_of_reference``: it can compare with the first chunks of a reference without a copy.
    ``cuts_written_levels``: a level that becomes shards is first written in one file."""

    loads_each_range: bool
    skips_projection: bool
    scores_tokens: bool
    takes_part_of_reference: bool
    cuts_written_levels: bool


class Engine(Protocol):
    """Computes in child processes. Raises :class:`~imatrix_runner.errors.EngineError` or a more specific ``RunnerError``."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> EngineCapabilities: ...

    def identity(self) -> str:
        """The program, version and build: part of every fingerprint, because other builds may give other bytes."""
        ...

    def count_tokens(self, model: Path, text: Path, *, parse_special: bool, log: Path | None) -> int:
        """Tokens of ``text`` as the model's own tokenizer and the collector see them (BOS included)."""
        ...

    def arithmetic(self) -> str:
        """The identity, and everything else that the sums of an imatrix depend on."""
        ...

    @property
    def types(self) -> tuple[QuantType, ...]:
        """Every quantisation type that the engine can make, under llama-quantize's names."""
        ...

    @property
    def devices(self) -> tuple[str, ...]:
        """The GPUs that the engine sees, one line each."""
        ...

    @property
    def counts_experts(self) -> bool:
        """Whether a collected imatrix has a token count per expert, and keeps a tensor although one of its experts saw none."""
        ...

    def collect(self, job: CollectJob, sink: Sink, on_range: OnRange) -> None:
        """Compute the job's ranges. Progress counts chunks of the whole job; a stop ends it where its work can be kept."""
        ...

    def require_enough(self, n_chunks: int, n_ctx: int) -> None:
        """Raise :class:`~imatrix_runner.errors.InvalidDataError` if there are too few chunks to compute the figures."""
        ...

    def make_reference(self, job: ReferenceJob, sink: Sink) -> None:
        """Write the source's log-probabilities. Progress counts chunks; a stop ends it where its work can be kept."""
        ...

    def measure_level(self, job: MeasureJob, sink: Sink) -> Divergence | None:
        """Compare a level with the source. Returns the figures, or None where the scores of every token are in ``job.out``
        (:func:`~imatrix_runner.engines.files.token_scores.read_token_scores`)."""
        ...

    def dry_run(self, job: QuantizeJob) -> DryRun: ...

    def dry_runs(self, jobs: Sequence[QuantizeJob], log: Path | None) -> list[DryRun | RunnerError]:
        """Several dry runs together, cheaper than one by one. Returns for each job its result or its error."""
        ...

    @property
    def one_pass(self) -> OnePass | None:
        """Makes many levels from one reading of the model; None where :attr:`quantize` makes them one by one."""
        ...

    @property
    def quantize(self) -> OneLevel | None:
        """Makes one level; None where :attr:`one_pass` makes all of them."""
        ...

    @property
    def answerer(self) -> Answerer | None:
        """Lets models answer prompts; None where the engine cannot return the answers' tokens."""
        ...

    @property
    def task_answerer(self) -> TaskAnswerer | None:
        """Computes the requests of tasks; None where the engine cannot."""
        ...

    @property
    def cost_meter(self) -> CostMeter | None:
        """Measures what rounding tensors costs; None where the engine cannot."""
        ...

    @property
    def covariance_collector(self) -> CovarianceCollector | None:
        """Collects covariances of weights' inputs; None where the engine cannot."""
        ...

    @property
    def speed_meter(self) -> SpeedMeter | None:
        """Measures how fast files run; None where the engine cannot."""
        ...

    @property
    def range_measurer(self) -> RangeMeasurer | None:
        """Measures levels in ranges of chunks; None where they are measured one after another, each in one job."""
        ...

    def commands(self, job: QuantizeJob) -> tuple[tuple[str, ...], ...]:
        """Commands for llama.cpp's programs that produce the same file, in order; they go into the journal."""
        ...
