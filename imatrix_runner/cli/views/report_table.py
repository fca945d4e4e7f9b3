"""Prints the report on a terminal: every level's figures, recommendations, and comparisons with baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from imatrix_runner.app.evaluate import EvaluateResult, MeasurePlan
from imatrix_runner.app.report import ReportFiles
from imatrix_runner.cli.views.columns import Column, fitted_table
from imatrix_runner.cli.views.failures import failure_lines
from imatrix_runner.cli.views.json_documents import document, measured_content
from imatrix_runner.engines.measures import Divergence
from imatrix_runner.evaluate.ab_verdict import RULE, Comparison
from imatrix_runner.evaluate.answer_agreement import DomainResult
from imatrix_runner.evaluate.measure import Subject
from imatrix_runner.evaluate.measurements import ReportEvaluation
from imatrix_runner.evaluate.mix_verdict import describe
from imatrix_runner.evaluate.tasks.task_verdict import TASK_RULE
from imatrix_runner.files import human_bytes, human_seconds
from imatrix_runner.report.document import Report, ReportLevel, source_kind
from imatrix_runner.report.views.task_lines import TaskRow, task_remarks, task_rows
from imatrix_runner.report.views.wording import error, figure, kld, kld_error, percent, points, rate, signed, speed_setting
from imatrix_runner.safe_text import shown

PICKED = "*"
"""Mark after the name of a recommended level."""


def print_report(report: Report, console: Console) -> None:
    """Print the levels from the largest, recommendations, and comparisons and answers if there are any."""
    picked = {pick.level for pick in report.picks}
    table = fitted_table(
        _level_columns(picked),
        report.rows,
        console,
        title="Report",
        style=lambda level: "green" if level.name in picked else "",
    )
    console.print(table)
    evaluation = report.evaluation
    if evaluation is not None:
        console.print(
            Text(
                f"Measured on {shown(evaluation.text)}: {evaluation.n_tokens:,} tokens in {evaluation.n_chunks} chunks of "
                f"{evaluation.n_ctx}{_until(evaluation)}, against the {source_kind(report.model)} source; the source's PPL is "
                f"{figure(evaluation.ppl.value)} ± {error(evaluation.ppl)}. {_LEGEND}",
                style="dim",
            )
        )
    if report.speed_setting is not None:
        own = f" The source: {rate(report.source_speed.generation)} tokens/s." if report.source_speed is not None else ""
        console.print(Text(speed_setting(report.speed_setting) + own, style="dim"))
    for pick in report.picks:
        line = Text(f"{PICKED} {shown(pick.level)}", style="bold green")
        console.print(line.append(f" ({pick.why}): {shown(pick.rule)}", style="not bold default"))
    for caveat in report.caveats:
        console.print(Text(shown(caveat, 600), style="yellow"))
    for level in report.rows:
        found = level.against.held_out if level.against is not None else None
        if evaluation is not None and found is not None and found.is_better:
            console.print(Text(shown(describe(found, evaluation.text), 600)))
    if report.comparisons:
        console.print()
        console.print(fitted_table(_BASELINES, report.comparisons, console, title="With and without imatrix"))
        if evaluation is not None:
            console.print(Text(f"Measured on {shown(evaluation.text)}.", style="dim"))
        console.print(Text(RULE, style="dim"))
    for alone in report.without_twin:
        console.print(Text(f"{shown(alone.level)} {shown(alone.why, 600)}.", style="yellow"))
    if report.domain:
        console.print()
        console.print(fitted_table(_ANSWERS, report.domain, console, title="Answers to your prompts"))
    if report.tasks:
        console.print()
        console.print(fitted_table(_TASKS, task_rows(report.tasks), console, title="Tasks", style=_task_style))
        for remark in task_remarks(report.tasks):
            console.print(Text(shown(remark, 600), style="yellow"))
        console.print(Text(TASK_RULE, style="dim"))


def print_files(files: ReportFiles, console: Console) -> None:
    """Print the paths of the page and, if there is one, of the picture."""
    console.print(Text(f"Report: {files.html}"))
    if files.picture is not None:
        console.print(Text(f"Picture: {files.picture}"))


_LEGEND = (
    "KLD: how far predictions are from the source's, in nats (0: the same). PPL: against the source's. Same top: how often "
    "both rank the same token first. Δp: how much the right token's probability changes."
)


def _level_columns(picked: set[str]) -> tuple[Column[ReportLevel], ...]:
    def measured(form: Callable[[Divergence], str]) -> Callable[[ReportLevel], str | None]:
        return lambda level: form(level.measured) if level.measured is not None else None

    return (
        Column("Level", lambda level: shown(level.label) + (f" {PICKED}" if level.name in picked else ""), left=True),
        Column("Size", lambda level: human_bytes(level.n_bytes)),
        Column("Bits/weight", lambda level: f"{level.bits_per_weight:.2f}" if level.bits_per_weight is not None else None, 3),
        Column("Mean KLD", measured(lambda found: kld_error(found.kld))),
        Column("PPL", lambda level: f"{points(level.ppl_ratio.value - 1)} %" if level.ppl_ratio is not None else None, 1),
        Column("Same top", measured(lambda found: percent(found.same_top.value))),
        Column("Δp RMS", measured(lambda found: percent(found.dp_rms.value)), 2),
        Column("Tokens/s", lambda level: rate(level.speed.generation) if level.speed is not None else None),
        Column("Prompt t/s", lambda level: rate(level.speed.prompt) if level.speed is not None else None, 5),
        Column("Memory", lambda level: human_bytes(level.speed.n_bytes) if level.speed is not None else None, 6),
        Column("Time", lambda level: human_seconds(level.own_seconds) if level.seconds else None, 4),
    )


_BASELINES: tuple[Column[Comparison], ...] = (
    Column("Level", lambda pair: shown(pair.level), left=True),
    Column("KLD with", lambda pair: kld(pair.with_imatrix.kld.value), 1),
    Column("without", lambda pair: kld(pair.without.kld.value), 2),
    Column("Saved", lambda pair: f"{points(pair.saved.value, 1)} ± {percent(pair.saved.error)}"),
    Column("PPL", lambda pair: f"{signed(pair.ppl.value)} ± {figure(pair.ppl.error)}", 4),
    Column("Same top", lambda pair: f"{points(pair.same_top.value)} %", 3),
    Column("Verdict", lambda pair: pair.verdict + (f" ({pair.remark})" if pair.remark else ""), left=True),
)

_ANSWERS: tuple[Column[DomainResult], ...] = (
    Column("Level", lambda found: shown(found.level), left=True),
    Column("Prompts", lambda found: f"{found.n_prompts}", 2),
    Column("Same answer", lambda found: percent(found.same)),
    Column("Same tokens", lambda found: percent(found.shared)),
    Column("Agree for", lambda found: f"{found.agreement_mean:.1f} of {found.n_predict} tokens", 1),
    Column("Median", lambda found: f"{found.agreement_median:.10g}", 3),
)


_TASKS: tuple[Column[TaskRow], ...] = (
    Column("Level", lambda row: shown(row.level), left=True),
    Column("Task", lambda row: ("  " if row.found.part else "") + shown(row.found.task), left=True),
    Column("Metric", lambda row: shown(row.found.metric), 3, left=True),
    Column("Items", lambda row: f"{row.found.n_items}", 2),
    Column("Source", lambda row: row.source),
    Column("Score", lambda row: row.score),
    Column("Difference", lambda row: row.difference),
    Column("Verdict", lambda row: row.verdict, left=True),
)


def _task_style(row: TaskRow) -> str:
    return "bold red" if row.found.is_alarm else ""


def print_measure_plan(plan: MeasurePlan, console: Console) -> None:
    """Print what is measured on which text, and the disk space it takes."""
    held_out = plan.held_out
    extent, space = held_out.extent, held_out.fit
    what = f"Measured on {shown(held_out.name)}: {extent.n_chunks} chunks of {extent.n_ctx}, {extent.n_tokens:,} tokens scored"
    if held_out.until is not None:
        what += f" at most, each level until the standard error of its KLD is below {percent(held_out.until)}"
    console.print(Text(f"{what}."))
    todo = [subject.name for subject in plan.todo]
    known = sum(not subject.todo and subject.name not in plan.same for subject in plan.subjects)
    names = f"To measure: {', '.join(todo) or 'nothing'}"
    console.print(Text(names + (f"; {known} known already." if known else ".")))
    if plan.baselines:
        console.print(Text(f"Made without imatrix, measured and removed: {', '.join(plan.baselines)}."))
    for name, of in plan.same.items():
        console.print(Text(f"{name} holds the same tensors as {of}, and gets its figures.", style="dim"))
    for name, why in plan.alone.items():
        console.print(Text(f"{name} {why}.", style="yellow"))
    if not (todo or plan.baselines):
        return
    anew = ", and again for baselines" if plan.baselines else ""
    passes = "one pass" if space.n_passes == 1 else f"{space.n_passes} passes{anew}, because of --max-disk"
    disk = f"Disk: at most {human_bytes(space.n_bytes)} at a time, {human_bytes(plan.free_bytes)} free"
    console.print(Text(f"{disk}; the source is computed in {passes}."))


def _until(evaluation: ReportEvaluation) -> str:
    """What qualifies the number of chunks."""
    return f" at most, each level to {percent(evaluation.until)} of its KLD" if evaluation.until is not None else ""


def print_reported(report: ReportFiles | None, console: Console) -> None:
    """Print the table and the report's paths."""
    if report is None:
        return
    print_report(report.report, console)
    if not report.stale:
        print_files(report, console)


def print_failed(result: EvaluateResult, console: Console) -> None:
    for line in failure_lines(result.failed):
        console.print(Text(line, style="red"))


def evaluate_document(result: EvaluateResult, exit_code: int) -> dict[str, Any]:
    """``levels`` are the figures of :class:`~imatrix_runner.engines.measures.Divergence` by name."""
    plan, held_out = result.plan, result.plan.held_out
    report = result.report
    return document(
        "evaluate",
        exit_code=exit_code,
        workspace=str(result.workspace.root),
        plan={
            "text": held_out.name,
            "sha256": held_out.sha256,
            "chunks": held_out.extent.n_chunks,
            "context": held_out.extent.n_ctx,
            "tokens": held_out.extent.n_tokens,
            "until_precise": held_out.until,
            "overlap": held_out.overlap,
            "disk_bytes": held_out.fit.n_bytes,
            "passes": held_out.fit.n_passes,
            "levels": [_planned(subject) for subject in plan.subjects],
            "twins": list(plan.baselines),
            "without_twin": dict(plan.alone),
            "same": dict(plan.same),
        },
        measured=measured_content(result),
        picks=[msgspec.to_builtins(pick) for pick in report.report.picks] if report is not None else [],
        report=[str(path) for path in report.paths] if report is not None else [],
    )


def _planned(subject: Subject) -> dict[str, str]:
    return {"level": subject.name, "state": "todo" if subject.todo else "up-to-date", "reason": subject.reason}
