"""The chart of every level's size against its divergence from the source, also as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from imatrix_runner import safe_text
from imatrix_runner.engines.measures import Divergence
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.evaluate.recommendations import Measure, front
from imatrix_runner.files import byte_unit, human_bytes
from imatrix_runner.report.document import Report, ReportLevel
from imatrix_runner.report.views import wording
from imatrix_runner.report.views.charts import Spec, legend, log_ticks, quantitative, spec, tip
from imatrix_runner.report.views.colours import palette, resolved, var
from imatrix_runner.report.views.labels import Spot, place

PICKED, OTHER, BASELINE = "recommended", "other levels", "without imatrix"

_WIDE, _NARROW, _HEIGHT = 1000, 250, 420
"""Sizes of the plot, in pixels, for which names are placed."""

_NARROW_BELOW: Final = 560
"""Width below which the places of the narrow plot are used."""

_MARGIN: Final = 0.06

Point = dict[str, Any]


@dataclass(frozen=True)
class _Upright:
    """The scale of the KLD from ``low`` to ``high``; logarithmic if any level has a KLD above 0."""

    low: float
    high: float
    log: bool

    def height(self, kld: float) -> float:
        """0 at the lower end, 1 at the upper."""
        if not self.log:
            return (kld - self.low) / (self.high - self.low)
        return math.log(kld / self.low) / math.log(self.high / self.low)

    def encoding(self) -> dict[str, Any]:
        domain = [self.low, self.high]
        if not self.log:
            return quantitative("kld", "Mean KLD (nats)", scale={"domain": domain, "nice": False}, axis={"tickCount": 5})
        scale = {"type": "log", "domain": domain, "nice": False}
        ticks = {"values": log_ticks(self.low, self.high), "format": "~g"}
        return quantitative("kld", "Mean KLD (nats, log scale)", scale=scale, axis=ticks)


def pareto(report: Report, *, width: float = _WIDE, height: float = _HEIGHT) -> Spec | None:
    """Size against mean KLD, with the front as a line and baselines joined to their levels; None without measured levels.

    The KLD's scale is logarithmic, and levels with a KLD of 0 are left out, unless all have one. Names are placed for a plot of
    ``width`` and ``height`` pixels.
    """
    measured = [(level, level.measured) for level in report.rows if level.measured is not None]
    placed = [(level, found) for level, found in measured if found.kld.value > 0]
    plotted = placed or measured
    if not plotted:
        return None
    name, scale = byte_unit(max(level.n_bytes for level, _ in plotted))
    picked = {pick.level for pick in report.picks}
    baselines = {each.level: each.without for each in report.comparisons if each.without.kld.value > 0}
    points: list[Point] = []
    joined: list[Point] = []
    for level, found in plotted:
        points.append(_point(level, found, PICKED if level.name in picked else OTHER, scale))
        if level.name in baselines:
            points.append(_point(level, baselines[level.name], BASELINE, scale))
            joined.append({"x": level.n_bytes / scale, "low": found.kld.value, "high": baselines[level.name].kld.value})
    across, upright = _across(points), _upright(points, log=bool(placed))
    for point in points:
        point["low"], point["high"] = max(point["kld"] - point["error"], upright.low), point["kld"] + point["error"]
    best = front([Measure(level.name, level.n_bytes, found.kld.value, found.same_top.value) for level, found in plotted])
    line = [{"x": each.n_bytes / scale, "kld": each.kld} for each in best]
    _name_points(points, line, across, upright, width, height)
    x_axis = {"grid": False, "tickCount": {"expr": f"width < {_NARROW_BELOW} ? 4 : 8"}}
    x = quantitative("x", f"Size ({name})", scale={"domain": across, "zero": False, "nice": False}, axis=x_axis)
    layers = _layers(points, line, joined, upright.encoding())
    return spec(_describe(report, plotted), height, encoding={"x": x}, layer=layers)


def _point(level: ReportLevel, found: Divergence, role: str, scale: int) -> Point:
    return {
        "level": safe_text.shown(level.name),
        "role": role,
        "x": level.n_bytes / scale,
        "kld": found.kld.value,
        "error": found.kld.error,
        "size": human_bytes(level.n_bytes),
        "figure": wording.kld_error(found.kld),
        "same": wording.percent(found.same_top.value),
    }


def _layers(points: list[Point], line: list[Point], joined: list[Point], y: dict[str, Any]) -> list[Spec]:
    """The chart's layers, from the lowest: front, lines to baselines, standard errors, points, names."""
    reaching = {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}
    is_picked = f"datum.role === '{PICKED}'"
    return [
        {
            "name": "front",
            "data": {"values": line},
            "mark": {"type": "line", "color": var("accent"), "opacity": 0.45, "aria": False},
            "encoding": {"y": y},
        },
        {
            "name": "baselines",
            "data": {"values": joined},
            "mark": {"type": "rule", "color": var("baseline"), "opacity": 0.6, "aria": False},
            "encoding": reaching,
        },
        {
            "name": "errors",
            "data": {"values": points},
            "mark": {"type": "rule", "aria": False},
            "encoding": {**reaching, "color": _roles(points)},
        },
        {
            "name": "points",
            "data": {"values": points},
            "mark": {"type": "point", "filled": True, "opacity": 1, "size": {"expr": f"{is_picked} ? 130 : 58"}},
            "encoding": {
                "y": y,
                "color": _roles(points),
                "shape": _roles(points, ("circle", "circle", "diamond")),
                "tooltip": tip(level="Level", role="Shown as", size="Size", figure="Mean KLD", same="Same top token"),
            },
        },
        {
            "name": "names",
            "data": {"values": [point for point in points if point["role"] != BASELINE]},
            "mark": {"type": "text", "baseline": "middle", "aria": False, **_placed(is_picked)},
            "encoding": {
                "y": y,
                "text": {"field": "level"},
                "size": {"condition": {"test": is_picked, "value": 13}, "value": 11.5},
                "color": {"condition": {"test": is_picked, "value": var("accent")}, "value": var("soft")},
            },
        },
    ]


def _across(points: Sequence[Point]) -> list[float]:
    """The ends of the size axis, with room for names."""
    sizes = [point["x"] for point in points]
    apart = (max(sizes) - min(sizes)) or max(sizes)
    return [max(0.0, min(sizes) - _MARGIN * apart), max(sizes) + _MARGIN * apart]


def _upright(points: Sequence[Point], *, log: bool) -> _Upright:
    low = min(point["kld"] for point in points)
    high = max(point["kld"] + point["error"] for point in points)
    if not log:
        return _Upright(low - 1e-6, high + 1e-6, log)
    stretch = max(high / low, 2.0) ** _MARGIN
    return _Upright(low / stretch, high * stretch, log)


def _name_points(
    points: Sequence[Point],
    line: Sequence[Point],
    ends: list[float],
    upright: _Upright,
    width: float,
    height: float,
) -> None:
    """Add to every level's point the place of its name, in a wide and in a narrow plot. The recommended levels, the smallest
    and the largest are always named."""
    levels = [point for point in points if point["role"] != BASELINE]
    baselines = [point for point in points if point["role"] == BASELINE]
    outer = {min(levels, key=lambda each: each["x"])["level"], max(levels, key=lambda each: each["x"])["level"]}
    for key, across in (("wide", width), ("narrow", _NARROW)):

        def at(point: Point, across: float = across) -> tuple[float, float]:
            x = (point["x"] - ends[0]) / (ends[1] - ends[0])
            return x * across, (1 - upright.height(point["kld"])) * height

        spots = [Spot(*at(point), point["level"], must=point["role"] == PICKED or point["level"] in outer) for point in levels]
        labels = place(spots, across, height, avoid=list(map(at, baselines)), line=list(map(at, line)))
        for point, label in zip(levels, labels, strict=True):
            point[key] = asdict(label)


def _placed(is_picked: str) -> dict[str, Any]:
    """A text mark's properties, taken from the places in its datum."""

    def where(key: str) -> str:
        return f"(width < {_NARROW_BELOW} ? datum.narrow.{key} : datum.wide.{key})"

    return {
        "dx": {"expr": where("dx")},
        "dy": {"expr": where("dy")},
        "align": {"expr": where("align")},
        "opacity": {"expr": f"{where('shown')} ? 1 : 0"},
        "fontWeight": {"expr": f"{is_picked} ? 'bold' : 'normal'"},
    }


def _roles(points: Sequence[Point], values: Sequence[str] = (var("accent"), var("other"), var("baseline"))) -> dict[str, Any]:
    """An encoding of the roles that occur, with one of ``values`` for each."""
    there = {role: value for role, value in zip((PICKED, OTHER, BASELINE), values, strict=True) if _occurs(role, points)}
    scale = {"domain": list(there), "range": list(there.values())}
    return {"field": "role", "type": "nominal", "title": None, "scale": scale, "legend": legend()}


def _occurs(role: str, points: Sequence[Point]) -> bool:
    return any(point["role"] == role for point in points)


def _describe(report: Report, plotted: Sequence[tuple[ReportLevel, Divergence]]) -> str:
    def named(level: ReportLevel, found: Divergence) -> str:
        return f"{safe_text.shown(level.name)} with {human_bytes(level.n_bytes)} and {wording.kld(found.kld.value)}"

    text = f"Size against mean KLD for {wording.many(len(plotted), 'level')}: "
    text += f"from {named(*plotted[0])} to {named(*plotted[-1])}." if len(plotted) > 1 else f"{named(*plotted[0])}."
    if report.picks:
        text += f" Recommended: {', '.join(safe_text.shown(pick.level) for pick in report.picks)}."
    shown = {level.name for level, _ in plotted}
    if same := [safe_text.shown(each.name) for each in report.rows if each.measured is not None and each.name not in shown]:
        text += f" Not on the log scale: {', '.join(same)}, with a KLD of 0."
    return text


_WIDTH, _PICTURE_HEIGHT, _SCALE = 800, 500, 2

_LEFT, _TITLE = 80, 130
"""Approximate pixels that the axis takes of the picture's width, and axis and title of its height."""

_FONT: Final = "Helvetica, Arial, sans-serif"


def render_png(report: Report) -> bytes:
    """The chart as a PNG of 1600 x 1000 pixels. Raises :class:`InvalidDataError` without a measured level."""
    import vl_convert

    chart = pareto(report, width=_WIDTH - _LEFT, height=_PICTURE_HEIGHT - _TITLE)
    if chart is None:
        raise InvalidDataError(
            "There is nothing to draw", "no level of this workspace is measured", "Measure: imatrix-runner evaluate MODEL"
        )
    tokens = report.evaluation.n_tokens if report.evaluation is not None else 0
    where = f" on {tokens:,} tokens of {safe_text.shown(report.evaluation.text, 60)}" if report.evaluation is not None else ""
    chart |= {
        "width": _WIDTH,
        "height": _PICTURE_HEIGHT,
        "autosize": {"type": "fit", "contains": "padding"},
        "padding": 20,
        "background": palette()["paper"],
        "title": {
            "text": f"{safe_text.shown(report.model.name, 60)}: what each level costs",
            "subtitle": f"Mean KLD from the {safe_text.shown(report.model.type, 20)} source{where}; lower left is better",
            "offset": 14,
        },
    }
    chart["config"] = {**chart["config"], "font": _FONT}
    return vl_convert.vegalite_to_png(resolved(chart), scale=_SCALE)
