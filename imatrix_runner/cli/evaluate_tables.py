"""What ``evaluate`` plans and what came of it, for people and as a document."""

from __future__ import annotations

from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from imatrix_runner.cli.documents import document, measured_content
from imatrix_runner.cli.failures import failure_lines
from imatrix_runner.cli.report_table import print_files, print_report
from imatrix_runner.files import human_bytes
from imatrix_runner.report.wording import shown
from imatrix_runner.workflow.evaluate import EvaluateResult, MeasurePlan
from imatrix_runner.workflow.measuring import Subject
from imatrix_runner.workflow.report import ReportFiles


def print_measure_plan(plan: MeasurePlan, console: Console) -> None:
    """What is measured with what, and what it takes on the disk."""
    stick = plan.yardstick
    extent, space = stick.extent, stick.fit
    what = f"Measured on {shown(stick.name)}: {extent.n_chunks} chunks of {extent.n_ctx}, {extent.n_tokens:,} tokens scored"
    console.print(Text(f"{what}."))
    todo = [subject.name for subject in plan.todo]
    known = sum(not subject.todo and subject.name not in plan.same for subject in plan.subjects)
    told = f"To measure: {', '.join(todo) or 'nothing'}"
    console.print(Text(told + (f"; {known} known already." if known else ".")))
    if plan.twins:
        console.print(Text(f"Made without imatrix, measured and removed: {', '.join(plan.twins)}."))
    for name, of in plan.same.items():
        console.print(Text(f"{name} holds the same tensors as {of}, and has its figures.", style="dim"))
    for name, why in plan.alone.items():
        console.print(Text(f"{name} {why}.", style="yellow"))
    if not (todo or plan.twins):
        return
    anew = ", and anew for twins" if plan.twins else ""
    passes = "one pass" if space.n_passes == 1 else f"{space.n_passes} passes{anew}, because of --max-disk"
    disk = f"Disk: at most {human_bytes(space.n_bytes)} at a time, {human_bytes(plan.free_bytes)} free"
    console.print(Text(f"{disk}; the source is computed in {passes}."))


def print_reported(report: ReportFiles | None, console: Console) -> None:
    """The table, and where the report lies."""
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
    plan, stick = result.plan, result.plan.yardstick
    report = result.report
    return document(
        "evaluate",
        exit_code=exit_code,
        workspace=str(result.workspace.root),
        plan={
            "text": stick.name,
            "sha256": stick.sha256,
            "chunks": stick.extent.n_chunks,
            "context": stick.extent.n_ctx,
            "tokens": stick.extent.n_tokens,
            "overlap": stick.overlap,
            "disk_bytes": stick.fit.n_bytes,
            "passes": stick.fit.n_passes,
            "levels": [_planned(subject) for subject in plan.subjects],
            "twins": list(plan.twins),
            "without_twin": dict(plan.alone),
            "same": dict(plan.same),
        },
        measured=measured_content(result),
        picks=[msgspec.to_builtins(pick) for pick in report.report.picks] if report is not None else [],
        report=[str(path) for path in report.paths] if report is not None else [],
    )


def _planned(subject: Subject) -> dict[str, str]:
    return {"level": subject.name, "state": "todo" if subject.todo else "up-to-date", "reason": subject.reason}
