"""Describes levels whose numbers are not rounded as llama-quantize does: how, and how they compare with its levels."""

from __future__ import annotations

from collections.abc import Mapping

from imatrix_runner.engines.measures import Estimate
from imatrix_runner.engines.roundings import STOCK
from imatrix_runner.evaluate.mix_verdict import MixVerdict
from imatrix_runner.journal import Journal, StepRecord
from imatrix_runner.mixes.rounding_facts import RoundingFacts, rounding_of_level
from imatrix_runner.quantize.level_facts import MadeFacts
from imatrix_runner.report.document import ReportRounding
from imatrix_runner.steps import step_id


def describe_roundings(
    journal: Journal, levels: Mapping[str, StepRecord], verdicts: Mapping[str, MixVerdict]
) -> dict[str, ReportRounding]:
    """Return the roundings of the ``levels`` that have another than llama-quantize's, by name. ``verdicts``: comparisons with
    measured stock levels that still hold."""
    return {
        name: _rounding(journal, name, record, verdicts.get(name))
        for name, record in levels.items()
        if rounding_of_level(record) != STOCK
    }


def _rounding(journal: Journal, name: str, record: StepRecord, verdict: MixVerdict | None) -> ReportRounding:
    compared = journal.get(step_id("rounding", name))
    kind, refined = rounding_of_level(record), record.facts_as(MadeFacts).without_feedback or ()
    if compared is None:
        return ReportRounding(kind, refined=refined, held_out=verdict)
    facts = compared.facts_as(RoundingFacts)
    ratio = Estimate(facts.ratio, facts.error)
    return ReportRounding(kind, facts.stock, ratio, facts.typical, facts.same_top, refined, verdict)
