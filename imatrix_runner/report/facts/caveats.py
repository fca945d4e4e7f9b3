"""Sentences without which a report's figures would mislead: what source they are relative to, and on what text."""

from __future__ import annotations

from collections.abc import Sequence

from imatrix_runner.evaluate.mix_verdict import describe
from imatrix_runner.evaluate.recommendations import Measure, unfit
from imatrix_runner.files import sha256
from imatrix_runner.report.document import Report, source_kind
from imatrix_runner.resources import CALIBRATION_TEXT, HELD_OUT_TEXT, resource


def caveats(report: Report, measures: Sequence[Measure]) -> tuple[str, ...]:
    """The caveats of a report, a sentence or two each. ``measures``: the candidates for recommendations."""
    found = [_quantised_source(report), unfit(measures), *_lost_mixes(report), _alarms(report), _other_text(report)]
    return tuple(sentence for sentence in found if sentence)


def _quantised_source(report: Report) -> str:
    model = report.model
    if report.evaluation is None or not (model.quantised or model.dequantised):
        return ""
    return (
        f"The source is {source_kind(model)}: every figure is a distance from that, not from the original model. The source's "
        "own distance from the original comes on top."
    )


def _lost_mixes(report: Report) -> list[str]:
    verdicts = [level.against.held_out for level in report.levels if level.against is not None and not level.same_as]
    text = report.evaluation.text if report.evaluation is not None else ""
    return [describe(verdict, text) for verdict in verdicts if verdict is not None and not verdict.is_better]


def _alarms(report: Report) -> str:
    """The caveat for levels that lost too much on a task, whatever their KLD; empty if there is none."""
    lost = [(scores.level, each) for scores in report.tasks for each in scores.comparisons if each.is_alarm and not each.part]
    found = [
        f"{level} on {each.task}" + (f" ({100 * each.difference.value:+.1f} points)" if each.lost is not None else "")
        for level, each in lost
    ]
    return f"Alarm: much less is right than with the source: {'; '.join(found)}." if found else ""


def _other_text(report: Report) -> str:
    """The caveat for figures measured on the shipped prose with an imatrix of another text; empty otherwise."""
    calibration = report.imatrix.calibration if report.imatrix is not None else None
    evaluation = report.evaluation
    if calibration is None or evaluation is None or evaluation.sha256 != sha256(resource(HELD_OUT_TEXT)):
        return ""
    if calibration.sha256 == sha256(resource(CALIBRATION_TEXT)):
        return ""
    return (
        f"The imatrix was collected from {calibration.name}, and the figures were measured on the shipped prose: what they say "
        f"of levels and imatrix may not hold for texts like {calibration.name}. Measure on such a text with --text."
    )
