"""Sentences without which a report's figures would mislead: what they are distances from, and what they were measured on."""

from __future__ import annotations

from collections.abc import Sequence

from imatrix_runner.evaluate.picks import Measure, unfit
from imatrix_runner.files import sha256
from imatrix_runner.report.document import Report
from imatrix_runner.report.provenance import source_kind
from imatrix_runner.resources import CALIBRATION_TEXT, HELD_OUT_TEXT, resource


def caveats(report: Report, measures: Sequence[Measure]) -> tuple[str, ...]:
    """What must be said of the figures, a sentence or two each; ``measures`` are those that were to be recommended from."""
    found = [_quantised_source(report), unfit(measures), _other_text(report)]
    return tuple(sentence for sentence in found if sentence)


def _quantised_source(report: Report) -> str:
    model = report.model
    if report.evaluation is None or not (model.quantised or model.dequantised):
        return ""
    return (
        f"The source is {source_kind(model)}: every figure is a distance from that, not from the original model. The source's "
        "own distance from the original comes on top."
    )


def _other_text(report: Report) -> str:
    """For figures from the shipped prose although the imatrix is of a text with a subject of its own."""
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
