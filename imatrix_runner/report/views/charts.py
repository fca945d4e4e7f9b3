"""The report's charts as Vega-Lite specifications: pure functions of the report; None if the report lacks their data.

The page, at its own width, and the picture use the same specifications. ``description`` says in words and figures what the
chart shows. Names from files occur only in data, never in an expression.
"""

from __future__ import annotations

import math
from typing import Any, Final

from imatrix_runner import safe_text
from imatrix_runner.evaluate.ab_verdict import LITTLE, MUCH
from imatrix_runner.report.document import Report
from imatrix_runner.report.views import wording
from imatrix_runner.report.views.colours import config, var

Spec = dict[str, Any]

SCHEMA: Final = "https://vega.github.io/schema/vega-lite/v6.json"
_PHONE: Final = 400
"""Width of the plot in pixels below which a legend's names are stacked."""


def spec(description: str, height: float, *, small: bool = False, **parts: Any) -> Spec:
    """A specification with what all charts share: the page's width (part of it if ``small``) and style."""
    return {
        "$schema": SCHEMA,
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": config(),
        "usermeta": {"small": small},
        **parts,
    }


def legend(**more: Any) -> dict[str, Any]:
    """A legend whose names are stacked on a narrow page, else in one row."""
    return {"columns": {"expr": f"width < {_PHONE} ? 1 : 0"}, **more}


def quantitative(field: str, title: str | None, **more: Any) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": title, **more}


def tip(**titles: str) -> list[dict[str, str]]:
    """A tooltip of texts: field -> its heading."""
    return [{"field": field, "type": "nominal", "title": title} for field, title in titles.items()]


def kinds(field: str, colours: dict[str, str], **more: Any) -> dict[str, Any]:
    """A colour encoding: the field's values and the name of each one's colour."""
    return {
        "field": field,
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(colours), "range": [var(colour) for colour in colours.values()]},
        "legend": legend(),
        **more,
    }


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two values; only the powers if that would be more than about ten ticks."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 2e3 else (1,)
    return [tick for power in powers for step in steps if low <= (tick := float(f"{step}e{power}")) <= high]


def saved(report: Report) -> Spec | None:
    """The share of the baseline's KLD that the imatrix removes, per level, with the rule's two limits."""
    if not report.comparisons:
        return None
    rows: list[dict[str, Any]] = [
        {
            "level": safe_text.shown(each.level),
            "verdict": each.verdict,
            "saved": 100 * each.saved.value,
            "low": 100 * (each.saved.value - 2 * each.saved.error),
            "high": 100 * (each.saved.value + 2 * each.saved.error),
            "figure": f"{wording.percent(each.saved.value)} ± {wording.percent(each.saved.error)}",
            "with": wording.kld_error(each.with_imatrix.kld),
            "without": wording.kld_error(each.without.kld),
        }
        for each in report.comparisons
    ]
    order = [row["level"] for row in rows]
    y = {"field": "level", "type": "nominal", "sort": order, "title": None, "axis": {"ticks": False, "domain": False}}
    low, high = min(0.0, *(row["low"] for row in rows)), max(100 * MUCH * 1.2, *(row["high"] for row in rows))
    x = {"scale": {"domain": [low, high], "nice": True}, "axis": {"tickCount": 6, "labelExpr": "datum.label + ' %'"}}
    limits = [{"at": 100 * LITTLE, "name": f"{LITTLE:.0%}"}, {"at": 100 * MUCH, "name": f"{MUCH:.0%}"}]
    best = max(report.comparisons, key=lambda each: each.saved.value)
    colours = {"not needed": "other", "take it": "accent", "do not go without": "baseline", "undecided": "soft"}
    used = {verdict: colour for verdict, colour in colours.items() if any(row["verdict"] == verdict for row in rows)}
    return spec(
        f"Share of the KLD that the imatrix removes, for {wording.many(len(rows), 'level')}; most for "
        f"{safe_text.shown(best.level)} with {wording.percent(best.saved.value)}.",
        max(60, 34 * len(rows)),
        layer=[
            {
                "name": "bars",
                "data": {"values": rows},
                "mark": {"type": "bar", "height": {"band": 0.5}},
                "encoding": {
                    "x": quantitative("saved", "Share of the KLD that the imatrix removes", **x),
                    "y": y,
                    "color": kinds("verdict", used),
                    "tooltip": tip(level="Level", figure="Removed", verdict="Verdict")
                    + tip(**{"with": "KLD with", "without": "KLD without"}),
                },
            },
            {
                "data": {"values": limits},
                "mark": {"type": "rule", "color": var("soft"), "strokeDash": [4, 3], "aria": False},
                "encoding": {"x": {"field": "at", "type": "quantitative"}},
            },
            {
                "data": {"values": rows},
                "mark": {"type": "rule", "color": var("ink"), "strokeWidth": 1.5, "aria": False},
                "encoding": {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}, "y": y},
            },
        ],
    )


def curve(report: Report) -> Spec | None:
    """The imatrix's estimated error over the chunks, of the worst and the median tensor, on a log scale."""
    points = report.imatrix.curve if report.imatrix is not None else ()
    rows: list[dict[str, Any]] = [
        {"chunks": point.chunks, "of": of, "error": error, "share": wording.percent(error, 2), "tensor": name}
        for point in points
        for of, error, name in (
            ("worst tensor", point.worst, safe_text.shown(point.tensor)),
            ("median tensor", point.median, "-"),
        )
        if error > 0
    ]
    if len({row["chunks"] for row in rows}) < 2:
        return None
    last = points[-1]
    low, high = min(row["error"] for row in rows), max(row["error"] for row in rows)
    log = {"type": "log", "nice": False, "domain": [low * 0.9, high * 1.1]}
    percents = {"values": log_ticks(low * 0.9, high * 1.1), "labelExpr": "format(100 * datum.value, '~g') + ' %'"}
    return spec(
        f"How far the imatrix still was from its limit, over {last.chunks:,} chunks: at the end {wording.percent(last.worst)} "
        f"in the worst tensor, {safe_text.shown(last.tensor)}, and {wording.percent(last.median)} in the median one.",
        260,
        data={"values": rows},
        mark={"type": "line", "point": {"filled": True, "size": 28}},
        encoding={
            "x": quantitative(
                "chunks", "Chunks", scale={"nice": False}, axis={"grid": False, "tickMinStep": 1, "tickCount": 8}
            ),
            "y": quantitative("error", "Estimated error", scale=log, axis=percents),
            "color": kinds("of", {"worst tensor": "baseline", "median tensor": "accent"}),
            "tooltip": tip(chunks="Chunks", of="Of", share="Estimated error", tensor="Tensor"),
        },
    )
