"""All forms of a report by the names of their files: a page, a model card, a picture, and the document itself."""

from __future__ import annotations

from typing import Final

from imatrix_runner.report.document import Report, encode_report

JSON: Final = "report.json"
HTML: Final = "report.html"
MARKDOWN: Final = "report.md"
PICTURE: Final = "report.png"
NAMES = (JSON, HTML, MARKDOWN, PICTURE)

_LEAST_POINTS = 2
"""Fewest measured levels for which a picture is drawn."""


def form_names(report: Report) -> tuple[str, ...]:
    """The names of a report's files; without the picture if too little was measured."""
    drawn = sum(level.measured is not None for level in report.rows) >= _LEAST_POINTS
    return NAMES if drawn else tuple(name for name in NAMES if name != PICTURE)


def render_forms(report: Report) -> dict[str, bytes]:
    """The contents of a report's files by name. Views are imported here because charts take a while to load."""
    from imatrix_runner.report.views.card import render_card
    from imatrix_runner.report.views.page import render_html

    files = {HTML: render_html(report).encode(), MARKDOWN: render_card(report).encode(), JSON: encode_report(report)}
    if PICTURE in form_names(report):
        from imatrix_runner.report.views.pareto import render_png

        files[PICTURE] = render_png(report)
    return files
