"""Which stage of which model begins next: a pure function of what is done, what runs, and how much disk there is.

Every model goes through *download*, *prepare* (conversion and plan), then for each group of levels *make* and, where they are
removed afterwards, *publish*; *complete* publishes the rest and looks at everything. Stages
of different models overlap: at a time one download, one upload, and one computation in each compute lane. One machine is one
compute lane; a cluster has one for each worker. The disk bound holds at every moment, and no order of events can end in two
models that wait for each other's space: a stage begins only if afterwards the models could still be finished one after another
(the banker's algorithm).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Stage = Literal["download", "prepare", "make", "publish", "complete"]
Lane = Literal["network in", "compute", "network out"]
Keep = Literal["all", "levels", "nothing"]

LANES: dict[Stage, Lane] = {
    "download": "network in",
    "prepare": "compute",
    "make": "compute",
    "publish": "network out",
    "complete": "network out",
}
"""What each stage occupies; one stage at a time in each lane, of which there may be several to compute."""

MOST_GROUPS = 2
"""Groups of levels of one model that are on the disk at a time, where they are removed after they were published."""


@dataclass(frozen=True)
class ModelNeeds:
    """Bytes that a model takes. ``download``: of its files on the hub (0: it is on the disk already, and not ours);
    ``converted``: of the GGUF made from them (0: they are one); ``groups``: of the levels that are made and published
    together. ``publishes``: there is a repository to publish to. ``keep``: what stays;
    ``working``: bytes of files that are there only while levels are made and measured."""

    download: int
    converted: int
    groups: tuple[int, ...]
    publishes: bool
    keep: Keep
    working: int = 0

    @property
    def rotates(self) -> bool:
        """Whether levels are removed once they were published."""
        return self.keep == "nothing" and self.publishes

    @property
    def source(self) -> int:
        """Bytes that stay on the disk while levels are made."""
        if self.keep == "all":
            return self.download + self.converted
        return self.converted or self.download

    @property
    def final(self) -> int:
        """Bytes that stay when the model is done."""
        levels = 0 if self.rotates else sum(self.groups)
        return levels + (self.download + self.converted if self.keep == "all" else 0)

    @property
    def levels_peak(self) -> int:
        """Most bytes of levels at a time."""
        if not self.rotates:
            return sum(self.groups)
        pairs = [sum(self.groups[at : at + MOST_GROUPS]) for at in range(len(self.groups))]
        return max(pairs, default=0)

    @property
    def peak(self) -> int:
        """Most bytes at a time."""
        return max(self.download + self.converted, self.source + self.levels_peak + self.working)


@dataclass(frozen=True)
class StageStart:
    """A stage of a model. ``group``: the number of the group of levels for ``make`` and ``publish``. ``compute_lane``: the
    number, from 0, of the compute lane that ``prepare`` and ``make`` take; 0 for others."""

    model: str
    stage: Stage
    group: int = 0
    compute_lane: int = 0

    @property
    def lane(self) -> Lane:
        return LANES[self.stage]


@dataclass(frozen=True)
class ModelProgress:
    """What is done of a model. ``made``, ``published``, ``gone`` (removed): numbers of groups of levels. ``ended``: nothing
    more is to be done, because it is finished or failed, and ``left`` bytes of it stay on the disk. ``there``: bytes that were
    found there. ``compute_lane``: the one that computed it last, which takes it again where it is free: the model is known
    there."""

    name: str
    needs: ModelNeeds
    downloaded: bool = False
    prepared: bool = False
    made: frozenset[int] = frozenset()
    published: frozenset[int] = frozenset()
    gone: frozenset[int] = frozenset()
    completed: bool = False
    ended: bool = False
    left: int = 0
    there: int = 0
    compute_lane: int | None = None

    def held(self, running: Sequence[StageStart]) -> int:
        """Bytes that the model has, or has reserved for its ``running`` stages."""
        if self.ended:
            return self.left
        return max(self.there, self._reserved(running))

    def _reserved(self, running: Sequence[StageStart]) -> int:
        mine = {start.stage: start for start in running if start.model == self.name}
        needs = self.needs
        if not self.prepared:
            fetched = needs.download if self.downloaded or "download" in mine else 0
            return fetched + (needs.converted if "prepare" in mine else 0)
        growing = {mine["make"].group} if "make" in mine else set()
        groups = (self.made | growing) - self.gone
        return needs.source + sum(needs.groups[group] for group in groups) + (needs.working if growing else 0)

    def begun(self, running: Sequence[StageStart]) -> bool:
        """Whether the model has bytes on the disk that only its end can free."""
        return not self.ended and self.held(running) > 0

    def next_stages(self, running: Sequence[StageStart]) -> list[StageStart]:
        """The stages that could begin now, if lanes and disk were free."""
        mine = [start for start in running if start.model == self.name]
        needs = self.needs
        if self.ended:
            return []
        if not self.downloaded:
            return [] if mine else [StageStart(self.name, "download")]
        if not self.prepared:
            return [] if mine else [StageStart(self.name, "prepare")]
        found = []
        everything = frozenset(range(len(needs.groups)))
        if needs.rotates and all(start.stage != "publish" for start in mine):
            waiting = sorted(self.made - self.published)
            found += [StageStart(self.name, "publish", group) for group in waiting[:1]]
        if needs.publishes and not mine and self.made >= everything and (not needs.rotates or self.published >= everything):
            found += [] if self.completed else [StageStart(self.name, "complete")]
        if all(start.stage != "make" for start in mine):
            missing = [group for group in range(len(needs.groups)) if group not in self.made]
            there = len(self.made - self.gone) if needs.rotates else 0
            if missing and there < MOST_GROUPS:
                found.append(StageStart(self.name, "make", missing[0]))
        return found

    @property
    def finished(self) -> bool:
        """Whether every stage is done."""
        return (
            self.prepared
            and self.made >= frozenset(range(len(self.needs.groups)))
            and (self.completed or not self.needs.publishes)
        )


Models: TypeAlias = Sequence[ModelProgress]


def is_safe(models: Models, running: Sequence[StageStart], limit: int) -> bool:
    """Whether the models that have begun could be finished one after another, in order, within ``limit`` bytes."""
    ended = sum(model.left for model in models if model.ended)
    begun = [model for model in models if model.begun(running)]
    for at, model in enumerate(begun):
        before = sum(other.needs.final for other in begun[:at])
        after = sum(other.held(running) for other in begun[at + 1 :])
        if ended + before + max(model.needs.peak, model.there) + after > limit:
            return False
    return True


def held_bytes(models: Models, running: Sequence[StageStart]) -> int:
    """Bytes that all models have or have reserved."""
    return sum(model.held(running) for model in models)


def next_starts(models: Models, running: Sequence[StageStart], limit: int, lanes: int = 1) -> list[StageStart]:
    """The stages to begin now. ``models``: in the order in which they should be worked on; ``limit``: bytes of disk; ``lanes``:
    models that are computed at a time."""
    starts: list[StageStart] = []
    for model in models:
        for start in model.next_stages(running):
            now = [*running, *starts]
            free = _free_lanes(start.lane, now, lanes)
            if not free or not is_safe(models, [*now, start], limit):
                continue
            number = model.compute_lane if model.compute_lane in free else free[0]
            starts.append(replace(start, compute_lane=number))
    return starts


def _free_lanes(lane: Lane, now: Sequence[StageStart], lanes: int) -> list[int]:
    """The numbers of the lanes of a kind that no stage has."""
    busy = {start.compute_lane for start in now if start.lane == lane}
    return [number for number in range(lanes if lane == "compute" else 1) if number not in busy]


def without_room(models: Models, running: Sequence[StageStart], limit: int) -> ModelProgress | None:
    """The first model that can go no further because it would not fit, where nothing runs and nothing can begin; else None."""
    if running or next_starts(models, running, limit):
        return None
    return next((model for model in models if model.next_stages(running)), None)


def disk_without_bound(peaks: Iterable[int], lanes: int = 1) -> int | None:
    """Bytes that a batch takes which keeps nothing and was given no bound: what its largest models take that are computed at
    a time; None for no models."""
    largest = sorted(peaks, reverse=True)[:lanes]
    return sum(largest) if largest else None


def peak_bytes(models: Models, limit: int, lanes: int = 1) -> tuple[int, tuple[str, ...]]:
    """The most bytes that are held at a time if every stage takes equally long, and the models that do not fit."""
    state, running, most = {model.name: model for model in models}, list[StageStart](), 0
    misfits: list[str] = []
    while True:
        now = list(state.values())
        running += next_starts(now, running, limit, lanes)
        most = max(most, held_bytes(now, running))
        if not running:
            stuck = without_room(now, running, limit)
            if stuck is None:
                return most, tuple(misfits)
            misfits.append(stuck.name)
            state[stuck.name] = replace(stuck, ended=True, left=stuck.held(()))
            continue
        finished = running.pop(0)
        state[finished.model] = after(state[finished.model], finished)


def after(model: ModelProgress, done: StageStart) -> ModelProgress:
    """The model once a stage is done."""
    now = replace(
        model,
        downloaded=model.downloaded or done.stage == "download",
        prepared=model.prepared or done.stage == "prepare",
        made=model.made | ({done.group} if done.stage == "make" else set()),
        published=model.published | ({done.group} if done.stage == "publish" else set()),
        gone=model.gone | ({done.group} if done.stage == "publish" else set()),
        completed=model.completed or done.stage == "complete",
        compute_lane=done.compute_lane if done.lane == "compute" else model.compute_lane,
    )
    return replace(now, ended=True, left=now.needs.final) if now.finished else now
