"""The levels of a run: which they are, whether they can be made at all, and how they are made."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace

from imatrix_runner.app.background_uploads import LevelUploads
from imatrix_runner.context.context import Session
from imatrix_runner.context.requests import LevelsRequest
from imatrix_runner.engines.jobs import PassFigures
from imatrix_runner.engines.levels import DEFAULT_LEVELS, PLAIN_FTYPES, Level, offered, preset_levels, resolve_levels
from imatrix_runner.engines.roundings import STOCK
from imatrix_runner.errors import InvalidDataError, NoSpaceError
from imatrix_runner.events import Sink, info, warning
from imatrix_runner.files import existing_parent, human_bytes
from imatrix_runner.imatrix.covariances import CovarianceSet
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.mixes.targets import is_mix
from imatrix_runner.quantize.executor import LevelMaker, MadeLevels, refused, skipped
from imatrix_runner.quantize.plan import LevelStep, Plan
from imatrix_runner.quantize.planner import LevelPlanner
from imatrix_runner.toolchain.quant_type import QuantType


def refuse_hopeless(plan: Plan, *, one_by_one: bool = False) -> None:
    """Raise if the disk cannot hold the plan's files (unless ``one_by_one``), or if no level of it can be made."""
    needed = plan.new_bytes + plan.passing_bytes
    if needed > plan.free_bytes and not one_by_one:
        raise NoSpaceError(
            f"The {len(plan.todo)} levels do not fit on the disk" if plan.todo else "The imatrix does not fit on the disk",
            f"{human_bytes(needed)} needed, {human_bytes(plan.free_bytes)} free at {existing_parent(plan.workspace)}",
            "Free some space, request fewer --levels, make what fits with --one-by-one, or choose another --work-dir.",
        )
    if plan.levels and len(plan.failing) == len(plan.levels):
        first = plan.failing[0]
        many = len(plan.levels) > 1
        raise InvalidDataError(
            f"None of the {len(plan.levels)} levels can be made" if many else f"{first.level.name} cannot be made",
            f"{first.level.name}: {first.reason}" if many else first.reason,
            first.remedy or "See every reason with --dry-run, or choose other levels.",
        )


def make_levels(
    plan: Plan,
    planner: LevelPlanner,
    matrix: MatrixFile | None,
    session: Session,
    covariances: CovarianceSet | None = None,
    uploads: LevelUploads | None = None,
) -> MadeLevels:
    """Make the levels of a plan that are not up to date; results are in the order of the request. ``covariances``: for those
    that are rounded with error feedback; ``uploads`` gets every finished level."""
    results = {step.level.name: skipped(step) for step in plan.levels if step.state == "up-to-date"}
    if uploads is not None:
        for name in results:
            uploads.add(name)
    results.update({step.level.name: refused(step) for step in plan.failing})
    _report_changes(plan.todo, session.sink)
    passes: tuple[PassFigures, ...] = ()
    if plan.todo:
        weights = planner.weights(matrix)
        maker = LevelMaker(planner.request, planner.frozen, session, matrix, weights, session.sink, covariances)
        maker = replace(maker, on_made=uploads.add) if uploads is not None else maker
        made = maker.run(plan.todo)
        passes = made.passes
        results.update({result.step.level.name: result for result in made.results})
    else:
        shutil.rmtree(session.workspace.partial, ignore_errors=True)  # of a run that was killed at its very end
    return MadeLevels(tuple(results[step.level.name] for step in plan.levels), passes)


def _report_changes(steps: tuple[LevelStep, ...], sink: Sink) -> None:
    """Emit what changed since the levels were made, one line for each reason."""
    for reason in dict.fromkeys(step.reason for step in steps if step.reason.startswith("changed: ")):
        names = [step.level.name for step in steps if step.reason == reason]
        sink(info(f"{', '.join(names)} made again, {reason}"))


def rounded(level: Level, request: LevelsRequest) -> Level:
    """A level with the rounding of the request, unless it names its own or quantises nothing."""
    return level if level.rounding != STOCK or level.ftype.upper() in PLAIN_FTYPES else level.rounded(request.rounding)


def choose_levels(request: LevelsRequest, types: Sequence[QuantType], sink: Sink) -> tuple[Level, ...]:
    """The stock levels of a request, each once. A preset's levels that this llama.cpp does not offer are left out, with a
    warning."""
    stock = tuple(name for name in request.names if not is_mix(name))
    if request.preset:
        levels, missing = preset_levels(request.preset, types)
        if missing:
            sink(warning(f"This llama.cpp does not offer {', '.join(missing)}; the preset continues without."))
        named = resolve_levels(stock, types) if stock else ()
        return tuple({level.name: level for level in (*levels, *named)}.values())
    if request.names and not stock:
        return ()
    return resolve_levels(stock or tuple(name for name in DEFAULT_LEVELS if name in offered(types)), types)
