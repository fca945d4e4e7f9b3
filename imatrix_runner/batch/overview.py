"""What a batch looks like at one moment: the value that its page, its tables and its JSON document are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from imatrix_runner.batch.batch_journal import BatchHistory, ModelHistory, ThreeLines
from imatrix_runner.batch.batch_list import BatchEntry
from imatrix_runner.batch.forecast import RemainingWork, Speeds, batch_seconds
from imatrix_runner.errors import RunnerError
from imatrix_runner.models.model import model_name

ModelState = Literal["waiting", "running", "done", "failed"]
BatchState = Literal["running", "finished", "stopped"]

STAGE_TITLES = {
    "check": "Check",
    "download": "Download",
    "prepare": "Prepare",
    "make": "Make levels",
    "publish": "Publish",
    "complete": "Publish the rest",
}


@dataclass(frozen=True)
class LiveStage:
    """How far a running stage is. ``share``: 0 to 1, None where that is not known. ``compute_lane``: the number, from 0, of the
    worker that computes it, where there are several; else None."""

    stage: str
    title: str
    share: float | None = None
    compute_lane: int | None = None

    @property
    def line(self) -> str:
        """The stage for people: ``Make levels: Q4_K_M (worker 2)``."""
        return self.title + (f" (worker {self.compute_lane + 1})" if self.compute_lane is not None else "")


@dataclass(frozen=True)
class LevelView:
    """A level of a model: ``state`` is ``waiting``, ``made``, ``published`` or ``failed``."""

    name: str
    n_bytes: int
    state: str


@dataclass(frozen=True)
class ModelView:
    """One model of a batch. ``seconds``: that its stages took until now; ``remaining``: expected, None if not known."""

    model: str
    state: ModelState
    priority: int = 0
    publish: str = ""
    url: str = ""
    stages: tuple[LiveStage, ...] = ()
    levels: tuple[LevelView, ...] = ()
    source: int = 0
    seconds: float = 0.0
    remaining: float | None = None
    failed_at: str = ""
    failure: ThreeLines | None = None
    failed_levels: Mapping[str, ThreeLines] = field(default_factory=dict)

    @property
    def n_made(self) -> int:
        return sum(level.state in ("made", "published") for level in self.levels)

    @property
    def failed(self) -> bool:
        return self.failure is not None or bool(self.failed_levels)


@dataclass(frozen=True)
class WatchView:
    """A place that is watched. ``looked``: when last, as the clock said then (empty: not yet); ``listed``: models there then;
    ``added``: how many of them were added in all; ``problem``: why the last look failed. ``ended``: it is not looked at any
    more."""

    place: str
    looked: str = ""
    listed: int = 0
    added: int = 0
    problem: str = ""
    ended: bool = False


@dataclass(frozen=True)
class BatchView:
    """A whole batch. ``faults``: lines that were added to the list and are not understood. ``held``: bytes of the batch's own
    files on the disk; ``limit``: bytes that it may take, None where that is not known; ``lanes``: models that are computed at
    a time."""

    file: str
    state: BatchState
    models: tuple[ModelView, ...]
    remaining: float | None
    command: str = ""
    began: str = ""
    held: int = 0
    limit: int | None = None
    faults: tuple[ThreeLines, ...] = ()
    watches: tuple[WatchView, ...] = ()
    lanes: int = 1

    def count(self, state: ModelState) -> int:
        return sum(model.state == state for model in self.models)


def overview(
    file: str,
    state: BatchState,
    entries: Sequence[BatchEntry],
    history: BatchHistory,
    *,
    live: Mapping[str, Sequence[LiveStage]] | None = None,
    work: Mapping[str, RemainingWork] | None = None,
    problems: Mapping[str, ThreeLines] | None = None,
    speeds: Speeds | None = None,
    held: int = 0,
    limit: int | None = None,
    faults: Sequence[ThreeLines] = (),
    watching: Sequence[str] | None = None,
    lanes: int = 1,
) -> BatchView:
    """The view of a batch. ``live``: running stages by model, where this process runs them; ``work``: what is left by model;
    ``problems``: why models cannot be worked on, from the check; ``watching``: the places that this process still watches
    (None: another one may watch those that the journal names); ``lanes``: models that are computed at a time."""
    speeds = speeds or Speeds()
    models = []
    for entry in entries:
        known = history.models.get(entry.model)
        current = known if known is not None and known.entry in ("", entry.fingerprint) else ModelHistory()
        remaining = work.get(entry.model) if work is not None else None
        running = live.get(entry.model, ()) if live is not None else _running(current) if state == "running" else ()
        problem = (problems or {}).get(entry.model)
        models.append(_model(entry, current, tuple(running), problem, remaining.seconds(speeds) if remaining else None))
    left = (
        [work[model.model] for model in models if model.state in ("waiting", "running") and model.model in work] if work else []
    )
    total = batch_seconds(left, speeds, lanes) if work is not None else None
    began = history.began
    command, at = (began.command, began.at) if began is not None else ("", "")
    watches = watch_views(history, watching)
    return BatchView(file, state, tuple(models), total, command, at, held, limit, tuple(faults), watches, lanes)


def watch_views(history: BatchHistory, watching: Sequence[str] | None) -> tuple[WatchView, ...]:
    """The places that the journal names, and those of ``watching`` that were not looked at yet."""
    views = []
    for place in dict.fromkeys((*history.looks, *(watching or ()))):
        last = history.looks.get(place)
        ended = watching is not None and place not in watching
        known = (last.at, last.listed, history.found.get(place, 0), last.problem) if last is not None else ("", 0, 0, "")
        views.append(WatchView(place, *known, ended))
    return tuple(views)


def watch_line(view: WatchView) -> str:
    """A watched place for people."""
    state = "was watched" if view.ended else "is watched"
    looked = f"last looked at {view.looked}, {view.listed} models there" if view.looked else "not looked at yet"
    problem = f". The last look failed: {view.problem}" if view.problem else ""
    return f"{view.place} {state}: {looked}, {view.added} added{problem}"


def _running(history: ModelHistory) -> tuple[LiveStage, ...]:
    return tuple(
        LiveStage(stage, stage_title(stage, began.levels), compute_lane=began.compute_lane)
        for stage, began in history.running.items()
    )


def stage_title(stage: str, levels: Sequence[str] = ()) -> str:
    """A stage for people: ``Make levels: Q4_K_M``."""
    named = f": {', '.join(levels[:3])}{' …' if len(levels) > 3 else ''}" if levels and stage in ("make", "publish") else ""
    return STAGE_TITLES[stage] + named


def _model(
    entry: BatchEntry,
    history: ModelHistory,
    running: tuple[LiveStage, ...],
    problem: ThreeLines | None,
    remaining: float | None,
) -> ModelView:
    failure = history.failure.error if history.failure is not None else problem
    failed_at = STAGE_TITLES[history.failure.stage if history.failure is not None else "check"] if failure is not None else ""
    state: ModelState = "running" if running else "failed" if failure is not None else "waiting"
    if history.done is not None and not running:
        state = "failed" if history.failed_levels else "done"
    planned = history.prepared.levels if history.prepared is not None else ()
    levels = tuple(LevelView(level.name, level.n_bytes, _level_state(history, level.name)) for level in planned)
    return ModelView(
        entry.model,
        state,
        entry.priority,
        _repository(entry),
        history.done.url if history.done is not None else "",
        running,
        levels,
        history.prepared.source if history.prepared is not None else 0,
        history.seconds,
        None if state in ("done", "failed") else remaining,
        failed_at,
        failure,
        dict(history.failed_levels),
    )


def _repository(entry: BatchEntry) -> str:
    """Where an entry is published to; as the list says it, where its model has no usable name."""
    try:
        return entry.repository(model_name(entry.model)) if entry.publish else ""
    except RunnerError:
        return entry.publish


def _level_state(history: ModelHistory, name: str) -> str:
    if name in history.failed_levels:
        return "failed"
    done = history.done is not None and bool(history.done.url)
    if name in history.published or (done and name in history.made):
        return "published"
    return "made" if name in history.made else "waiting"
