"""The charts of a report: what stands in their data and their words, that Vega-Lite accepts them, and the picture."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import pytest
import vl_convert

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import byte_unit
from imatrix_runner.report.document import Report
from imatrix_runner.report.views import charts, heat
from imatrix_runner.report.views.charts import Spec, log_ticks
from imatrix_runner.report.views.colours import COLOURS, RAMP_STEPS, palette, resolved
from imatrix_runner.report.views.costs import cost_heat
from imatrix_runner.report.views.labels import Spot, place
from imatrix_runner.report.views.pareto import pareto, render_png
from support import reports

DENSE, MOE, BARE = reports.sample_report(), reports.moe_report(), reports.bare_report()
MIXED = reports.mixed_report()
HOSTILE = '</script><img src=x onerror="alert(1)">\x1b[2J\u202e'


def layer(spec: Spec | None, name: str) -> dict[str, Any]:
    assert spec is not None
    return next(each for each in spec["layer"] if each.get("name") == name)


def values(spec: Spec | None, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = layer(spec, name)["data"]["values"]
    return found


def all_charts(report: Report) -> dict[str, Spec | None]:
    return {
        "pareto": pareto(report),
        "saved": charts.saved(report),
        "curve": charts.curve(report),
        "coverage": heat.coverage(report),
        "costs": cost_heat(report),
        **{figure.key: heat.heat_map(report, figure.key) for figure in heat.FIGURES},
    }


def test_every_measured_level_and_every_baseline_is_a_point_with_its_own_figures() -> None:
    points = values(pareto(DENSE), "points")
    levels = {each["level"]: each for each in points if each["role"] != "without imatrix"}
    assert set(levels) == set(reports.LEVELS)
    for level in DENSE.levels:
        assert level.measured is not None
        assert levels[level.name]["kld"] == level.measured.kld.value
        assert levels[level.name]["x"] * 2**30 == pytest.approx(level.n_bytes)
    baselines = {each["level"]: each["kld"] for each in points if each["role"] == "without imatrix"}
    assert baselines == {each.level: each.without.kld.value for each in DENSE.comparisons}


def test_recommended_levels_stand_out_and_are_named_wide_and_narrow() -> None:
    points = values(pareto(DENSE), "points")
    picked = [each for each in points if each["role"] == "recommended"]
    assert {each["level"] for each in picked} == {pick.level for pick in DENSE.picks}
    colours = layer(pareto(DENSE), "points")["encoding"]["color"]["scale"]
    assert dict(zip(colours["domain"], colours["range"], strict=True)) == {
        "recommended": "var(--accent)",
        "other levels": "var(--other)",
        "without imatrix": "var(--baseline)",
    }
    assert all(each["wide"]["shown"] and each["narrow"]["shown"] for each in picked)


def test_the_front_is_a_line_through_the_levels_no_other_beats() -> None:
    line = [round(each["kld"], 6) for each in values(pareto(DENSE), "front")]
    assert line == sorted(line, reverse=True)
    assert reports.LEVELS["Q4_0"][1] not in line
    assert len(line) == len(reports.LEVELS) - 1


def test_a_level_without_any_divergence_is_named_in_words_instead() -> None:
    first = DENSE.levels[0]
    exact = replace(first, name="BF16", measured=reports.divergence(0.0))
    chart = pareto(replace(DENSE, levels=(exact, *DENSE.levels[1:])))
    assert "BF16" not in [each["level"] for each in values(chart, "points")]
    assert chart is not None
    assert "BF16, with a KLD of 0" in chart["description"]


def test_levels_that_are_all_the_same_as_the_source_are_drawn_too() -> None:
    same = tuple(replace(level, measured=reports.divergence(0.0)) for level in DENSE.levels[:2])
    report = replace(DENSE, levels=same, comparisons=(), picks=())
    chart = pareto(report)
    assert [each["kld"] for each in values(chart, "points")] == [0, 0]
    assert layer(chart, "points")["encoding"]["y"]["title"] == "Mean KLD (nats)"
    assert render_png(report).startswith(b"\x89PNG")


def test_one_measured_level_alone_is_a_chart() -> None:
    alone = replace(DENSE, levels=DENSE.levels[:1], comparisons=())
    assert len(values(pareto(alone), "points")) == 1
    assert render_png(alone).startswith(b"\x89PNG")


@pytest.mark.parametrize(("n_bytes", "name"), [(900, "B"), (3_000_000, "MiB"), (5 * 2**30, "GiB"), (3 * 2**40, "TiB")])
def test_sizes_have_the_unit_of_the_largest(n_bytes: int, name: str) -> None:
    found, scale = byte_unit(n_bytes)
    assert found == name
    assert 1 <= n_bytes / scale < 1024


def test_the_ticks_of_a_log_scale_are_few_and_round() -> None:
    assert log_ticks(0.0006, 0.3) == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
    assert log_ticks(1e-5, 1) == [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1]


def test_saved_shares_are_percent_with_two_errors_and_the_limits_of_the_rule() -> None:
    rows = {each["level"]: each for each in values(charts.saved(DENSE), "bars")}
    for each in DENSE.comparisons:
        row = rows[each.level]
        assert row["saved"] == pytest.approx(100 * each.saved.value)
        assert row["high"] - row["low"] == pytest.approx(400 * each.saved.error)
        assert row["verdict"] == each.verdict
    chart = charts.saved(DENSE)
    assert chart is not None
    assert [each["at"] for each in chart["layer"][1]["data"]["values"]] == [3, 10]


def test_every_tensor_is_a_cell_and_those_without_data_are_crossed_out() -> None:
    assert MOE.imatrix is not None
    chart = heat.heat_map(MOE, "entropy")
    cells = values(chart, "cells")
    assert len(cells) == len(MOE.imatrix.tensors)
    assert cells[-1]["layer"] == heat.OUTSIDE
    assert [(each["layer"], each["kind"]) for each in values(chart, "lacking")] == [("15", "ffn_gate_exps")]
    domain = layer(chart, "cells")["encoding"]["x"]["scale"]["domain"]
    assert domain == [*map(str, range(16)), heat.OUTSIDE]


def test_colours_step_by_a_factor_for_strengths_and_evenly_for_shares() -> None:
    strengths = layer(heat.heat_map(DENSE, "total"), "cells")["encoding"]["color"]["scale"]
    assert DENSE.imatrix is not None
    totals = [tensor.total for tensor in DENSE.imatrix.tensors]
    assert 10 ** strengths["domain"][0] == pytest.approx(min(totals) * (max(totals) / min(totals)) ** (1 / RAMP_STEPS))
    assert len(strengths["range"]) == len(strengths["domain"]) + 1 == RAMP_STEPS
    assert heat.thresholds([0.3, 1.0]) == pytest.approx([0.3 + 0.1 * step for step in range(1, 7)])
    assert heat.thresholds([1.0, 1.0]) == []


def test_a_figure_that_is_the_same_everywhere_and_one_of_zero_are_drawn_too() -> None:
    assert DENSE.imatrix is not None
    tensors = tuple(
        replace(tensor, active=1.0, total=0.0 if at == 0 else tensor.total) for at, tensor in enumerate(reports.tensors())
    )
    report = replace(DENSE, imatrix=replace(DENSE.imatrix, tensors=tensors))
    assert "scale" not in layer(heat.heat_map(report, "active"), "cells")["encoding"]["color"]
    cells = values(heat.heat_map(report, "total"), "cells")
    assert cells[0]["value"] is None
    assert cells[0]["total"] == "0.000"


def test_the_curve_has_both_tensors_of_every_point_and_names_the_worst() -> None:
    chart = charts.curve(DENSE)
    assert chart is not None
    assert DENSE.imatrix is not None
    rows = chart["data"]["values"]
    assert len(rows) == 2 * len(DENSE.imatrix.curve)
    assert {row["tensor"] for row in rows if row["of"] == "worst tensor"} == {each.tensor for each in DENSE.imatrix.curve}


def test_experts_of_one_router_are_drawn_once_and_untouched_ones_marked() -> None:
    chart = heat.coverage(MOE)
    assert chart is not None
    rows = chart["data"]["values"]
    assert len(rows) == 16
    assert {row["of"] for row in rows} == {"ffn_gate_exps, ffn_up_exps, ffn_down_exps"}
    assert [row["layer"] for row in values(chart, "untouched")] == ["0"]
    assert "2 of 64" in chart["description"]


def test_kinds_with_figures_of_their_own_stand_beside_each_other() -> None:
    assert MOE.imatrix is not None
    experts = tuple(
        replace(each, most=each.most + 7) if each.kind == "ffn_down_exps" and each.layer == 3 else each
        for each in MOE.imatrix.experts
    )
    groups = heat.expert_groups(experts)
    assert [name for name, _ in groups] == ["ffn_down_exps", "ffn_gate_exps, ffn_up_exps"]
    chart = heat.coverage(replace(MOE, imatrix=replace(MOE.imatrix, experts=experts)))
    assert "xOffset" in layer(chart, "medians")["encoding"]


def test_what_the_report_lacks_has_no_chart() -> None:
    assert set(all_charts(BARE).values()) == {None}
    with pytest.raises(InvalidDataError, match="nothing to draw"):
        render_png(BARE)


def test_costs_are_coloured_by_their_logarithm_and_what_was_not_measured_is_crossed_out() -> None:
    assert MIXED.costs is not None
    chart = cost_heat(MIXED)
    cells = {(each["layer"], each["kind"]): each for each in values(chart, "cells")}
    measured = [each for each in MIXED.costs.tensors if each.measured]
    assert len(cells) == len(measured)
    for each in measured:
        assert 10 ** cells[heat.layer_name(each.layer), each.kind]["value"] == pytest.approx(each.cost)
    last = str(reports.N_LAYERS - 1)
    assert {(each["layer"], each["kind"]) for each in values(chart, "lacking")} == {(last, kind) for kind in reports.KINDS}


def test_the_costs_are_told_in_words_with_the_most_fragile_layer() -> None:
    chart = cost_heat(MIXED)
    assert chart is not None
    assert "to 0.00210 (ffn_down of layer 0)" in chart["description"]
    assert "Layer 0 has 25 % of the cost of all layers." in chart["description"]
    assert "Crossed out: 7 tensors" in chart["description"]


@pytest.mark.parametrize("report", [DENSE, MOE, MIXED], ids=["dense", "moe", "mixed"])
def test_vega_lite_draws_every_chart(report: Report) -> None:
    drawn = [name for name, chart in all_charts(report).items() if chart is not None]
    assert len(drawn) >= 6
    for chart in all_charts(report).values():
        if chart is not None:
            sized = resolved(chart) | {"width": 600}
            assert "var(--" not in json.dumps(sized)
            assert vl_convert.vegalite_to_svg(sized).startswith("<svg")


def test_descriptions_tell_real_figures() -> None:
    told = {name: chart["description"] for name, chart in all_charts(DENSE).items() if chart is not None}
    assert told["pareto"].startswith("Size against mean KLD for 10 levels: from Q8_0 with 7.95 GiB and 0.000790 to IQ2_M")
    assert "most for Q3_K_M with 23.7 %" in told["saved"]
    assert "225 tensors" in told["total"]
    assert "7.6 % in the worst tensor" in told["curve"]


def test_a_hostile_name_stays_a_bounded_text_in_the_data() -> None:
    assert MOE.imatrix is not None
    levels = (replace(MOE.levels[0], name=HOSTILE), *MOE.levels[1:])
    tensors = (replace(MOE.imatrix.tensors[0], kind=HOSTILE * 1000), *MOE.imatrix.tensors[1:])
    evil = replace(MOE, levels=levels, imatrix=replace(MOE.imatrix, tensors=tensors), model=replace(MOE.model, name=HOSTILE))
    for chart in all_charts(evil).values():
        text = json.dumps(chart, ensure_ascii=False)
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert HOSTILE * 2 not in text
    assert render_png(evil).startswith(b"\x89PNG")


def test_the_picture_is_1600_by_1000() -> None:
    png = render_png(DENSE)
    assert struct.unpack(">II", png[16:24]) == (1600, 1000)
    assert render_png(DENSE) == png


def test_names_cover_neither_each_other_nor_points() -> None:
    spots = [Spot(100 + 30 * at, 100 + 4 * at, f"Q{at}_K_M", must=at == 3) for at in range(6)]
    labels = place(spots, 400, 300, line=[(0, 90), (400, 140)])
    assert labels[3].shown
    boxes = []
    for spot, label in zip(spots, labels, strict=True):
        if label.shown:
            length = 7.4 * len(spot.text)
            left = spot.x + label.dx - {"left": 0, "center": length / 2, "right": length}[label.align]
            boxes.append((left, left + length, spot.y + label.dy - 7, spot.y + label.dy + 7))
    assert len(boxes) >= 3
    for at, (left, right, top, bottom) in enumerate(boxes):
        for other_left, other_right, other_top, other_bottom in boxes[at + 1 :]:
            assert right <= other_left or other_right <= left or bottom <= other_top or other_bottom <= top
        assert not any(left < spot.x < right and top < spot.y < bottom for spot in spots)


def test_a_name_that_must_be_shown_is_even_where_there_is_no_room() -> None:
    assert place([Spot(5, 5, "Q4_K_M", must=True), Spot(5, 6, "Q4_K_S")], 60, 12)[0].shown
    assert not place([Spot(5, 5, "Q4_K_M", must=True), Spot(5, 6, "Q4_K_S")], 50, 12)[1].shown


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("ground", ["paper", "raised"])
@pytest.mark.parametrize("text", ["ink", "soft", "accent", "baseline", "warn"])
def test_text_is_readable(text: str, ground: str, dark: bool) -> None:
    """WCAG 2.2 AA, 1.4.3."""
    assert contrast(palette(dark=dark)[text], palette(dark=dark)[ground]) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_marked_words_and_points_are_readable(dark: bool) -> None:
    colours = palette(dark=dark)
    assert min(contrast(colours["ink"], colours[mark]) for mark in ("removed", "added")) >= 4.5
    assert contrast(colours["other"], colours["paper"]) >= 3  # 1.4.11: what is no text
    assert set(COLOURS) < set(colours)


def contrast(one: str, other: str) -> float:
    bright, dim = sorted(map(luminance, (one, other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_names_that_must_be_written_do_not_cover_each_other_however_close_their_points_are() -> None:
    spots = [Spot(100 + 3 * at, 100 + 2 * at, f"Q{at}_K_M", must=True) for at in range(5)]
    labels = place(spots, 250, 420, line=[(0, 60), (250, 160)])
    assert all(label.shown for label in labels)
    tops = []
    for spot, label in zip(spots, labels, strict=True):
        width = 7.4 * len(spot.text)
        left = spot.x + label.dx - {"left": 0, "center": width / 2, "right": width}[label.align]
        tops.append((left, left + width, spot.y + label.dy - 7.5, spot.y + label.dy + 7.5))
    for at, one in enumerate(tops):
        for other in tops[at + 1 :]:
            assert one[0] >= other[1] or other[0] >= one[1] or one[2] >= other[3] or other[2] >= one[3]


def test_the_smallest_and_the_largest_level_are_named() -> None:
    chart = pareto(DENSE)
    assert chart is not None
    names = next(layer for layer in chart["layer"] if layer["name"] == "names")["data"]["values"]
    by_size = sorted(names, key=lambda each: each["x"])
    for end in (by_size[0], by_size[-1]):
        assert end["wide"]["shown"]
        assert end["narrow"]["shown"]


def test_a_name_that_is_wider_than_the_plot_is_not_written() -> None:
    assert not place([Spot(5, 5, "Q" * 60, must=True)], 250, 420)[0].shown
