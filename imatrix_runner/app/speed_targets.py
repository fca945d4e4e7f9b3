"""Verifies mixes that were made for a speed: their files are timed."""

from __future__ import annotations

from collections.abc import Iterable

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.context.requests import SpeedRequest
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.evaluate.measure_speed import TimedFile, measure_speeds
from imatrix_runner.evaluate.measurements import content_of, levels_made
from imatrix_runner.evaluate.speed_figures import MeasuredSpeed, describe_rate, reaches
from imatrix_runner.events import info, warning
from imatrix_runner.mixes.mix_facts import levels_of_targets
from imatrix_runner.mixes.targets import SpeedTarget, Target


def verify_speeds(targets: Iterable[Target], options: CollectOptions, frozen: Frozen, session: Session) -> None:
    """Time the level of each target of a speed, and say whether it reaches it within its error. ``options`` as for the times of
    types. What was timed before is not timed again."""
    wanted = [target for target in targets if isinstance(target, SpeedTarget)]
    if not wanted:
        return
    chosen, made = levels_of_targets(session.journal), levels_made(session.journal)
    levels = {target: chosen[target.spelling].level for target in wanted if target.spelling in chosen}
    files = [
        TimedFile(name, session.workspace.root / made[name].output.name, content_of(made[name]))
        for name in dict.fromkeys(levels.values())
        if name in made
    ]
    found = measure_speeds(SpeedRequest(), options, frozen, files, session, again=False)
    for target, name in levels.items():
        speed = found.get(name)
        if not isinstance(speed, MeasuredSpeed):
            continue
        said = f"{target.spelling}: {name} generates {describe_rate(speed.generation)} tokens/s"
        if reaches(speed.generation, target.tokens_per_second):
            session.sink(info(f"{said}, as measured."))
        else:
            session.sink(warning(f"{said}, less than the times of types predicted; ask for more to get a smaller file."))
