"""Prints the plan and the result as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from imatrix_runner.app.run import RunResult
from imatrix_runner.cli.views.columns import Column, by_remark, fitted_table
from imatrix_runner.cli.views.failures import failure_lines
from imatrix_runner.cli.views.report_table import print_files, print_report
from imatrix_runner.evaluate.predict_levels import describe_predictions
from imatrix_runner.files import human_bytes, human_seconds
from imatrix_runner.imatrix.step import ImatrixStep
from imatrix_runner.mixes.measuring_work import describe_work
from imatrix_runner.quantize.executor import LevelResult
from imatrix_runner.quantize.level_facts import LevelFacts
from imatrix_runner.quantize.plan import LevelStep, MeasureStep, Plan
from imatrix_runner.report.views.running import local_commands

_STATES = {"todo": ("to do", ""), "up-to-date": ("up to date", "green"), "fails": ("will fail", "bold red")}
_STATUSES = {"done": ("done", "green"), "skipped": ("up to date", ""), "failed": ("failed", "bold red")}


def print_plan(plan: Plan, console: Console) -> None:
    """Print every level with its size, the total, and remarks."""
    console.print(Text(f"Workspace {plan.workspace}"))
    console.print(Text(_imatrix_line(plan.imatrix)))
    if not plan.levels:
        return
    table = fitted_table(_plan_columns(plan), plan.levels, console, title="Plan")
    console.print(table)
    for line in _remarks(plan):
        console.print(line)
    console.print(
        Text(
            f"{len(plan.todo)} of {len(plan.levels)} levels to make, {human_bytes(plan.new_bytes)} to write, "
            f"{human_bytes(plan.free_bytes)} free."
        )
    )
    if plan.predicted:
        console.print(Text(f"Predicted KLD: {describe_predictions(plan.predicted)}"))
    if plan.mixing is not None:
        n_mixes = sum(not step.files for step in plan.todo)
        console.print(Text(describe_work(plan.mixing, n_mixes)))
    if plan.measure is not None:
        console.print(Text(_measure_line(plan.measure)))


def _measure_line(step: MeasureStep) -> str:
    """A sentence on what ``--evaluate`` will do, and the disk space it takes."""
    baselines = ", each level with and without imatrix," if step.baselines else ""
    passes = "one pass" if step.n_passes == 1 else f"{step.n_passes} passes"
    return (
        f"Then measured{baselines} on {step.text}: {step.n_chunks} chunks of {step.n_ctx} tokens in {passes} of the source, "
        f"{human_bytes(step.n_bytes)} on the disk meanwhile."
    )


def _plan_columns(plan: Plan) -> tuple[Column[LevelStep], ...]:
    def predicted(step: LevelStep) -> str | None:
        found = plan.predicted.get(step.level.name)
        return f"{found.kld:.4f}" if found is not None else None

    return (
        Column("Level", lambda step: step.level.name, left=True),
        Column("Size", lambda step: _size(step.facts.n_bytes)),
        Column("Shards", lambda step: str(len(step.files)) if len(step.files) > 1 else None, 2),
        Column("Bits/weight", lambda step: _bits(step.facts), 2),
        Column("Imatrix", lambda step: _imatrix_cell(step.facts, plan.imatrix), 1, left=True),
        Column("Predicted KLD", predicted, 4),
        Column("Fallback", lambda step: _fallback_cell(step.facts), 3, left=True),
        Column("State", lambda step: Text(*_STATES[step.state]), left=True),
    )


def _remarks(plan: Plan) -> list[Text]:
    failures = by_remark((step.level.name, f"{step.reason}. {step.remedy}".rstrip(". ")) for step in plan.failing)
    lines = [Text(f"{names} will fail: {reason}", style="red") for reason, names in failures.items()]
    remarks = by_remark((step.level.name, remark) for step in plan.levels for remark in _remarks_on(step.facts))
    lines += [Text(f"{names}: {remark}", style="yellow") for remark, names in remarks.items()]
    pending = by_remark((step.level.name, step.reason) for step in plan.todo if not step.files)
    lines += [Text(f"{names}: {reason}") for reason, names in pending.items()]
    return lines + [Text(note, style="yellow") for note in plan.notes]


def _remarks_on(facts: LevelFacts) -> Iterator[str]:
    """Remarks on a level's types and weights, a sentence each."""
    if facts.fallbacks:
        first = facts.fallbacks[0]
        yield (
            f"{len(facts.fallbacks)} tensors ({facts.fallback_share:.1%} of the weights) get another type, because their rows "
            f"do not divide into blocks; {first.tensor}: {first.wanted} -> {first.got}"
        )
    remarks = {
        "are quantised without weights": facts.weightless,
        "weight all columns equally, because their entries counted no token": facts.unseen,
        "without data are pinned by --uncovered": facts.pinned,
    }
    for what, names in remarks.items():
        if names:
            yield f"{len(names)} tensors {what}, the first is {names[0]}"


def print_result(result: RunResult, console: Console) -> None:
    """Print the result of every level and where the files are; if levels were measured, the report's table."""
    if result.evaluated is not None and result.report is not None:
        print_report(result.report.report, console)
        print_failures(result, console)
    elif result.levels:
        columns = _result_columns(result.model.n_bytes)
        table = fitted_table(columns, result.levels, console, title="Result")
        console.print(table)
        print_failures(result, console)
        for line in _passes(result):
            console.print(Text(line))
    if result.report is not None and not result.report.stale:
        print_files(result.report, console)
    if result.report is not None:
        modelfiles = result.modelfiles
        for program, line in local_commands(result.report.report, result.plan.workspace, modelfiles):
            console.print(Text(f"{program}: {line}"), soft_wrap=True)
    console.print(Text(f"{_summary(result)} in {human_seconds(result.seconds)}, in {result.plan.workspace}"))


def _result_columns(source_bytes: int) -> tuple[Column[LevelResult], ...]:
    return (
        Column("Level", lambda level: level.step.level.name, left=True),
        Column("Size", lambda level: _size(level.n_bytes)),
        Column("Shards", lambda level: str(len(level.step.files)) if len(level.step.files) > 1 else None, 2),
        Column("Of source", lambda level: f"{level.n_bytes / source_bytes:.0%}" if level.n_bytes else "-", 3),
        Column("Bits/weight", lambda level: _bits(level.step.facts), 2),
        Column("Fallback", lambda level: _fallback_cell(level.step.facts), 4, left=True),
        Column("Time", _time, 1),
        Column("State", lambda level: Text(*_STATUSES[level.status]), left=True),
    )


def _time(level: LevelResult) -> str:
    """The time of a level; for one of several made in a pass, its share of the work."""
    if level.share is not None:
        return f"{level.share:.0%}"
    return human_seconds(level.seconds) if level.seconds else "-"


def _passes(result: RunResult) -> Iterator[str]:
    """The time of every pass that made several levels."""
    made = sum(level.share is not None for level in result.levels)
    for figures in result.passes:
        if len(figures.shares) > 1:
            took = human_seconds(figures.seconds)
            yield f"{made} levels in one pass of {took}; Time: each level's share of what it computed."


def print_failures(result: RunResult, console: Console) -> None:
    """Print what failed, a line for each cause."""
    failed = {level.step.level.name: level.error for level in result.failed if level.error is not None}
    unmeasured = result.evaluated.failed if result.evaluated is not None else {}
    for line in (*failure_lines(failed), *failure_lines(unmeasured, " could not be measured")):
        console.print(Text(line, style="red"))


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
