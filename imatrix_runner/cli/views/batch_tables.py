"""Tables of a batch: its plan, its state, its failures."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from imatrix_runner.app.batch import BatchPlan
from imatrix_runner.app.batch_watch import PlaceLook
from imatrix_runner.batch.batch_journal import ThreeLines
from imatrix_runner.batch.check_list import CheckedModel
from imatrix_runner.batch.overview import BatchView, ModelView, watch_line
from imatrix_runner.cli.views.columns import Column, fitted_table
from imatrix_runner.files import human_bytes, human_seconds

_STYLES = {"running": "cyan", "done": "green", "failed": "red"}
_NOT_KNOWN = "not known"
_MOST_LEFT_OUT = 20


def print_batch_plan(plan: BatchPlan, console: Console) -> None:
    """The checked list: what will be done, in which order, how large it is, and what is wrong."""
    columns: list[Column[CheckedModel]] = [
        Column("Model", lambda model: model.entry.model, left=True),
        Column("Architecture", lambda model: model.architecture or None, 5, left=True),
        Column("Licence", lambda model: model.licence or None, 6, left=True),
        Column("Download", lambda model: human_bytes(model.missing) if model.missing else None, 3),
        Column("Source", lambda model: f"about {human_bytes(model.source)}" if model.source else None, 2),
        Column("Levels", lambda model: str(len(model.levels)) if model.levels else None),
        Column("Their size", lambda model: _about(sum(level.n_bytes for level in model.levels)), 1),
        Column("Publish to", lambda model: model.repo or None, 4, left=True),
        Column("Time", lambda model: _time(plan.model_seconds.get(model.entry.model)) if model.levels else None, 7),
        Column("Check", lambda model: _verdict(model, plan), left=True),
    ]
    console.print(fitted_table(columns, plan.models, console))
    room = f"{human_bytes(plan.limit)} may be taken (--keep {plan.keep})"
    lanes = f", {plan.lanes} models at a time" if plan.lanes > 1 else ""
    console.print(Text(f"Disk at the peak: about {human_bytes(plan.peak)}; {room}. Time: {_time(plan.seconds)}{lanes}."))
    for model in plan.models:
        for note in model.notes:
            console.print(Text(f"{model.entry.model}: {note}"))
    _print_failures(((model.entry.model, model.problem) for model in plan.problems if model.problem is not None), console)
    if plan.misfits:
        console.print(Text("Models that do not fit are left out, and tried again by the same command.", style="yellow"))


def print_looks(looks: Iterable[PlaceLook], console: Console) -> None:
    """What a look at each watched place would add now, and what is left out, with the reasons."""
    for look in looks:
        if look.problem:
            console.print(Text(f"{look.place} cannot be looked at now: {look.problem}", style="yellow"))
        elif look.first is not None:
            later = "those that appear later are added (--watch-since adds earlier ones)"
            console.print(Text(f"{look.place}: {look.listed} models are there; {later}."))
        else:
            names = ", ".join(model.entry.model for model in look.fitting) or "nothing"
            more = f", and {look.waiting} more would wait for later looks" if look.waiting else ""
            console.print(Text(f"{look.place}: {names} would be added now, of {look.listed} models{more}."))
        for name, why in look.left_out[:_MOST_LEFT_OUT]:
            console.print(Text(f"  {name} is left out: {why}."))
        if len(look.left_out) > _MOST_LEFT_OUT:
            console.print(Text(f"  {len(look.left_out) - _MOST_LEFT_OUT} more are left out (--json has all)."))


def print_batch(view: BatchView, console: Console) -> None:
    """The state of every model, then failures and what continues."""
    columns: list[Column[ModelView]] = [
        Column("Model", lambda model: model.model, left=True),
        Column("State", lambda model: Text(model.state, style=_STYLES.get(model.state, "")), left=True),
        Column("Levels", lambda model: f"{model.n_made}/{len(model.levels)}" if model.levels else None),
        Column("Took", lambda model: human_seconds(model.seconds) if model.seconds else None, 2),
        Column("Left", lambda model: human_seconds(model.remaining) if model.remaining else None, 3),
        Column("Now", lambda model: _now(model), left=True),
        Column("Published", lambda model: model.url or None, 1, left=True),
    ]
    console.print(fitted_table(columns, view.models, console))
    counts = ", ".join(
        f"{view.count(state)} {state}" for state in ("done", "failed", "running", "waiting") if view.count(state)
    )
    console.print(Text(f"{len(view.models)} models: {counts}. {human_bytes(view.held)} of the batch's files are on the disk."))
    for watch in view.watches:
        console.print(Text(watch_line(watch)))
    print_failures_of_batch(view, console)
    if view.state == "stopped" and view.command:
        console.print(Text(f"Continue with: {view.command}"))


def print_failures_of_batch(view: BatchView, console: Console) -> None:
    """Every failure with its three lines."""
    _print_failures(((model.model, model.failure) for model in view.models if model.failure is not None), console)
    for model in view.models:
        _print_failures(((f"{model.model}, {name}", error) for name, error in model.failed_levels.items()), console)
    _print_failures((("An addition", fault) for fault in view.faults), console)


def _print_failures(failures: Iterable[tuple[str, ThreeLines]], console: Console) -> None:
    for name, failure in failures:
        _print_failure(name, failure, console)


def _print_failure(name: str, failure: ThreeLines, console: Console) -> None:
    console.print(Text(f"{name}: {failure.what}.", style="red"))
    console.print(Text(f"  Why: {failure.why}."))
    console.print(Text(f"  Do:  {failure.do}"))


def _about(n_bytes: int) -> str | None:
    return f"about {human_bytes(n_bytes)}" if n_bytes else None


def _time(seconds: float | None) -> str:
    return f"about {human_seconds(seconds)}" if seconds else _NOT_KNOWN


def _verdict(model: CheckedModel, plan: BatchPlan) -> Text:
    if model.entry.model in plan.finished:
        return Text("done", style="green")
    if model.problem is not None:
        return Text("cannot be made", style="red")
    if model.entry.model in plan.misfits:
        return Text("does not fit", style="yellow")
    return Text("fits", style="green")


def _now(model: ModelView) -> str | None:
    parts = [stage.line + (f" {100 * stage.share:.0f} %" if stage.share is not None else "") for stage in model.stages]
    return "; ".join(parts) or (f"failed: {model.failed_at}" if model.failed_at else None)
