"""The report's colours, light and dark, and the style of its charts.

Charts name colours as the style sheet does, ``var(--accent)``, so they follow the page's variables in dark mode and in print. A
picture has no style sheet; :func:`resolved` inserts the values. Text on ``paper`` and on ``raised`` has a contrast of at least
4.5 in both modes (WCAG AA).
"""

from __future__ import annotations

import re
from typing import Any, Final

COLOURS: Final = {
    # name: (light, dark)
    "paper": ("#fcfcfa", "#14171a"),
    "raised": ("#f2f4f1", "#1c2125"),
    "ink": ("#1a1f24", "#e7eaec"),
    "soft": ("#56606a", "#a3adb6"),
    "line": ("#d9ddd8", "#353c43"),
    "accent": ("#0b6e66", "#58cdbf"),
    "other": ("#74808b", "#8a95a0"),
    "baseline": ("#b04e10", "#f0a45f"),
    "warn": ("#a32a2a", "#f29189"),
    "removed": ("#fbe1d3", "#4c2c18"),
    "added": ("#d2eee8", "#12423c"),
}
"""``accent``: recommended levels; ``baseline``: without imatrix; ``warn``: missing data."""

_LIGHT_RAMP = ("#edf3f1", "#6db3a9", "#063f3b")
_DARK_RAMP = ("#1d2a2c", "#2c857c", "#c6f7ee")
RAMP_STEPS: Final = 7

FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_NAMED = re.compile(r"var\(--([a-z0-9-]+)\)")


def var(name: str) -> str:
    """The CSS variable of a colour, for the style sheet and the charts."""
    return f"var(--{name})"


def ramp() -> list[str]:
    """The colours of a heat map, from small to large values."""
    return [var(f"ramp-{step}") for step in range(1, RAMP_STEPS + 1)]


def palette(*, dark: bool = False) -> dict[str, str]:
    """The value of every colour by name."""
    named = {name: pair[dark] for name, pair in COLOURS.items()}
    steps = _mixed(_DARK_RAMP if dark else _LIGHT_RAMP)
    return named | {f"ramp-{step}": colour for step, colour in enumerate(steps, start=1)}


def variables(*, dark: bool = False) -> str:
    """The palette as CSS declarations."""
    return " ".join(f"--{name}: {value};" for name, value in palette(dark=dark).items())


def resolved(spec: Any) -> Any:
    """A chart with the light colours' values in place of their names."""
    colours = palette()
    if isinstance(spec, dict):
        return {key: resolved(value) for key, value in spec.items()}
    if isinstance(spec, list):
        return [resolved(value) for value in spec]
    if isinstance(spec, str) and (named := _NAMED.fullmatch(spec)):
        return colours.get(named[1], spec)
    return spec


def config() -> dict[str, Any]:
    """Vega-Lite's ``config`` of every chart: the page's font and colours, thin lines."""
    text = {"labelColor": var("soft"), "titleColor": var("soft"), "titleFontWeight": "normal"}
    sizes = {"labelFontSize": 12, "titleFontSize": 12}
    return {
        "font": FONT,
        "background": "transparent",
        "view": {"stroke": None},
        "axis": {
            **text,
            **sizes,
            "gridColor": var("line"),
            "domainColor": var("line"),
            "tickColor": var("line"),
            "titlePadding": 10,
            "labelPadding": 6,
        },
        "axisQuantitative": {"labelOverlap": True, "labelSeparation": 4},
        "legend": {**text, **sizes, "orient": "top", "title": None, "symbolSize": 90, "offset": 4, "labelLimit": 400},
        "title": {"color": var("ink"), "subtitleColor": var("soft"), "anchor": "start", "fontSize": 20, "subtitleFontSize": 13},
        "text": {"color": var("ink"), "fontSize": 12},
    }


def _mixed(ends: tuple[str, str, str]) -> list[str]:
    """:data:`RAMP_STEPS` colours, interpolated from the first through the second to the third."""
    channels = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in ends]
    found = []
    for step in range(RAMP_STEPS):
        place = step / (RAMP_STEPS - 1) * 2
        at = min(int(place), 1)
        share = place - at
        mixed = (round(low + share * (high - low)) for low, high in zip(channels[at], channels[at + 1], strict=True))
        found.append("#" + "".join(f"{channel:02x}" for channel in mixed))
    return found
