"""The report on a terminal: every level's figures in one table, which to take, and whether the imatrix was worth it."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from imatrix_runner.cli.columns import Column, fitted_table
from imatrix_runner.engines.measures import Divergence
from imatrix_runner.evaluate.answers import DomainResult
from imatrix_runner.evaluate.twins import RULE, Comparison
from imatrix_runner.files import human_bytes, human_seconds
from imatrix_runner.report.document import Report, ReportLevel
from imatrix_runner.report.provenance import source_kind
from imatrix_runner.report.wording import error, figure, kld, kld_error, percent, points, shown, signed
from imatrix_runner.workflow.report import ReportFiles

PICKED = "*"
"""What stands behind the name of a recommended level."""


def print_report(report: Report, console: Console) -> None:
    """Levels from the largest, the recommended ones, and comparisons and answers if there are any."""
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
                f"{evaluation.n_ctx}, against the {source_kind(report.model)} source; the source's PPL is "
                f"{figure(evaluation.ppl.value)} ± {error(evaluation.ppl)}. {_LEGEND}",
                style="dim",
            )
        )
    for pick in report.picks:
        line = Text(f"{PICKED} {shown(pick.level)}", style="bold green")
        console.print(line.append(f" ({pick.why}): {shown(pick.rule)}", style="not bold default"))
    for caveat in report.caveats:
        console.print(Text(shown(caveat, 600), style="yellow"))
    if report.comparisons:
        console.print()
        console.print(fitted_table(_TWINS, report.comparisons, console, title="With and without imatrix"))
        if evaluation is not None:
            console.print(Text(f"Measured on {shown(evaluation.text)}.", style="dim"))
        console.print(Text(RULE, style="dim"))
    for alone in report.without_twin:
        console.print(Text(f"{shown(alone.level)} {shown(alone.why, 600)}.", style="yellow"))
    if report.domain:
        console.print()
        console.print(fitted_table(_ANSWERS, report.domain, console, title="Answers to your prompts"))


def print_files(files: ReportFiles, console: Console) -> None:
    """Where the page lies, and the picture if there is one."""
    console.print(Text(f"Report: {files.html}"))
    if files.picture is not None:
        console.print(Text(f"Picture: {files.picture}"))


_LEGEND = (
    "KLD: how far predictions are from the source's, in nats (0: the same). PPL: against the source's. Same top: how often "
    "both put the same token first. Δp: how much the right token's probability changes."
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
        Column("Time", lambda level: human_seconds(level.own_seconds) if level.seconds else None, 4),
    )


_TWINS: tuple[Column[Comparison], ...] = (
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
