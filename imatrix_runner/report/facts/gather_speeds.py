"""How fast the levels run, as the journal knows it, and which of them is picked for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from imatrix_runner.evaluate.measurements import SPEED_OF_SOURCE, speed_of_source, speeds
from imatrix_runner.evaluate.recommendations import Measure, Pick
from imatrix_runner.evaluate.speed_figures import MeasuredSpeed, SpeedSetting, fast_enough
from imatrix_runner.events import Sink, warning
from imatrix_runner.files import encode_json
from imatrix_runner.journal import Journal
from imatrix_runner.report.document import ReportSpeed
from imatrix_runner.steps import step_id
from imatrix_runner.untrusted import UnreadableError, from_json


@dataclass(frozen=True)
class KnownSpeeds:
    """Speeds by level, all of one ``setting``; ``source``: the source's."""

    levels: Mapping[str, MeasuredSpeed] = field(default_factory=dict)
    source: MeasuredSpeed | None = None
    setting: SpeedSetting | None = None

    def of(self, level: str) -> ReportSpeed | None:
        found = self.levels.get(level)
        return described(found) if found is not None else None


def known_speeds(journal: Journal, levels: Collection[str], source: str, sink: Sink) -> KnownSpeeds:
    """The speeds that were measured with the machine and options of the newest. ``source``: the source's fingerprint."""
    found = {name: each for name, each in speeds(journal).items() if name in levels}
    own = speed_of_source(journal, source)
    timed = {**found, **({SPEED_OF_SOURCE: own} if own is not None else {})}
    if not timed:
        return KnownSpeeds()
    setting = timed[max(timed, key=lambda name: journal[step_id("speed", name)].finished)].setting
    same = {name: each for name, each in timed.items() if each.setting == setting}
    if others := [name for name in timed if name not in same]:
        sink(warning(f"{', '.join(others)}: timed on another machine or with other options; the report leaves that out."))
    return KnownSpeeds(
        {name: each for name, each in same.items() if name in found},
        same.get(SPEED_OF_SOURCE),
        replace(setting, machine=""),
    )


def described(found: MeasuredSpeed) -> ReportSpeed:
    return ReportSpeed(found.prompt, found.generation, found.buffers)


def remember_speed(journal: Journal, least: float | None, pick: Pick | None = None) -> None:
    """Record the tokens/s that the picked level shall generate; None: no level is picked for it. ``pick``: the level, where it
    was not picked by its figures with the options alone."""
    value = [least, pick.level if pick is not None else "", pick.rule if pick is not None else ""]
    journal.remember(min_speed=encode_json(value).decode())


def speed_pick(journal: Journal, measures: Sequence[Measure], known: KnownSpeeds) -> tuple[Pick, ...]:
    """The level picked for the speed that ``--min-speed`` asked for."""
    try:
        least, level, rule = from_json(journal.fact("min_speed") or '[null,"",""]', tuple[float | None, str, str])
    except UnreadableError:
        return ()  # the next run with --speed writes it anew
    if least is None:
        return ()
    if level:
        return (Pick("speed", level, rule),) if any(each.level == level for each in measures) else ()
    pick = fast_enough(measures, known.levels, least)
    return (pick,) if pick is not None else ()
