"""What the journal knows of finished levels and their measurements, as far as it still holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from imatrix_runner.engines.measures import Divergence, Estimate
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.evaluate.ab_verdict import Comparison
from imatrix_runner.evaluate.answer_agreement import DomainResult
from imatrix_runner.evaluate.equal_size import EqualSizeVerdict
from imatrix_runner.evaluate.mix_verdict import MixVerdict
from imatrix_runner.evaluate.speed_figures import MeasuredSpeed
from imatrix_runner.evaluate.tasks.task_verdict import TaskScores
from imatrix_runner.files import joint_sha256
from imatrix_runner.journal import Journal, StepRecord
from imatrix_runner.steps import LEVEL_INPUT, MODEL_INPUT, Kind, step_id
from imatrix_runner.untrusted import UnreadableError, as_type

T = TypeVar("T")

_ASKED: dict[Kind, str] = {
    "evaluate": "",
    "compare": " --ab",
    "answer": " --domain PROMPTS",
    "alone": " --ab",
    "against": "",
    "speed": " --speed",
    "tasks": " --tasks NAMES",
}
"""By what each is asked for."""

SPEED_OF_SOURCE = "source"
"""The name under which the speed of the source is recorded."""


@dataclass(frozen=True)
class Measured:
    """A level's figures and what they were measured with. ``ppl_ratio``: its perplexity over the source's own, which
    ``divergence.ratio``, as llama-perplexity computes it, takes from a reference that knows no token rarer than e^-16."""

    divergence: Divergence
    ppl_ratio: Estimate
    evaluation: ReportEvaluation


@dataclass(frozen=True)
class Alone:
    """Why a level is not compared with a baseline, as the end of a sentence that begins with its name."""

    why: str


def content_of(record: StepRecord) -> str:
    """Fingerprint of a finished level's files, from their hashes."""
    return joint_sha256([output.sha256 for output in record.outputs])


def levels_made(journal: Journal) -> dict[str, StepRecord]:
    """Every finished level by name, in the order of making; its files may be gone by now."""
    return {name: record for name, record in journal.of_kind("level").items() if record.output}


def measured(journal: Journal) -> dict[str, Measured]:
    """Figures by level, as far as they are those of the files that are there now."""
    return dict(_holding(journal, "evaluate", Measured))


def comparisons(journal: Journal) -> dict[str, Comparison]:
    return dict(_holding(journal, "compare", Comparison))


def alone(journal: Journal) -> dict[str, str]:
    """Reason by level for those that could not be compared with a baseline."""
    return {level: found.why for level, found in _holding(journal, "alone", Alone)}


def mix_verdicts(journal: Journal) -> dict[str, MixVerdict]:
    """Comparisons of mixes with stock levels, by mix; the stock levels may have been made again since."""
    return dict(_holding(journal, "against", MixVerdict))


def answered(journal: Journal) -> dict[str, DomainResult]:
    return dict(_holding(journal, "answer", DomainResult))


def speeds(journal: Journal) -> dict[str, MeasuredSpeed]:
    """The speed of levels by name, as far as they are those of the files that are there now."""
    return dict(_holding(journal, "speed", MeasuredSpeed))


def speed_of_source(journal: Journal, fingerprint: str) -> MeasuredSpeed | None:
    """The speed of the source with this fingerprint; None if it was not measured."""
    record = journal.get(step_id("speed", SPEED_OF_SOURCE))
    if record is None or record.inputs.get(LEVEL_INPUT) != fingerprint:
        return None
    return record.facts_as(MeasuredSpeed)


def scored_on_tasks(journal: Journal) -> dict[str, TaskScores]:
    return dict(_holding(journal, "tasks", TaskScores))


def _holding(journal: Journal, what: Kind, kind: type[T]) -> Iterator[tuple[str, T]]:
    for level, made in levels_made(journal).items():
        record = journal.get(step_id(what, level))
        if record is not None and record.inputs.get(LEVEL_INPUT) == content_of(made):
            try:
                yield level, as_type(record.facts, kind, str_keys=True)
            except UnreadableError as error:
                raise InvalidDataError(
                    f"{journal.path} cannot be read",
                    f"the figures of {level} ({what}) are not what this program wrote: {error}",
                    f"Measure again: imatrix-runner evaluate MODEL --again{_ASKED[what]}",
                ) from error


@dataclass(frozen=True)
class OtherMeasured:
    """A file that was not made here, and how it compares with the levels. ``place``: its path's last part, or its place on a
    hub; ``text``: SHA-256 of the held-out text, of which ``n_chunks`` of ``n_ctx`` tokens were used; ``against``: the mean KLD
    of the levels that it is compared with."""

    name: str
    place: str
    n_bytes: int
    kld: Estimate
    same_top: float
    verdict: EqualSizeVerdict
    text: str
    n_chunks: int
    n_ctx: int
    against: Mapping[str, float]


def others_measured(
    journal: Journal, source: str, klds: Mapping[str, float], text: tuple[str, int, int]
) -> list[OtherMeasured]:
    """The files compared with levels of this source that still have these mean KLDs, on this text (its SHA-256, chunks, and
    tokens of each), the smallest first."""
    found: list[OtherMeasured] = []
    for record in journal.of_kind("other").values():
        other = record.facts_as(OtherMeasured)
        same = record.inputs.get(MODEL_INPUT) == source and (other.text, other.n_chunks, other.n_ctx) == text
        if same and all(klds.get(level) == kld for level, kld in other.against.items()):
            found.append(other)
    return sorted(found, key=lambda each: (each.n_bytes, each.name))


@dataclass(frozen=True)
class ReportEvaluation:
    """The text, chunks and reference with which every level was measured. ``overlap``: share of the text's 13-word stretches
    that also occur in the calibration text; None if that text is not known. ``until``: the share of its mean below which the
    standard error of a level's KLD ended its measurement, so that levels may have different numbers of chunks; None if all were
    measured on the same ones."""

    text: str
    sha256: str
    n_chunks: int
    n_ctx: int
    n_tokens: int
    engine: str
    reference: str
    ppl: Estimate
    overlap: float | None = None
    seconds: float = 0.0
    until: float | None = None
