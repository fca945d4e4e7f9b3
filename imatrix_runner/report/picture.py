"""``report.png``: the one picture that a model card shows."""

from __future__ import annotations

from typing import Final

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.report import wording
from imatrix_runner.report.colours import palette, resolved
from imatrix_runner.report.document import Report
from imatrix_runner.report.pareto import pareto

_WIDTH, _HEIGHT, _SCALE = 800, 500, 2
_LEFT, _TITLE = 80, 130
"""What axes and title take of the picture's width and height, about."""
_FONT: Final = "Helvetica, Arial, sans-serif"


def render_png(report: Report) -> bytes:
    """Sizes against KLD, 1600 x 1000 pixels, with every level's name that has room. Needs a measured level."""
    import vl_convert

    chart = pareto(report, width=_WIDTH - _LEFT, height=_HEIGHT - _TITLE)
    if chart is None:
        raise InvalidDataError(
            "There is nothing to draw", "no level of this workspace is measured", "Measure: imatrix-runner evaluate MODEL"
        )
    tokens = report.evaluation.n_tokens if report.evaluation is not None else 0
    told = f" on {tokens:,} tokens of {wording.shown(report.evaluation.text, 60)}" if report.evaluation is not None else ""
    chart |= {
        "width": _WIDTH,
        "height": _HEIGHT,
        "autosize": {"type": "fit", "contains": "padding"},
        "padding": 20,
        "background": palette()["paper"],
        "title": {
            "text": f"{wording.shown(report.model.name, 60)}: what each level costs",
            "subtitle": f"Mean KLD from the {wording.shown(report.model.type, 20)} source{told}; lower left is better",
            "offset": 14,
        },
    }
    chart["config"] = {**chart["config"], "font": _FONT}
    return vl_convert.vegalite_to_png(resolved(chart), scale=_SCALE)
