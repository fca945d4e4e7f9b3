"""``batch``: reads a list of models, checks it whole, and works through it; ``batch add`` and ``batch status``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from imatrix_runner.app.batch_watch import BatchWatcher, PlaceLook, WatchLooker
from imatrix_runner.app.batch_work import BatchWorker
from imatrix_runner.app.publish import publisher_of
from imatrix_runner.app.run_levels import choose_levels
from imatrix_runner.batch.batch_folder import BatchFolder, append_addition, hold_batch, running_owner
from imatrix_runner.batch.batch_journal import BatchBegan, BatchHistory, BatchJournal, ModelFailed, ThreeLines, read_history
from imatrix_runner.batch.batch_list import (
    MOST_ENTRIES,
    BatchEntry,
    added_models,
    parse_entry,
    read_additions,
    read_defaults,
    read_list,
    refuse_twice,
)
from imatrix_runner.batch.check_list import CheckedModel, ListChecker, RequestOf
from imatrix_runner.batch.forecast import RemainingWork, batch_seconds, read_speeds, speeds_of
from imatrix_runner.batch.overview import BatchView, overview
from imatrix_runner.batch.release_files import bytes_there, remove_unfinished
from imatrix_runner.batch.schedule import ModelProgress, Stage, disk_without_bound, peak_bytes
from imatrix_runner.cluster.ray_session import connected
from imatrix_runner.context.context import Context, settle
from imatrix_runner.context.engine_choice import EngineNeeds
from imatrix_runner.context.requests import BatchRequest, EnvironmentRequest, PublishRequest, RunRequest
from imatrix_runner.errors import RunnerError, UsageError
from imatrix_runner.events import ignore, info
from imatrix_runner.files import free_bytes, read_json, write_json
from imatrix_runner.mixes.targets import mix_targets
from imatrix_runner.models.hub import PublishingHub
from imatrix_runner.publish.published_names import planned_paths
from imatrix_runner.toolchain.quant_type import QuantType


@dataclass(frozen=True)
class EntryReader:
    """How entries become requests: ``known`` are the options of ``run`` that a list may give, with underscores."""

    known: frozenset[str]
    request_of: RequestOf


@dataclass(frozen=True)
class BatchPlan:
    """A list after its check, in the order of work. ``limit``: bytes that it may take, of ``room`` on the disk; it
    takes ``peak`` at most;
    ``misfits``: models that do not fit; ``finished``: those that an earlier command finished; ``seconds``: expected, None where
    a speed is not known; ``lanes``: models that are computed at a time."""

    file: Path
    models: tuple[CheckedModel, ...]
    finished: tuple[str, ...]
    limit: int
    peak: int
    misfits: tuple[str, ...]
    seconds: float | None
    model_seconds: Mapping[str, float | None]
    keep: str
    room: int
    lanes: int = 1

    @property
    def problems(self) -> tuple[CheckedModel, ...]:
        return tuple(model for model in self.models if model.problem is not None)


@dataclass(frozen=True)
class BatchResult:
    """A plan and what became of it; ``view`` is None for a dry run. ``most_held``: bytes reserved on the disk at most;
    ``looks``: what a dry run found at the places to watch."""

    plan: BatchPlan
    view: BatchView | None
    seconds: float
    most_held: int = 0
    looks: tuple[PlaceLook, ...] = ()

    @property
    def failed(self) -> bool:
        if self.view is None:
            return bool(self.plan.problems or self.plan.misfits)
        return any(model.failed or model.state != "done" for model in self.view.models)


@dataclass
class RequestChecker:
    """Checks what requests ask of this machine's llama.cpp and of the hub. The hub limits how often it describes an account, so
    that is asked for once for each owner."""

    context: Context
    _owners: set[str] = field(default_factory=set)
    _types: dict[tuple[str, Path | None], tuple[QuantType, ...]] = field(default_factory=dict)

    def check(self, request: RunRequest, name: str) -> None:
        """Raises :class:`RunnerError` for a level that cannot be made by any engine here, or not be published under its name,
        and for a repository that cannot be written or made. ``name``: the model's."""
        assert request.levels is not None
        mix_targets(request.levels.names)
        levels = choose_levels(request.levels, self._offered(request.environment), ignore)
        if request.publish is not None:
            planned_paths([(level.name, level.ftype, 1) for level in levels], name, request.publish.name_template)
            self._check_target(request.publish)

    def _offered(self, environment: EnvironmentRequest) -> tuple[QuantType, ...]:
        """The types that the engines of a request offer."""
        key = environment.engine, environment.llama_cpp
        if key not in self._types:
            _, choice = settle(environment, EngineNeeds((), (), ""), ignore)
            runner = self.context.runner(environment)
            additional = choice.make_additional(runner)
            self._types[key] = (*choice.make(runner).types, *(additional.types if additional is not None else ()))
        return self._types[key]

    def _check_target(self, target: PublishRequest) -> None:
        hub = PublishingHub(self.context.stop, self.context.sink)
        hub.check_usable(target.to)
        owner = target.to.partition("/")[0].lower()
        if owner in self._owners and not hub.look(target.to).exists:
            return
        publisher_of(target, hub, self.context.sink).check()
        self._owners.add(owner)


def run_batch(
    request: BatchRequest,
    reader: EntryReader,
    context: Context,
    *,
    dry_run: bool = False,
    on_plan: Callable[[BatchPlan], None] | None = None,
    on_view: Callable[[BatchView, BatchFolder], None] = lambda _view, _folder: None,
    notify: Callable[[str, str, bool], None] = lambda _title, _text, _failed: None,
) -> BatchResult:
    """Carry out a request: the same one continues. ``on_plan`` is called with the checked list before anything is fetched; a
    dry run ends there and writes nothing. ``on_view`` is called whenever something changed.

    Raises :class:`RunnerError` for what ends the whole batch; a model that fails is in the result.
    """
    began = time.monotonic()
    folder = BatchFolder.of(request.file)
    checker = ListChecker(
        reader.request_of, context.stop, context.sink, RequestChecker(context).check, request.trust_remote_code
    )
    if dry_run:
        request = replace(request, lanes=_expected_lanes(request))
        history = read_history(folder.journal)
        plan = _plan(request, reader, checker, folder, history)
        if on_plan is not None:
            on_plan(plan)
        looker = _looker(request, reader, checker, folder, lambda: history)
        looks = tuple(looker.looks()) if looker is not None else ()
        return BatchResult(plan, None, time.monotonic() - began, looks=looks)
    _entries(request, reader)  # a list that cannot be read leaves no folder behind
    with hold_batch(folder, request.environment.command), _connected(request, context) as request:
        remove_unfinished(folder.downloads)
        journal = BatchJournal(folder.journal)
        try:
            plan = _plan(request, reader, checker, folder, journal.history)
            if on_plan is not None:
                on_plan(plan)
            journal.append(BatchBegan(request.environment.command, time.strftime("%Y-%m-%dT%H:%M:%S%z")))
            for model in plan.problems:
                assert model.problem is not None
                journal.append(ModelFailed(model.entry.model, model.entry.fingerprint, "check", model.problem))
                notify(f"{model.entry.model}: cannot be made", f"{model.problem.what}. {model.problem.why}", True)
            speeds = read_speeds(request.environment.work_dir)
            worker = BatchWorker(
                request,
                folder,
                journal,
                checker,
                reader.known,
                context,
                plan.room,
                speeds,
                partial(_shown, folder, on_view),
                notify,
                {model.entry.model: model for model in plan.models},
                read_defaults(request.file, reader.known),
                lanes=request.lanes,
            )
            looker = _looker(request, reader, checker, folder, lambda: journal.history)
            if looker is None:
                worker.work()
            else:
                worker.watcher = BatchWatcher(looker, journal, context)
                with worker.watcher.running():
                    worker.work()
            view = worker.view("finished")
            return BatchResult(plan, view, time.monotonic() - began, worker.most_held)
        finally:
            journal.close()


@contextmanager
def _connected(request: BatchRequest, context: Context) -> Iterator[BatchRequest]:
    """The request with a lane for each worker of its cluster, if it names one. The connection is held meanwhile: the models'
    runs use it. Raises :class:`ToolchainError` for a cluster that cannot be used."""
    cluster = request.environment.cluster
    if cluster is None:
        yield request
        return
    with connected(cluster, context.sink, context.stop) as workers:
        lanes = len(workers.room())
        context.sink(info(f"Cluster {cluster.address}: {lanes} models are computed at a time, each by one worker."))
        yield replace(request, lanes=lanes)


def _expected_lanes(request: BatchRequest) -> int:
    """The lanes as far as they are known without a connection."""
    cluster = request.environment.cluster
    return (cluster.local_workers if cluster is not None else None) or request.lanes


def _looker(
    request: BatchRequest,
    reader: EntryReader,
    checker: ListChecker,
    folder: BatchFolder,
    history: Callable[[], BatchHistory],
) -> WatchLooker | None:
    """What looks for new models; None if that is not asked for."""
    if request.watch is None:
        return None
    entries, defaults = _entries(request, reader), read_defaults(request.file, reader.known)
    return WatchLooker(request.watch, folder, checker, entries, reader.known, defaults, history)


def _shown(folder: BatchFolder, on_view: Callable[[BatchView, BatchFolder], None], view: BatchView) -> None:
    """Keep the view for ``batch status``, and pass it on."""
    with suppress(RunnerError):  # a full disk ends stages, not what is said of them
        write_json(folder.state, view)
    on_view(view, folder)


def _entries(request: BatchRequest, reader: EntryReader) -> tuple[BatchEntry, ...]:
    """The entries of the list; there need be none where models are added."""
    grows = request.watch is not None or BatchFolder.of(request.file).additions.exists()
    return read_list(request.file, reader.known, may_be_empty=grows)


def _plan(
    request: BatchRequest, reader: EntryReader, checker: ListChecker, folder: BatchFolder, history: BatchHistory
) -> BatchPlan:
    """Read and check the list. Models that an earlier command finished are not checked again."""
    entries = _entries(request, reader)
    entries = (*entries, *read_additions(folder.additions, reader.known, entries, read_defaults(request.file, reader.known))[0])
    finished = [entry for entry in entries if is_finished(entry, history)]
    checked = {model.entry.model: model for model in checker.check([each for each in entries if each not in finished])}
    for entry in finished:
        checked[entry.model] = CheckedModel(entry, None, entry.model)
    models = sorted((checked[entry.model] for entry in entries), key=lambda model: -model.entry.priority)
    work_dir = request.environment.work_dir
    files = [file for model in history.models.values() for file in model.files.values()]
    there = bytes_there(files)
    room = free_bytes(work_dir) + there
    room = limit = min(room, request.max_disk) if request.max_disk is not None else room
    todo = [model for model in models if model.problem is None and model.entry not in finished]
    if request.keep == "nothing" and request.max_disk is None:
        wanted = disk_without_bound((model.needs(request.keep).peak for model in todo), request.lanes)
        limit = limit if wanted is None else min(limit, wanted)
    states = [ModelProgress(model.entry.model, model.needs(request.keep)) for model in todo]
    peak, misfits = peak_bytes(states, limit, request.lanes)
    speeds = read_speeds(work_dir)
    works = {model.entry.model: first_work(model, request) for model in todo}
    return BatchPlan(
        request.file,
        tuple(models),
        tuple(entry.model for entry in finished),
        limit,
        peak,
        misfits,
        batch_seconds(works.values(), speeds, request.lanes),
        {name: work.seconds(speeds) for name, work in works.items()},
        request.keep,
        room,
        request.lanes,
    )


def first_work(model: CheckedModel, request: BatchRequest) -> RemainingWork:
    """The work on a model of which nothing is done."""
    needs = model.needs(request.keep)
    stages: dict[Stage, int] = {
        "download": needs.download,
        "prepare": model.source,
        "make": sum(group + model.source for group in needs.groups),
    }
    if needs.publishes:
        stages["publish" if needs.rotates else "complete"] = sum(needs.groups)
    return RemainingWork(stages)


def is_finished(entry: BatchEntry, history: BatchHistory) -> bool:
    """Whether an earlier command did everything that an entry asks for."""
    known = history.models.get(entry.model)
    return known is not None and known.done is not None and known.entry == entry.fingerprint and not known.failed_levels


def add_to_batch(file: Path, entries: Sequence[Mapping[str, Any]], reader: EntryReader) -> tuple[BatchEntry, ...]:
    """Append entries to the list of a batch, which may be running, and return them. Raises :class:`RunnerError` for an entry
    that is not understood or names a model that is there already."""
    folder = BatchFolder.of(file)
    there = [*read_list(file, reader.known, may_be_empty=True)]
    common = read_defaults(file, reader.known)
    there += read_additions(folder.additions, reader.known, there, common)[0]
    found = []
    for raw in entries:
        entry = parse_entry(raw, reader.known, "batch add", common)
        reader.request_of(entry)
        refuse_twice([*there, entry])
        there.append(entry)
        found.append(entry)
    if added_models(folder.additions)[0] + len(found) > MOST_ENTRIES:
        raise UsageError(
            "No more models can be added to this batch",
            f"{MOST_ENTRIES} were added, which is the most",
            "Begin another list.",
        )
    append_addition(folder, entries)
    return tuple(found)


def batch_status(file: Path, reader: EntryReader) -> BatchView:
    """The state of a batch, as the process at work wrote it down last, else from list and journal; nothing is written."""
    folder = BatchFolder.of(file)
    if running_owner(folder) is not None and folder.state.exists():
        return read_json(folder.state, BatchView)
    entries = list(read_list(file, reader.known, may_be_empty=folder.root.exists()))
    added, faults = read_additions(folder.additions, reader.known, entries, read_defaults(file, reader.known))
    history = read_history(folder.journal)
    owner = running_owner(folder)
    files = [file for model in history.models.values() for file in model.files.values()]
    everything = sorted((*entries, *added), key=lambda entry: -entry.priority)
    finished = all(is_finished(entry, history) for entry in everything)
    return overview(
        str(file),
        "running" if owner is not None else "finished" if finished else "stopped",
        everything,
        history,
        speeds=speeds_of(history.stages),
        held=bytes_there(files),
        faults=[ThreeLines.of(error) for error in faults],
        watching=None if owner is not None else (),
    )
