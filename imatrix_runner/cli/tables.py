"""The plan and the result as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imatrix_runner.cli.report_table import print_report
from imatrix_runner.files import human_bytes, human_seconds
from imatrix_runner.workflow.plan import ImatrixStep, LevelFacts, LevelStep, Plan
from imatrix_runner.workflow.run import RunResult

_STATES = {"todo": ("to do", ""), "up-to-date": ("up to date", "green"), "fails": ("will fail", "bold red")}
_STATUSES = {"done": ("done", "green"), "skipped": ("up to date", ""), "failed": ("failed", "bold red")}


def print_plan(plan: Plan, console: Console) -> None:
    """Every level with its size, the total, and each reason that needs to be known."""
    console.print(Text(f"Workspace {plan.workspace}"))
    console.print(Text(_imatrix_line(plan.imatrix)))
    if not plan.levels:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", title="Plan", title_justify="left", title_style="bold")
    for heading in ("Level", "Size", "Bits/weight", "Imatrix", "Fallback", "State"):
        table.add_column(heading, justify="right" if heading in ("Size", "Bits/weight") else "left", no_wrap=heading != "State")
    for step in plan.levels:
        state, style = _STATES[step.state]
        table.add_row(
            step.level.name,
            _size(step.facts.n_bytes),
            _bits(step.facts),
            _imatrix_cell(step.facts, plan.imatrix),
            _fallback_cell(step.facts),
            Text(state, style=style),
        )
    console.print(table)
    for line in _remarks(plan):
        console.print(line)
    console.print(
        Text(
            f"{len(plan.todo)} of {len(plan.levels)} levels to make, {human_bytes(plan.new_bytes)} to write, "
            f"{human_bytes(plan.free_bytes)} free."
        )
    )


def _remarks(plan: Plan) -> list[Text]:
    lines = [
        Text(f"{', '.join(names)} will fail: {reason}. {remedy}", style="red")
        for (reason, remedy), names in _alike(plan.failing).items()
    ]
    for step in plan.levels:
        if step.facts.fallbacks:
            first = step.facts.fallbacks[0]
            lines.append(
                Text(
                    f"{step.level.name}: {len(step.facts.fallbacks)} tensors ({step.facts.fallback_share:.1%} of the weights) "
                    "get another type, because their rows do not divide into blocks; "
                    f"{first.tensor}: {first.wanted} -> {first.got}",
                    style="yellow",
                )
            )
        told = {
            "are quantised without weights": step.facts.weightless,
            "weigh all columns alike, because their entries counted no token": step.facts.unseen,
            "without data are pinned by --uncovered": step.facts.pinned,
        }
        lines += [
            Text(f"{step.level.name}: {len(names)} tensors {what}, the first is {names[0]}", style="yellow")
            for what, names in told.items()
            if names
        ]
    return lines


def _alike(steps: Sequence[LevelStep]) -> dict[tuple[str, str], list[str]]:
    """Names of levels by what is wrong with them and what to do."""
    found: dict[tuple[str, str], list[str]] = {}
    for step in steps:
        found.setdefault((step.reason, step.remedy), []).append(step.level.name)
    return found


def print_result(result: RunResult, console: Console) -> None:
    """What became of every level, and where the files are; once they were measured, the report's table."""
    if result.evaluated is not None and result.report is not None:
        print_report(result.report.report, console)
        print_failures(result, console)
    elif result.levels:
        table = Table(box=None, pad_edge=False, header_style="bold", title="Result", title_justify="left", title_style="bold")
        for heading in ("Level", "Size", "Of source", "Bits/weight", "Fallback", "Time", "State"):
            numbers = heading in ("Size", "Of source", "Bits/weight", "Time")
            table.add_column(heading, justify="right" if numbers else "left", no_wrap=heading != "State")
        for level in result.levels:
            state, style = _STATUSES[level.status]
            table.add_row(
                level.step.level.name,
                _size(level.n_bytes),
                f"{level.n_bytes / result.model.n_bytes:.0%}" if level.n_bytes else "-",
                _bits(level.step.facts),
                _fallback_cell(level.step.facts),
                human_seconds(level.seconds) if level.seconds else "-",
                Text(state, style=style),
            )
        console.print(table)
        print_failures(result, console)
    if result.report is not None and not result.report.stale:
        console.print(Text(f"Report: {result.report.html}"))
    console.print(Text(f"{_summary(result)} in {human_seconds(result.seconds)}, in {result.plan.workspace}"))


def print_failures(result: RunResult, console: Console) -> None:
    """What went wrong, a line for each level."""
    for level in result.failed:
        assert level.error is not None
        line = f"{level.step.level.name}: {level.error.what}; {level.error.why}. {level.error.todo}"
        console.print(Text(line, style="red"))
    unmeasured = result.evaluated.failed if result.evaluated is not None else {}
    for name, error in unmeasured.items():
        console.print(Text(f"{name} could not be measured: {error.what}; {error.why}. {error.todo}", style="red"))


def _summary(result: RunResult) -> str:
    if not result.levels:
        return "Imatrix ready"
    counts = {status: sum(level.status == status for level in result.levels) for status in _STATUSES}
    kept = "was" if counts["skipped"] == 1 else "were"
    words = [f"{counts['done']} made", f"{counts['skipped']} {kept} up to date", f"{counts['failed']} failed"]
    return ", ".join(word for word, count in zip(words, counts.values(), strict=True) if count)


def _imatrix_line(step: ImatrixStep) -> str:
    if step.action == "none":
        return f"Imatrix: none, {step.reason}"
    if step.action == "generate":
        return f"Imatrix: generate {step.path}, {step.n_chunks} chunks ({step.reason})"
    if step.action == "fetch":
        return f"Imatrix: fetch ({step.reason})"
    return f"Imatrix: {step.path} ({step.reason})"


def _size(n_bytes: int | None) -> str:
    return human_bytes(n_bytes) if n_bytes is not None else "unknown"


def _bits(facts: LevelFacts) -> str:
    return f"{facts.bits_per_weight:.2f}" if facts.bits_per_weight is not None else "-"


def _imatrix_cell(facts: LevelFacts, imatrix: ImatrixStep) -> str:
    if facts.needs_imatrix:
        return "required"
    return "used" if imatrix.present else "none"


def _fallback_cell(facts: LevelFacts) -> Text:
    if not facts.fallbacks:
        return Text("-")
    return Text(f"{len(facts.fallbacks)} ({facts.fallback_share:.0%})", style="yellow")
