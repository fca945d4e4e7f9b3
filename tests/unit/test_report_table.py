"""The report on a terminal: what is shown, and what goes when there is no room."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from imatrix_runner.cli.views.report_table import print_report
from imatrix_runner.evaluate.ab_verdict import RULE
from imatrix_runner.report.document import Report, WithoutBaseline
from support.reports import bare_report, moe_report, sample_report


def printed(report: Report, width: int = 200) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width, highlight=False, markup=False, emoji=False))
    return stream.getvalue()


def row(text: str, level: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(level))


def test_every_level_stands_there_with_its_figures() -> None:
    report = sample_report()
    text = printed(report)
    for level in report.levels:
        assert level.measured is not None
        line = row(text, level.name)
        assert f"{level.bits_per_weight:.2f}" in line
        assert f"{100 * level.measured.same_top.value:.1f} %" in line
    assert "0.0181 ± 0.0002   +1.13 %    92.6 %   3.2 %" in row(text, "Q4_K_M")
    assert "25,600 tokens in 100 chunks of 512" in text


def test_recommended_levels_are_marked_and_their_rule_is_told() -> None:
    report = sample_report()
    text = printed(report)
    marked = {line.split(" *")[0] for line in text.splitlines() if " *  " in line}
    assert marked == {pick.level for pick in report.picks}
    for pick in report.picks:
        assert f"* {pick.level} ({pick.why}): {pick.rule}" in text


def test_comparisons_come_with_verdict_and_rule() -> None:
    text = printed(sample_report())
    baselines = text[text.index("With and without imatrix") :]
    assert "take it" in row(baselines, "Q4_K_M")
    assert "+14.2 ± 1.7 %" in row(baselines, "IQ4_XS")
    assert row(baselines, "Q6_K").endswith("not needed (within two standard errors)")
    assert RULE in baselines


def test_levels_of_the_same_tensors_share_a_row() -> None:
    report = sample_report()
    first, second, *rest = report.levels
    levels = (replace(first, others=(second.name,)), replace(second, same_as=first.name), *rest)
    text, _, _ = printed(replace(report, levels=levels)).partition("With and without imatrix")
    assert f"{first.name} (= {second.name})" in text
    assert not any(line.startswith(f"{second.name} ") for line in text.splitlines())


def test_what_the_figures_are_of_is_said_next_to_them() -> None:
    report = sample_report()
    model = replace(report.model, quantised="Q8_0", type="Q8_0")
    text = printed(
        replace(
            report,
            model=model,
            caveats=("No level is recommended: too few tokens were scored.",),
            without_twin=(WithoutBaseline("IQ2_M", "cannot be made without an imatrix: it needs one"),),
        )
    )
    assert "against the quantised Q8_0 source" in text
    assert "No level is recommended: too few tokens were scored." in text
    assert "IQ2_M cannot be made without an imatrix: it needs one." in text
    assert report.evaluation is not None
    assert f"Measured on {report.evaluation.text}." in text


def test_answers_are_summed_up() -> None:
    text = printed(sample_report())
    answers = text[text.index("Answers to your prompts") :]
    assert "33.3 %" in row(answers, "Q4_K_M")
    assert "of 128 tokens" in row(answers, "Q4_K_M")


def test_what_was_not_measured_is_not_there() -> None:
    text = printed(bare_report())
    for word in ("KLD", "PPL", "*", "imatrix", "Answers", "Measured", "-  "):
        assert word not in text
    assert "641.25 MiB" in row(text, "Q4_K_M")


def test_a_level_without_figures_among_others_has_dashes() -> None:
    report = sample_report()
    first = replace(report.levels[0], measured=None, ppl_ratio=None, bits_per_weight=None)
    line = row(printed(replace(report, levels=(first, *report.levels[1:]))), "Q8_0")
    assert line.split() == ["Q8_0", "7.95", "GiB", "-", "-", "-", "-", "-", "6:52"]


@pytest.mark.parametrize("width", [120, 80, 60, 50])
@pytest.mark.parametrize("report", [sample_report(), moe_report()], ids=["dense", "moe"])
def test_columns_go_before_a_figure_is_cut(width: int, report: Report) -> None:
    text = printed(report, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    levels = text[: text.index("Measured on")]
    assert all(len(row(levels, level.name).split()) >= 6 for level in report.levels)  # name, size, unit, KLD, ±, its error


def test_time_is_the_first_to_go_at_80_columns() -> None:
    head = printed(sample_report(), 80).splitlines()[1]
    assert head.split() == ["Level", "Size", "Bits/weight", "Mean", "KLD", "PPL", "Same", "top", "Δp", "RMS"]


def test_no_name_commands_the_terminal() -> None:
    report = sample_report()
    evil = "\x1b]0;owned\x07Q4\u202e[bold]"
    levels = (replace(report.levels[0], name=evil), *report.levels[1:])
    assert report.evaluation is not None
    text = printed(replace(report, levels=levels, evaluation=replace(report.evaluation, text=evil)))
    assert not set(text) & {"\x1b", "\x07", "\u202e"}
    assert "[bold]" in text
