"""Scores on tasks in the table, on the page and on the card; and the caveat that an alarm is."""

from __future__ import annotations

import html
import io
from dataclasses import replace

from rich.console import Console

from imatrix_runner.cli.views.report_table import print_report
from imatrix_runner.evaluate.tasks.task_verdict import TaskItems, TaskScores, compare_scores
from imatrix_runner.report.document import Report
from imatrix_runner.report.facts.caveats import caveats
from imatrix_runner.report.views.card import render_card
from imatrix_runner.report.views.page import render_html
from support.reports import measures, sample_report

SOURCE = (1.0,) * 150 + (0.0,) * 50
NAME = "a <b>|task|"
"""From a file of others."""


def printed(report: Report) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=300, highlight=False, markup=False, emoji=False))
    return stream.getvalue()


def scored() -> Report:
    report = sample_report()
    one, other = report.levels[0].name, report.levels[1].name
    bad = compare_scores(
        TaskItems(NAME, "acc", SOURCE, (0.0,) * 40 + (1.0,) * 110 + (0.0,) * 50), "the level answered nothing to 9 of 200"
    )
    good = compare_scores(TaskItems(NAME, "acc", SOURCE, (0.0,) + (1.0,) * 150 + (0.0,) * 49))
    part = replace(good, task="a part", part=True)
    tasks = (
        TaskScores(one, (good, part), ran_code=True, limit=200, harness="0.4.13"),
        TaskScores(other, (bad,), ran_code=True, limit=200, harness="0.4.13"),
    )
    report = sample_report(tasks=tasks)
    return replace(report, caveats=caveats(report, measures(report.levels)))


def test_all_views_show_the_same_rows() -> None:
    report = scored()
    card, table, page = render_card(report), printed(report), html.unescape(render_html(report))
    for text in (card, table, page):
        assert "no difference seen with 200 items (one of 5 points needs about 150)" in text
        assert "ALARM (40 lost, 0 gained)" in text
        assert "−20.0 ± 2.8 (p" in text
        assert "the level answered nothing to 9 of 200" in text
        assert "Only the first 200 items of each task" in text
        assert "run in a sandbox" in text
        assert "McNemar" in text
        assert "Alarm: much less is right than with the source" in text


def test_names_of_tasks_are_made_safe() -> None:
    report = scored()
    assert "<b>" not in render_card(report).replace("\\<b", "")
    assert "a <b>" not in render_html(report)


def test_without_tasks_there_is_nothing_about_them() -> None:
    report = sample_report()
    assert "lm-evaluation-harness" not in render_card(report) + render_html(report) + printed(report)
