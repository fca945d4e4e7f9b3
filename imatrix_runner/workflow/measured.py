"""What the journal keeps of measurements, and whether it still holds.

Steps: ``reference FIRST-END`` (a pass over these chunks of the source), ``evaluate LEVEL`` (facts: :class:`Measured`),
``compare LEVEL`` (:class:`~imatrix_runner.evaluate.twins.Comparison`), ``alone LEVEL`` (why it has no twin), ``answer LEVEL``
(:class:`~imatrix_runner.evaluate.answers.DomainResult`). All but the first name the content of the level's file among their
inputs (:data:`LEVEL_INPUT`): a level that was made again has no figures until it is measured again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from imatrix_runner.engines.measures import Divergence, Estimate
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.evaluate.answers import DomainResult
from imatrix_runner.evaluate.twins import Comparison
from imatrix_runner.files import joint_sha256
from imatrix_runner.journal import Journal, Record
from imatrix_runner.report.document import ReportEvaluation
from imatrix_runner.untrusted import UnreadableError, as_type

LEVEL_INPUT = "level file"
EVALUATE, COMPARE, ANSWER, REFER, ALONE = "evaluate", "compare", "answer", "reference", "alone"
T = TypeVar("T")

_ASKED = {EVALUATE: "", COMPARE: " --ab", ANSWER: " --domain PROMPTS", ALONE: " --ab"}
"""By what each is asked for."""


@dataclass(frozen=True)
class Measured:
    """A level's figures and what they were measured with. ``ppl_ratio``: its perplexity over the source's own, which
    ``divergence.ratio``, as llama-perplexity computes it, takes from a reference that knows no token rarer than e^-16."""

    divergence: Divergence
    ppl_ratio: Estimate
    evaluation: ReportEvaluation


@dataclass(frozen=True)
class Alone:
    """Why a level is not compared with one made without imatrix, as the rest of a sentence about it."""

    why: str


def content_of(record: Record) -> str:
    """The content of a finished level's files, from their hashes."""
    return joint_sha256([output.sha256 for output in record.outputs])


def as_facts(value: Any) -> dict[str, object]:
    """A value as a record's facts."""
    facts: dict[str, object] = msgspec.to_builtins(value, str_keys=True)
    return facts


def levels_made(journal: Journal) -> dict[str, Record]:
    """Every level that was ever finished, by name, in the order of making; the files may be gone since."""
    return {
        step.removeprefix("level-"): record
        for step, record in journal.steps().items()
        if step.startswith("level-") and record.output
    }


def measured(journal: Journal) -> dict[str, Measured]:
    """The levels whose figures still hold."""
    return dict(_holding(journal, EVALUATE, Measured))


def comparisons(journal: Journal) -> dict[str, Comparison]:
    return dict(_holding(journal, COMPARE, Comparison))


def alone(journal: Journal) -> dict[str, str]:
    """Levels that were to be compared with one made without imatrix and could not be, and why."""
    return {level: found.why for level, found in _holding(journal, ALONE, Alone)}


def answered(journal: Journal) -> dict[str, DomainResult]:
    return dict(_holding(journal, ANSWER, DomainResult))


def _holding(journal: Journal, what: str, kind: type[T]) -> Iterator[tuple[str, T]]:
    for level, made in levels_made(journal).items():
        record = journal.get(f"{what} {level}")
        if record is not None and record.inputs.get(LEVEL_INPUT) == content_of(made):
            try:
                yield level, as_type(record.facts, kind, str_keys=True)
            except UnreadableError as error:
                raise InvalidDataError(
                    f"{journal.path} cannot be read",
                    f"the figures of {level} ({what}) are not what this program wrote: {error}",
                    f"Measure again: imatrix-runner evaluate MODEL --again{_ASKED[what]}",
                ) from error
