"""Charts over the layers: an imatrix's figures of every tensor, and how tokens were distributed over experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Literal

from imatrix_runner import safe_text
from imatrix_runner.imatrix.statistics import locate
from imatrix_runner.report.document import Report, ReportExperts, ReportTensor
from imatrix_runner.report.views import wording
from imatrix_runner.report.views.charts import Spec, kinds, spec, tip
from imatrix_runner.report.views.colours import RAMP_STEPS, ramp, var

Figure = Literal["total", "active", "entropy"]

OUTSIDE: Final = "–"
"""Shown in place of a layer's number for tensors outside the layers."""
_FEW: Final = 8
"""Most layers of a heat map that is drawn small."""
MOST_CELLS: Final = 20_000
"""Most cells of a heat map: the largest models have about 2,000 tensors."""
_ORDER: Final = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_ROW: Final = 24


@dataclass(frozen=True)
class FigureText:
    """One of the three figures: its name on the page's switch, its meaning, and whether its scale is logarithmic."""

    key: Figure
    name: str
    meaning: str
    log: bool


FIGURES: Final = (
    FigureText("total", "Σ(Act²)", "how strong the signal into a tensor is; each step of colour is the same factor", log=True),
    FigureText(
        "active",
        "Coverage",
        "the share of a tensor's inputs that the calibration text activated (mean square above 1e-5)",
        log=False,
    ),
    FigureText("entropy", "Entropy", "how evenly the signal spreads over the inputs, as a share of the maximum", log=False),
)


def heat_map(report: Report, figure: Figure) -> Spec | None:
    """A heat map of one figure, layers by kinds of tensors; tensors without data are crossed out."""
    if report.imatrix is None or not report.imatrix.tensors or len(report.imatrix.tensors) > MOST_CELLS:
        return None
    tensors, text = report.imatrix.tensors, next(each for each in FIGURES if each.key == figure)
    lacking = [
        {"layer": layer_name(layer), "kind": safe_text.shown(kind, 40), "name": safe_text.shown(name)}
        for name in report.imatrix.without_data[:MOST_CELLS]
        for layer, kind in [locate(name)]
    ]
    return grid(
        [_cell(tensor, text) for tensor in tensors],
        lacking,
        label="format(pow(10, datum.value), ',.2~r')" if text.log else "format(100 * datum.value, '.3~r') + ' %'",
        cell_tip=tip(layer="Layer", kind="Tensor", total="Σ(Act²)", active="Coverage", entropy="Entropy"),
        lacking_tip=tip(name="Without data"),
        description=_describe(tensors, text, len(lacking)),
    )


def grid(
    cells: Sequence[dict[str, Any]],
    lacking: Sequence[dict[str, Any]],
    *,
    label: str,
    cell_tip: Sequence[dict[str, str]],
    lacking_tip: Sequence[dict[str, str]],
    description: str,
) -> Spec:
    """A heat map of layers by kinds of tensors. ``cells`` have a ``layer``, a ``kind`` and a ``value``, which is coloured;
    ``lacking`` have no value and are crossed out. ``label``: the expression for the legend's ``datum.value``."""
    rows = sorted({cell["kind"] for cell in [*cells, *lacking]}, key=_rank)
    columns = sorted({cell["layer"] for cell in [*cells, *lacking]}, key=lambda layer: (layer == OUTSIDE, len(layer), layer))
    limits = thresholds([cell["value"] for cell in cells if cell["value"] is not None])
    every = max(1, math.ceil(len(columns) / 16))
    ticks = [layer for at, layer in enumerate(columns) if at % every == 0 or layer == OUTSIDE]
    place = {
        "x": {
            "field": "layer",
            "type": "ordinal",
            "title": "Layer",
            "scale": {"domain": columns, "paddingInner": 0.06},
            "axis": {"values": ticks, "labelAngle": 0, "labelOverlap": "greedy", "ticks": False, "domain": False},
        },
        "y": {
            "field": "kind",
            "type": "nominal",
            "title": None,
            "scale": {"domain": rows, "paddingInner": 0.08},
            "axis": {"ticks": False, "domain": False, "labelLimit": 150},
        },
    }
    colour = {
        "field": "value",
        "type": "quantitative",
        "title": None,
        "scale": {"type": "threshold", "domain": limits, "range": ramp()},
        "legend": {
            "labelExpr": f"isFinite(datum.value) ? {label} : ''",
            "gradientThickness": 10,
            "labelOverlap": "greedy",
            "labelFontSize": 11,
        },
    }
    layers: list[Spec] = [
        {
            "name": "cells",
            "data": {"values": cells},
            "mark": {"type": "rect", "aria": False},
            "encoding": {
                **place,
                "color": colour if limits else {"value": ramp()[RAMP_STEPS // 2]},
                "tooltip": cell_tip,
            },
        }
    ]
    if lacking:
        layers.append(
            {
                "name": "lacking",
                "data": {"values": lacking},
                "mark": {"type": "text", "text": "✕", "color": var("warn"), "fontSize": 11, "aria": False},
                "encoding": {**place, "tooltip": lacking_tip},
            }
        )
    return spec(description, _ROW * len(rows), layer=layers, small=len(columns) <= _FEW)


def thresholds(values: Sequence[float]) -> list[float]:
    """The values between two colours, evenly spaced from the least to the greatest; empty if all values are equal."""
    if not values or min(values) == max(values):
        return []
    least, most = min(values), max(values)
    return [least + (most - least) * step / RAMP_STEPS for step in range(1, RAMP_STEPS)]


def _cell(tensor: ReportTensor, text: FigureText) -> dict[str, Any]:
    return {
        "layer": layer_name(tensor.layer),
        "kind": safe_text.shown(tensor.kind, 40),
        "value": _value(tensor, text),
        "total": wording.figure(tensor.total),
        "active": wording.percent(tensor.active),
        "entropy": wording.percent(tensor.entropy),
    }


def _value(tensor: ReportTensor, text: FigureText) -> float | None:
    """The value that is coloured; None for the logarithm of 0."""
    value: float = getattr(tensor, text.key)
    if not text.log:
        return value
    return math.log10(value) if value > 0 else None


def layer_name(layer: int | None) -> str:
    """A layer as charts and tables name it."""
    return OUTSIDE if layer is None else str(layer)


def _rank(kind: str) -> tuple[int, str]:
    """Attention, then feed-forward, each in the order of its computation, then all others by name."""
    stem = kind.removesuffix("_exps").removesuffix("_shexp")
    return (_ORDER.index(stem) if stem in _ORDER else len(_ORDER)), kind


def _describe(tensors: Sequence[ReportTensor], text: FigureText, lacking: int) -> str:
    least = min(tensors, key=lambda tensor: getattr(tensor, text.key))
    most = max(tensors, key=lambda tensor: getattr(tensor, text.key))

    def named(tensor: ReportTensor) -> str:
        value = getattr(tensor, text.key)
        where = f" of layer {tensor.layer}" if tensor.layer is not None else ""
        return f"{wording.figure(value) if text.log else wording.percent(value)} ({safe_text.shown(tensor.kind, 40)}{where})"

    found = f"{text.name} of {wording.many(len(tensors), 'tensor')}: {text.meaning}. From {named(least)} to {named(most)}."
    if any(tensor.layer is None for tensor in tensors):
        found += f" The column {OUTSIDE} is outside the layers."
    return found + (f" Crossed out: {wording.many(lacking, 'tensor')} without data." if lacking else "")


def expert_groups(experts: Sequence[ReportExperts]) -> list[tuple[str, tuple[ReportExperts, ...]]]:
    """Groups of kinds of tensors with the same figures in every layer (one router serves several), with a joint name."""
    by_kind: dict[str, list[ReportExperts]] = {}
    for each in experts:
        by_kind.setdefault(each.kind, []).append(each)

    def series(item: tuple[str, list[ReportExperts]]) -> str:
        return repr([(each.layer, each.experts, each.without_tokens, each.fewest, each.median, each.most) for each in item[1]])

    named = sorted(by_kind.items(), key=series)
    groups = [list(group) for _, group in groupby(named, key=series)]
    return sorted(
        (safe_text.shown(", ".join(sorted((kind for kind, _ in group), key=_rank))), tuple(group[0][1])) for group in groups
    )


def coverage(report: Report) -> Spec | None:
    """Tokens per expert in every layer: fewest, median and most; layers in which experts saw no token are marked."""
    experts = report.imatrix.experts if report.imatrix is not None else ()
    if not experts or len(experts) > MOST_CELLS:
        return None
    groups = expert_groups(experts)
    rows: list[dict[str, Any]] = [
        {
            "layer": layer_name(each.layer),
            "of": name,
            "fewest": each.fewest,
            "median": each.median,
            "most": each.most,
            "without": each.without_tokens,
            "told": f"{each.without_tokens} of {each.experts}",
        }
        for name, series in groups
        for each in series
    ]
    columns = sorted({row["layer"] for row in rows}, key=lambda layer: (layer == OUTSIDE, len(layer), layer))
    every = max(1, math.ceil(len(columns) / 16))
    axis = {"values": columns[::every], "labelAngle": 0, "labelOverlap": "greedy", "grid": False}
    top = max(row["most"] for row in rows)
    marks = [0, *(10**power for power in range(1, 16) if 10**power <= top * 3)]
    x = {"field": "layer", "type": "ordinal", "title": "Layer", "scale": {"domain": columns}, "axis": axis}
    y = {"type": "quantitative", "title": "Tokens per expert", "scale": {"type": "symlog", "domain": [0, top * 1.15]}}
    palette = dict(zip((name for name, _ in groups), _cycle(len(groups)), strict=True))
    offset = {"xOffset": {"field": "of"}} if len(groups) > 1 else {}
    shared = {"x": x, "color": kinds("of", palette, **({} if offset else {"legend": None})), **offset}
    untouched = [row for row in rows if row["without"]]
    tips = tip(layer="Layer", of="Tensors", fewest="Fewest", median="Median", most="Most", told="Without tokens")
    layers: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 4, "opacity": 0.35, "strokeCap": "round", "aria": False},
            "encoding": {
                **shared,
                "y": {"field": "fewest", **y, "axis": {"values": marks, "format": ",d"}},
                "y2": {"field": "most"},
                "tooltip": tips,
            },
        },
        {
            "name": "medians",
            "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
            "encoding": {**shared, "y": {"field": "median", **y}, "tooltip": tips},
        },
    ]
    if untouched:
        layers.append(
            {
                "name": "untouched",
                "data": {"values": untouched},
                "mark": {
                    "type": "point",
                    "shape": "triangle-up",
                    "filled": True,
                    "size": 90,
                    "color": var("warn"),
                    "opacity": 1,
                },
                "encoding": {"x": x, **offset, "y": {"field": "fewest", **y}, "tooltip": tips},
            }
        )
    fewest = min(experts, key=lambda each: each.fewest)
    description = (
        f"Tokens per expert over {wording.many(len(columns), 'layer')} of {max(each.experts for each in experts)} experts, in "
        f"{'; '.join(name for name, _ in groups)}: between {fewest.fewest:,} (layer {layer_name(fewest.layer)}) and {top:,}."
    )
    if untouched:
        most = max(untouched, key=lambda row: int(row["without"]))
        description += (
            f" In {wording.many(len({row['layer'] for row in untouched}), 'layer')} some experts saw no token, most in layer "
            f"{most['layer']} ({most['told']}); they are quantised as if all their inputs were equally important."
        )
    return spec(description, 300, data={"values": rows}, layer=layers)


def _cycle(number: int) -> list[str]:
    names = ("accent", "baseline", "other", "soft")
    return [names[at % len(names)] for at in range(number)]
