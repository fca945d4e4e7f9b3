"""Contracts that only some engines fulfil: tokenise texts, answer prompts, compute requests of tasks, check finished levels,
measure costs of rounding, collect covariances, measure levels in ranges of chunks, compare files with what llama-quantize makes
of their source, time them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from imatrix_runner.engines.audit_jobs import AuditJob, TensorFindings
from imatrix_runner.engines.cost_jobs import RoundingErrorsJob, TrialsJob
from imatrix_runner.engines.covariance_jobs import CovarianceJob
from imatrix_runner.engines.jobs import CheckJob
from imatrix_runner.engines.measures import AnswerJob, RangeScores, RangesJob
from imatrix_runner.engines.speed_jobs import SpeedJob, TimedRuns
from imatrix_runner.engines.task_jobs import TaskJob
from imatrix_runner.events import Sink

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class TokenisedTexts:
    """Tokens of several texts, one after another: ``ids`` int32 [n], ``sizes`` int32 [n] (bytes of each token's piece),
    ``lengths`` int64 [n_texts].

    ``special``: the vocabulary's control tokens, id -> text. ``add_bos``: the vocabulary begins a text with ``bos``.
    """

    n_vocab: int
    special: Mapping[int, str]
    bos: int | None
    eos: int | None
    add_bos: bool
    ids: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]


class TextTokeniser(Protocol):
    """Tokenises texts with a GGUF's own vocabulary."""

    def tokenise(self, model: Path, texts: Sequence[str], *, parse_special: bool, log: Path | None) -> TokenisedTexts:
        """The tokens of each text by itself, without those that the vocabulary adds at its ends."""
        ...


class Answerer(TextTokeniser, Protocol):
    """Lets a model answer prompts, and returns the answers' tokens."""

    def answer(self, job: AnswerJob, sink: Sink) -> None:
        """Write the answers. Progress counts prompts; a stop ends the job where its work can be kept."""
        ...


class TaskAnswerer(Protocol):
    """Computes the requests of tasks with a model."""

    def answer_tasks(self, job: TaskJob, sink: Sink) -> None:
        """Write the outcome of every request. Progress counts requests; a stop ends the job where its work can be kept."""
        ...


class RowChecker(Protocol):
    """Checks a finished output."""

    def check(self, job: CheckJob, sink: Sink) -> tuple[str, str]:
        """The first invalid tensor and why; both empty if there is none."""
        ...


class CostMeter(Protocol):
    """Measures what rounding tensors costs. A stop ends a job where its work can be kept; the same job continues it."""

    def rounding_errors(self, job: RoundingErrorsJob, sink: Sink) -> None:
        """Write the errors of each tensor's numbers to ``job.out``. Progress counts elements, once for each type."""
        ...

    def trials(self, job: TrialsJob, sink: Sink) -> None:
        """Write how far predictions move in each trial to ``job.out``. Progress counts batches of chunks, those of the model as
        it is included."""
        ...


class CovarianceCollector(Protocol):
    """Collects covariances of weights' inputs."""

    def collect_covariances(self, job: CovarianceJob, sink: Sink) -> None:
        """Write a file for each input to ``job.folder``. Progress counts chunks, once for each group of inputs; a stop ends the
        job where its work can be kept."""
        ...


class SpeedMeter(Protocol):
    """Measures how fast a file runs on this machine."""

    def measure_speed(self, job: SpeedJob, sink: Sink) -> TimedRuns:
        """Run the tests of a job. Progress counts repetitions; a stop ends it, and nothing is kept."""
        ...


OnScores = Callable[[RangeScores], None]
"""Called with the scores of each subject on each range, in any order, never by two threads at a time."""


class RangeMeasurer(Protocol):
    """Measures levels in ranges of chunks, several at a time."""

    @property
    def at_once(self) -> int:
        """How many ranges are computed at a time."""
        ...

    def measure_ranges(self, job: RangesJob, sink: Sink, on_scores: OnScores) -> None:
        """Compute every range. Progress counts chunks, those of the source included; a stop ends it, and what was not handed
        over is computed again. Errors of a subject are handed over in place of its scores; those of the source are raised."""
        ...


@runtime_checkable
class TensorAuditor(Protocol):
    """Compares tensors of quantised files with what llama-quantize makes of their source."""

    @property
    def libraries_digest(self) -> str:
        """The SHA-256 over the libraries that compute."""
        ...

    def fp_contract(self) -> str:
        """``off`` where every kernel that was compiled with ``-ffp-contract=off`` and compared with ggml's function gave the
        same bytes, so that ggml's own code fuses nothing that matters; empty where that is not known."""
        ...

    def audit_tensors(self, job: AuditJob, sink: Sink) -> tuple[TensorFindings, ...]:
        """The findings of each tensor, in the job's order. Progress counts the file's elements."""
        ...
