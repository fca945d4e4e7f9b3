"""Charts over the layers: what an imatrix says of every tensor, and how the tokens fell on experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Literal

from imatrix_runner.imatrix.statistics import locate
from imatrix_runner.report import wording
from imatrix_runner.report.charts import Spec, kinds, spec, tip
from imatrix_runner.report.colours import RAMP_STEPS, ramp, var
from imatrix_runner.report.document import Report, ReportExperts, ReportTensor

Figure = Literal["total", "active", "entropy"]

OUTSIDE: Final = "–"
"""In place of a layer's number, for tensors outside the layers."""
_FEW: Final = 8
"""Layers up to which a heat map does not need the page's width."""
MOST_CELLS: Final = 20_000
"""Above this a heat map is no picture any more: the largest models have about 2,000 tensors."""
_ORDER: Final = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_ROW: Final = 24


@dataclass(frozen=True)
class FigureText:
    """One of the three figures: its name on the switch, what it means, the headings."""

    key: Figure
    name: str
    meaning: str
    log: bool


FIGURES: Final = (
    FigureText(
        "total", "Σ(Act²)", "how strong the signal into a tensor is, each step of colour being the same factor", log=True
    ),
    FigureText(
        "active",
        "Coverage",
        "the share of a tensor's inputs that the calibration text woke (mean square above 1e-5)",
        log=False,
    ),
    FigureText(
        "entropy", "Entropy", "how evenly the signal spreads over the inputs, as a share of the most there can be", log=False
    ),
)


def heat_map(report: Report, figure: Figure) -> Spec | None:
    """Layer by kind of tensor; tensors without data are crossed out."""
    if report.imatrix is None or not report.imatrix.tensors or len(report.imatrix.tensors) > MOST_CELLS:
        return None
    tensors, text = report.imatrix.tensors, next(each for each in FIGURES if each.key == figure)
    cells = [_cell(tensor, text) for tensor in tensors]
    lacking = [
        {"layer": _layer(layer), "kind": wording.shown(kind, 40), "name": wording.shown(name)}
        for name in report.imatrix.without_data[:MOST_CELLS]
        for layer, kind in [locate(name)]
    ]
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
    label = "format(pow(10, datum.value), ',.2~r')" if text.log else "format(100 * datum.value, '.3~r') + ' %'"
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
                "tooltip": tip(layer="Layer", kind="Tensor", total="Σ(Act²)", active="Coverage", entropy="Entropy"),
            },
        }
    ]
    if lacking:
        layers.append(
            {
                "name": "lacking",
                "data": {"values": lacking},
                "mark": {"type": "text", "text": "✕", "color": var("warn"), "fontSize": 11, "aria": False},
                "encoding": {**place, "tooltip": tip(name="Without data")},
            }
        )
    return spec(_told(tensors, text, len(lacking)), _ROW * len(rows), layer=layers, small=len(columns) <= _FEW)


def thresholds(values: Sequence[float]) -> list[float]:
    """Where one colour ends and the next begins, evenly between least and most; none where all values are the same."""
    if not values or min(values) == max(values):
        return []
    least, most = min(values), max(values)
    return [least + (most - least) * step / RAMP_STEPS for step in range(1, RAMP_STEPS)]


def _cell(tensor: ReportTensor, text: FigureText) -> dict[str, Any]:
    return {
        "layer": _layer(tensor.layer),
        "kind": wording.shown(tensor.kind, 40),
        "value": _value(tensor, text),
        "total": wording.figure(tensor.total),
        "active": wording.percent(tensor.active),
        "entropy": wording.percent(tensor.entropy),
    }


def _value(tensor: ReportTensor, text: FigureText) -> float | None:
    """What is coloured; none for the logarithm of nothing."""
    value: float = getattr(tensor, text.key)
    if not text.log:
        return value
    return math.log10(value) if value > 0 else None


def _layer(layer: int | None) -> str:
    return OUTSIDE if layer is None else str(layer)


def _rank(kind: str) -> tuple[int, str]:
    """Attention, then feed-forward, each in the order of its computation, then all others by name."""
    stem = kind.removesuffix("_exps").removesuffix("_shexp")
    return (_ORDER.index(stem) if stem in _ORDER else len(_ORDER)), kind


def _told(tensors: Sequence[ReportTensor], text: FigureText, lacking: int) -> str:
    least = min(tensors, key=lambda tensor: getattr(tensor, text.key))
    most = max(tensors, key=lambda tensor: getattr(tensor, text.key))

    def named(tensor: ReportTensor) -> str:
        value = getattr(tensor, text.key)
        where = f" of layer {tensor.layer}" if tensor.layer is not None else ""
        return f"{wording.figure(value) if text.log else wording.percent(value)} ({wording.shown(tensor.kind, 40)}{where})"

    told = f"{text.name} of {wording.many(len(tensors), 'tensor')}: {text.meaning}. From {named(least)} to {named(most)}."
    if any(tensor.layer is None for tensor in tensors):
        told += f" The column {OUTSIDE} is outside the layers."
    return told + (f" Crossed out: {wording.many(lacking, 'tensor')} without data." if lacking else "")


def expert_groups(experts: Sequence[ReportExperts]) -> list[tuple[str, tuple[ReportExperts, ...]]]:
    """Kinds of tensors with the same figures in every layer, for one router serves several, under one name."""
    by_kind: dict[str, list[ReportExperts]] = {}
    for each in experts:
        by_kind.setdefault(each.kind, []).append(each)

    def series(item: tuple[str, list[ReportExperts]]) -> str:
        return repr([(each.layer, each.experts, each.without_tokens, each.fewest, each.median, each.most) for each in item[1]])

    named = sorted(by_kind.items(), key=series)
    groups = [list(group) for _, group in groupby(named, key=series)]
    return sorted(
        (wording.shown(", ".join(sorted((kind for kind, _ in group), key=_rank))), tuple(group[0][1])) for group in groups
    )


def coverage(report: Report) -> Spec | None:
    """Tokens per expert in every layer: from the fewest to the most, and the median; layers with untouched experts marked."""
    experts = report.imatrix.experts if report.imatrix is not None else ()
    if not experts or len(experts) > MOST_CELLS:
        return None
    groups = expert_groups(experts)
    rows: list[dict[str, Any]] = [
        {
            "layer": _layer(each.layer),
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
    beside = {"xOffset": {"field": "of"}} if len(groups) > 1 else {}
    shared = {"x": x, "color": kinds("of", palette, **({} if beside else {"legend": None})), **beside}
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
                "encoding": {"x": x, **beside, "y": {"field": "fewest", **y}, "tooltip": tips},
            }
        )
    fewest = min(experts, key=lambda each: each.fewest)
    told = (
        f"Tokens per expert over {wording.many(len(columns), 'layer')} of {max(each.experts for each in experts)} experts, in "
        f"{'; '.join(name for name, _ in groups)}: between {fewest.fewest:,} (layer {_layer(fewest.layer)}) and {top:,}."
    )
    if untouched:
        most = max(untouched, key=lambda row: int(row["without"]))
        told += (
            f" In {wording.many(len({row['layer'] for row in untouched}), 'layer')} some experts saw no token, most in layer "
            f"{most['layer']} ({most['told']}); they are quantised as if all their inputs mattered alike."
        )
    return spec(told, 300, data={"values": rows}, layer=layers)


def _cycle(number: int) -> list[str]:
    names = ("accent", "twin", "other", "soft")
    return [names[at % len(names)] for at in range(number)]
