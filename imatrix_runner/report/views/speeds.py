"""The chart of every level's speed against its divergence from the source, with its size as a third axis."""

from __future__ import annotations

from typing import Any

from imatrix_runner import safe_text
from imatrix_runner.files import byte_unit, human_bytes
from imatrix_runner.report.document import Report
from imatrix_runner.report.views import wording
from imatrix_runner.report.views.charts import Spec, log_ticks, quantitative, spec, tip
from imatrix_runner.report.views.colours import var

_HEIGHT = 420
_MARGIN = 1.2


def speed_chart(report: Report) -> Spec | None:
    """Tokens/s generated against mean KLD, on a log scale; the area of a mark is the size of the file. None without two levels
    that are both timed and measured with a KLD above 0."""
    levels = [
        (level, level.speed, level.measured)
        for level in report.rows
        if level.speed is not None and level.measured is not None and level.measured.kld.value > 0
    ]
    if len(levels) < 2:
        return None
    picked = {pick.level for pick in report.picks}
    unit, scale = byte_unit(max(level.n_bytes for level, _, _ in levels))
    points: list[dict[str, Any]] = [
        {
            "level": safe_text.shown(level.name),
            "picked": level.name in picked,
            "speed": speed.generation.mean,
            "slow": speed.generation.mean - (speed.generation.error if speed.generation.runs > 1 else 0.0),
            "fast": speed.generation.mean + (speed.generation.error if speed.generation.runs > 1 else 0.0),
            "kld": found.kld.value,
            "bytes": level.n_bytes / scale,
            "size": human_bytes(level.n_bytes),
            "rate": wording.rate(speed.generation),
            "prompt": wording.rate(speed.prompt),
            "memory": human_bytes(speed.n_bytes),
            "figure": wording.kld_error(found.kld),
        }
        for level, speed, found in levels
    ]
    low, high = min(point["kld"] for point in points) / _MARGIN, max(point["kld"] for point in points) * _MARGIN
    log = {"type": "log", "domain": [low, high], "nice": False}
    y = quantitative("kld", "Mean KLD (nats, log scale)", scale=log, axis={"values": log_ticks(low, high), "format": "~g"})
    colour = {"condition": {"test": "datum.picked", "value": var("accent")}, "value": var("other")}
    fastest = max(points, key=lambda point: point["speed"])
    slowest = min(points, key=lambda point: point["speed"])
    return spec(
        f"Tokens generated per second against mean KLD for {wording.many(len(points), 'level')}: from {slowest['level']} with "
        f"{slowest['rate']} to {fastest['level']} with {fastest['rate']} tokens/s. The area of a mark is the size of the file.",
        _HEIGHT,
        data={"values": points},
        encoding={
            "x": quantitative("speed", "Tokens/s generated", scale={"zero": False, "padding": 40}, axis={"tickCount": 6}),
            "y": y,
        },
        layer=[
            {
                "name": "errors",
                "mark": {"type": "rule", "aria": False},
                "encoding": {
                    "x": {"field": "slow", "type": "quantitative"},
                    "x2": {"field": "fast"},
                    "color": colour,
                },
            },
            {
                "name": "levels",
                "mark": {"type": "point", "filled": True, "opacity": 0.8},
                "encoding": {
                    "size": quantitative("bytes", f"Size ({unit})", scale={"zero": True, "range": [0, 500]}, legend=None),
                    "color": colour,
                    "tooltip": tip(
                        level="Level",
                        rate="Tokens/s",
                        prompt="Prompt tokens/s",
                        memory="Memory",
                        size="Size",
                        figure="Mean KLD",
                    ),
                },
            },
            {
                "name": "names",
                "mark": {
                    "type": "text",
                    "baseline": "middle",
                    "align": "left",
                    "dx": 10,
                    "dy": -12,
                    "fontSize": 11.5,
                    "aria": False,
                },
                "encoding": {"text": {"field": "level"}, "color": {"value": var("soft")}},
            },
        ],
    )
