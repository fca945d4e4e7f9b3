"""Works through a batch: begins stages as the schedule says, each in a thread, and records how they end."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.app.batch_stages import BatchStages
from imatrix_runner.app.batch_watch import BatchWatcher
from imatrix_runner.batch.batch_folder import BatchFolder
from imatrix_runner.batch.batch_journal import BatchJournal, ModelFailed, ModelRetried, StageBegan, StageDone, ThreeLines
from imatrix_runner.batch.batch_list import BatchEntry, OptionText, read_additions
from imatrix_runner.batch.check_list import CheckedModel, ListChecker, needs_of
from imatrix_runner.batch.forecast import RemainingWork, Speeds, write_speeds
from imatrix_runner.batch.model_sink import ModelSink
from imatrix_runner.batch.overview import BatchState, BatchView, LiveStage, overview, stage_title
from imatrix_runner.batch.release_files import bytes_there
from imatrix_runner.batch.schedule import (
    LANES,
    ModelNeeds,
    ModelProgress,
    Stage,
    StageStart,
    disk_without_bound,
    held_bytes,
    next_starts,
    without_room,
)
from imatrix_runner.context.context import Context
from imatrix_runner.context.requests import BatchRequest
from imatrix_runner.errors import InterruptedRunError, NoSpaceError, RunnerError
from imatrix_runner.events import info, warning
from imatrix_runner.files import human_bytes, human_seconds
from imatrix_runner.models.hub import is_passing

RETRY_SECONDS = (60.0, 300.0, 900.0)
"""Pauses before models are tried again that failed by an error of the network that may pass."""

_POLL_SECONDS = 0.5
_SHOW_SECONDS = 3.0
_LEFT_AT_LEAST = 1


@dataclass
class BatchWorker:
    """One command's work on a batch. ``models``: those to work on, by name; ``known``: options that additions may give, on
    the list's ``defaults``. ``lanes``: models that are computed at a time, each by a worker of its own."""

    request: BatchRequest
    folder: BatchFolder
    journal: BatchJournal
    checker: ListChecker
    known: frozenset[str]
    context: Context
    limit: int
    speeds: Speeds
    show: Callable[[BatchView], None] = lambda _view: None
    notify: Callable[[str, str, bool], None] = lambda _title, _text, _failed: None
    models: dict[str, CheckedModel] = field(default_factory=dict)
    defaults: Mapping[str, OptionText] = field(default_factory=dict)
    faults: list[ThreeLines] = field(default_factory=list)
    most_held: int = 0
    lanes: int = 1
    watcher: BatchWatcher | None = None

    def __post_init__(self) -> None:
        self._stages = BatchStages(self.request, self.folder, self.journal)
        self._running: dict[Future[None], StageStart] = {}
        self._live: dict[str, dict[str, LiveStage]] = {}
        self._downloaded = {name for name, model in self.models.items() if self._stages.is_downloaded(model)}
        self._prepared: set[str] = set()
        self._completed: set[str] = set()
        self._passing: set[str] = set()
        self._rounds = 0
        self._lock = threading.Lock()
        self._shown = 0.0
        self._additions = 0

    def work(self) -> None:
        """Work until every model is done or failed. Raises ``InterruptedRunError`` once a stop was requested and the running
        stages have ended."""
        for model in self.models.values():
            self._stages.sweep(model, self._context(model))
        n_threads = len({*LANES.values()}) + self.lanes - 1
        with ThreadPoolExecutor(max_workers=n_threads, thread_name_prefix="batch") as pool:
            while True:
                if not self.context.stop.requested:
                    self._take_additions()
                    self._begin_stages(pool)
                if not self._running:
                    if self.context.stop.requested or not (self._make_way() or self._await_additions()):
                        break
                    continue
                done, _ = wait(self._running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    del self._running[future]
                    future.result()
                self._show(state="running", now=bool(done))
        self._show(state="stopped" if self.context.stop.requested else "finished", now=True)
        self.context.stop.check()

    def view(self, state: BatchState) -> BatchView:
        """The batch as it is now."""
        order = self._order()
        with self._lock:
            live = {name: tuple(stages.values()) for name, stages in self._live.items()}
        problems = {name: model.problem for name, model in self.models.items() if model.problem is not None}
        return overview(
            str(self.request.file),
            state,
            [model.entry for model in order],
            self.journal.history,
            live=live,
            work={model.entry.model: self._remaining(model) for model in order},
            problems=problems,
            speeds=self.speeds,
            held=self._held(order),
            limit=self._room(),
            faults=self.faults,
            watching=self.watcher.places if self.watcher is not None and state == "running" else (),
            lanes=self.lanes,
        )

    # -- scheduling ---------------------------------------------------------------------------------------------------------

    def _order(self) -> list[CheckedModel]:
        """The models by priority, then by their place in the list."""
        return sorted(self.models.values(), key=lambda model: -model.entry.priority)

    def _progress(self, model: CheckedModel) -> ModelProgress:
        """What is done of a model, for the schedule."""
        name = model.entry.model
        history = self.journal.history.of(name)
        current = history.entry in ("", model.entry.fingerprint)
        needs, names = self._needs(model)
        over = current and (history.done is not None or history.failure is not None)
        if over or model.problem is not None:
            return ModelProgress(name, needs, ended=True, left=bytes_there(list(history.files.values())))
        done = {*history.published, *history.made} | {*history.failed_levels} if current else set()
        published = {*history.published, *history.failed_levels} if current else set()
        there = {file.level for file in history.files_of("level")}
        rotating = frozenset(range(len(names))) if needs.rotates else frozenset()
        return ModelProgress(
            name,
            needs,
            name in self._downloaded,
            name in self._prepared,
            frozenset(number for number, group in enumerate(names) if {*group} <= done),
            frozenset(number for number, group in enumerate(names) if {*group} <= published),
            frozenset(number for number, group in enumerate(names) if {*group} <= published - there) & rotating,
            name in self._completed,
            there=bytes_there(list(history.files.values())),
            compute_lane=history.compute_lane,
        )

    def _needs(self, model: CheckedModel) -> tuple[ModelNeeds, list[tuple[str, ...]]]:
        """The disk that a model takes, exactly once it is planned; and the names of the levels of each group."""
        history, keep = self.journal.history.of(model.entry.model), self.request.keep
        prepared = history.prepared
        if prepared is None or history.entry != model.entry.fingerprint:
            needs, levels = model.needs(keep), model.levels
        else:
            levels = prepared.levels
            own = self._own_download(model)
            download = model.download if own else 0
            converted = prepared.source if prepared.converted else 0
            sizes = tuple(level.n_bytes for level in levels)
            needs = needs_of(download, converted, sizes, publishes=bool(model.repo), keep=keep, working=prepared.working)
        names: list[tuple[str, ...]] = [(level.name,) for level in levels]
        if not needs.rotates:
            names = [tuple(level.name for level in levels)]
        return needs, names[: len(needs.groups)]

    def _own_download(self, model: CheckedModel) -> bool:
        return model.own_download or "download" in self.journal.history.of(model.entry.model).intended.values()

    def _room(self) -> int:
        """Bytes that may be taken: with ``--keep nothing`` and no ``--max-disk`` the most that the models take which are
        computed at a time."""
        if self.request.keep != "nothing" or self.request.max_disk is not None:
            return self.limit
        peaks = [self._needs(model)[0].peak for model in self.models.values() if model.problem is None]
        wanted = disk_without_bound(peaks, self.lanes)
        return self.limit if wanted is None else min(self.limit, wanted)

    def _begin_stages(self, pool: ThreadPoolExecutor) -> None:
        models = [self._progress(model) for model in self._order()]
        running = [*self._running.values()]
        for start in next_starts(models, running, self._room(), self.lanes):
            model = self.models[start.model]
            levels = self._needs(model)[1][start.group] if start.stage in ("make", "publish") else ()
            lane = start.compute_lane if self.lanes > 1 and start.lane == "compute" else None
            self.journal.append(StageBegan(start.model, model.entry.fingerprint, start.stage, levels, lane))
            with self._lock:
                title = stage_title(start.stage, levels)
                self._live.setdefault(start.model, {})[start.stage] = LiveStage(start.stage, title, compute_lane=lane)
            self._running[pool.submit(self._stage, model, start, levels)] = start
        self.most_held = max(self.most_held, held_bytes(models, [*self._running.values()]))

    def _make_way(self) -> bool:
        """Called when nothing runs and nothing can begin: whether there is still something to do afterwards."""
        models = [self._progress(model) for model in self._order()]
        if next_starts(models, (), self._room()):
            return True
        stuck = without_room(models, (), self._room())
        if stuck is None:
            return self._try_again()
        if self.request.keep != "all" and self._free_failed():
            return True
        held = held_bytes(models, ())
        error = NoSpaceError(
            f"{stuck.name} does not fit on the disk",
            f"it takes {human_bytes(stuck.needs.peak)} at a time, {human_bytes(held)} are taken by other models, and "
            f"{human_bytes(self._room())} may be taken in all",
            "Raise --max-disk or free some space, ask for fewer levels, or publish with --keep nothing, which takes the source "
            "and two levels.",
        )
        self._fail(self.models[stuck.name], "make" if stuck.prepared else "prepare" if stuck.downloaded else "download", error)
        return True

    def _try_again(self) -> bool:
        """Called when everything else is done: whether models are tried again whose failure was one of the network that may
        have passed. Waits a while before; the pauses grow, and end when something is added."""
        passing = [name for name in self._passing if self.journal.history.of(name).failure is not None]
        self._passing.clear()
        if not passing or self._rounds >= len(RETRY_SECONDS):
            return False
        pause = RETRY_SECONDS[self._rounds]
        self._rounds += 1
        self.context.sink(info(f"{', '.join(passing)} will be tried again in {human_seconds(pause)}."))
        end, before = time.monotonic() + pause, len(self.models)
        while time.monotonic() < end and not self.context.stop.requested and len(self.models) == before:
            time.sleep(min(_POLL_SECONDS, pause))
            self._take_additions()
            self._show(state="running", now=False)
        for name in passing:
            self.journal.append(ModelRetried(name, self.models[name].entry.fingerprint))
        return True

    def _await_additions(self) -> bool:
        """Called when everything is done: whether something is added while new models are looked for. Waits until then."""
        before, looks = len(self.models), None
        if self.watcher is not None and self.watcher.active:
            self.context.sink(info(f"Everything is done. {self.watcher.prospect}"))
        while self.watcher is not None and not self.context.stop.requested:
            watched = self.watcher.active  # asked before the list is read: all was appended once it is over
            self._take_additions()
            if len(self.models) > before:
                self._rounds = 0
                return True
            if not watched:
                break
            if looks != (now := {**self.journal.history.looks}):
                looks = now
                self._show(state="running", now=True)  # nothing else changes for hours
            time.sleep(_POLL_SECONDS)
        return False

    def _free_failed(self) -> bool:
        """Remove the sources of failed models, which can be fetched again; whether that freed anything."""
        freed = 0
        for name, model in self.models.items():
            if self.journal.history.of(name).failure is not None:
                freed += self._stages.remove_source(model, self._context(model))
        return freed >= _LEFT_AT_LEAST

    # -- stages -------------------------------------------------------------------------------------------------------------

    def _stage(self, model: CheckedModel, start: StageStart, levels: Sequence[str]) -> None:
        """Run one stage, in a thread of the pool. Every way that it can end is recorded; nothing is raised but a stop of the
        whole command by an error of the journal itself."""
        name, began = model.entry.model, time.monotonic()
        context = self._context(model, start)
        try:
            outcome = self._stages.work(model, start, levels, context)
            seconds = time.monotonic() - began
            entry = model.entry.fingerprint
            done = StageDone(name, entry, start.stage, tuple(levels), seconds, outcome.n_bytes, outcome.names)
            self.journal.append(done)
            self._stages.sweep(model, context)
            with self._lock:  # stages of several models may end at once
                self.speeds = self.speeds.with_stage(done)
                write_speeds(self.request.environment.work_dir, self.speeds)
            finished = {"download": self._downloaded, "prepare": self._prepared, "complete": self._completed}
            finished.get(start.stage, set()).add(name)
            self._conclude(model, context, outcome.url)
        except InterruptedRunError:
            pass  # the whole command ends, and the same command continues
        except RunnerError as error:
            self._fail(model, start.stage, error)
        except Exception:  # noqa: BLE001 - a bug in one model's work must not take the night
            self._fail(model, start.stage, self._bug(traceback.format_exc(), start))
        finally:
            with self._lock:
                self._live.get(name, {}).pop(start.stage, None)
                if not self._live.get(name):
                    self._live.pop(name, None)

    def _conclude(self, model: CheckedModel, context: Context, url: str) -> None:
        """Record the end of a model that has no stage left."""
        if not self._progress(model).finished:
            return
        self._stages.conclude(model, context, url)
        failed = self.journal.history.of(model.entry.model).failed_levels
        text = f"levels that failed: {', '.join(failed)}" if failed else "all levels are finished"
        self.notify(f"{model.entry.model}: done", f"{text} {url}".strip(), bool(failed))

    def _fail(self, model: CheckedModel, stage: Stage, error: RunnerError) -> None:
        name = model.entry.model
        if error.__cause__ is not None and is_passing(error.__cause__):
            self._passing.add(name)
        self.journal.append(ModelFailed(name, model.entry.fingerprint, stage, ThreeLines.of(error)))
        self.context.sink(warning(f"{name} failed: {error.sentence()}"))
        self.notify(f"{name}: failed", f"{error.what}. {error.why}. {error.todo}", True)

    def _bug(self, trace: str, start: StageStart) -> RunnerError:
        path = self.folder.root / "bug.log"
        try:
            with path.open("a", encoding="utf-8") as handle:
                handle.write(f"{start.model}, {start.stage}\n{trace}\n")
        except OSError:
            self.context.sink(warning(trace))
        last = trace.strip().splitlines()[-1][:300]
        return RunnerError(f"A bug in imatrix-runner ended stage {start.stage}", last, f"Please report it with {path}.")

    def _context(self, model: CheckedModel, start: StageStart | None = None) -> Context:
        """The context of a stage: its events carry the model's name, and its progress is shown on the page."""
        downloads = start is not None and start.stage == "download"
        sink = ModelSink(model.entry.model, self.context.sink, self._progressed(start), downloads)
        return Context(sink, self.context.stop)

    def _progressed(self, start: StageStart | None) -> Callable[[str, float | None], None]:
        def note(title: str, share: float | None) -> None:
            if start is None:
                return
            with self._lock:
                if (before := self._live.get(start.model, {}).get(start.stage)) is not None:
                    self._live[start.model][start.stage] = replace(before, title=title, share=share)

        return note

    # -- what is shown ------------------------------------------------------------------------------------------------------

    def _take_additions(self) -> None:
        """Read what ``batch add`` appended since; lines that are not understood are reported once and skipped."""
        try:
            size = self.folder.additions.stat().st_size if self.folder.additions.exists() else 0
        except OSError:
            return
        if size == self._additions:
            return
        self._additions = size
        listed = [model.entry for model in self.models.values() if not _is_added(model.entry, self.folder.additions)]
        entries, faults = read_additions(self.folder.additions, self.known, listed, self.defaults)
        for error in faults:
            failure = ThreeLines.of(error)
            if failure not in self.faults:
                self.faults.append(failure)
                self.context.sink(warning(f"An addition is skipped: {error.sentence()}"))
        for entry in entries:
            if entry.model not in self.models:
                checked = self.watcher.checked.pop(entry.model, None) if self.watcher is not None else None
                self.models[entry.model] = replace(checked, entry=entry) if checked else self.checker.check_one(entry)
                self.context.sink(info(f"{entry.model} was added to the list."))

    def _remaining(self, model: CheckedModel) -> RemainingWork:
        """Bytes that each stage of a model still has to work on."""
        progress = self._progress(model)
        needs = progress.needs
        if progress.ended:
            return RemainingWork({})
        prepared = self.journal.history.of(model.entry.model).prepared
        source = prepared.source if prepared is not None else model.source
        groups = range(len(needs.groups))
        missing = [needs.groups[group] + source for group in groups if group not in progress.made]
        unpublished = [needs.groups[group] for group in groups if group not in progress.published]
        stages: dict[Stage, int] = {"make": sum(missing)}
        if not progress.downloaded:
            stages["download"] = needs.download
        if not progress.prepared:
            stages["prepare"] = source
        if needs.publishes:
            stages["publish" if needs.rotates else "complete"] = sum(unpublished)
        return RemainingWork(stages)

    def _held(self, order: Sequence[CheckedModel]) -> int:
        files = [file for model in order for file in [*self.journal.history.of(model.entry.model).files.values()]]
        return bytes_there(files)

    def _show(self, state: BatchState, *, now: bool) -> None:
        if now or time.monotonic() - self._shown > _SHOW_SECONDS:
            self._shown = time.monotonic()
            self.show(self.view(state))


def _is_added(entry: BatchEntry, additions: Path) -> bool:
    return entry.where.startswith(f"{additions}, ")
