"""The stages of one model of a batch: each is a call of what ``run`` and ``publish`` do, recorded in the batch's journal.

A stage may be killed at any moment and is then done again: every file it makes is recorded as intended before it can exist, and
what is finished is found by the stage itself.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.app.publish import PublishJob, publish, publisher_of
from imatrix_runner.app.run import run
from imatrix_runner.app.run_levels import refuse_hopeless
from imatrix_runner.batch.batch_folder import BatchFolder
from imatrix_runner.batch.batch_journal import (
    BatchEvent,
    BatchJournal,
    FileIntended,
    FileMade,
    LevelFailed,
    ModelDone,
    ModelHistory,
    ModelPrepared,
    PlannedLevel,
    ThreeLines,
)
from imatrix_runner.batch.check_list import CheckedModel
from imatrix_runner.batch.release_files import remove_files
from imatrix_runner.batch.schedule import StageStart
from imatrix_runner.context.context import Context
from imatrix_runner.context.ownership import find_workspace, release_original
from imatrix_runner.context.requests import BatchRequest, LevelsRequest, PublishRequest, RunRequest
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Event, Notice, Sink, ignore
from imatrix_runner.files import stamp
from imatrix_runner.journal import Journal, outputs_intact
from imatrix_runner.mixes.targets import mix_targets
from imatrix_runner.models.hub import PublishingHub, fetch_model
from imatrix_runner.models.model import HubId, parse_source
from imatrix_runner.publish.local_files import ready_level
from imatrix_runner.publish.published_names import planned_paths
from imatrix_runner.quantize.executor import LevelResult
from imatrix_runner.quantize.level_facts import release_level
from imatrix_runner.quantize.plan import LevelStep, Plan
from imatrix_runner.workspace import Workspace, hold


@dataclass(frozen=True)
class StageOutcome:
    """``n_bytes`` that a stage worked on; ``names`` of the levels that it made; ``url`` of what it completed."""

    n_bytes: int
    names: tuple[str, ...] = ()
    url: str = ""


class _PlanKnown(Exception):
    """Ends a run when its plan is known, before anything is computed."""


@dataclass(frozen=True)
class BatchStages:
    """The stages of all models of one batch, whose lock the caller holds. A stage returns the bytes that it worked on."""

    request: BatchRequest
    folder: BatchFolder
    journal: BatchJournal
    _busy: dict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock), repr=False)
    """Held while levels of a model are made: their maker may read its other levels, so none is removed meanwhile."""

    def work(self, model: CheckedModel, start: StageStart, levels: Sequence[str], context: Context) -> StageOutcome:
        """Carry out a stage. Raises :class:`RunnerError` where it fails."""
        if start.stage == "complete":
            return self._complete(model, context)
        if start.stage == "download":
            return StageOutcome(self._download(model, context))
        if start.stage == "prepare":
            return StageOutcome(self._prepare(model, context))
        if start.stage == "make":
            with self._busy[model.entry.model]:
                return self._make(model, levels, start.compute_lane, context)
        return StageOutcome(self._publish(model, levels, context))

    def history(self, model: CheckedModel) -> ModelHistory:
        return self.journal.history.of(model.entry.model)

    # -- stages -------------------------------------------------------------------------------------------------------------

    def _download(self, model: CheckedModel, context: Context) -> int:
        source = parse_source(model.entry.model)
        if not isinstance(source, HubId) or not self._own_download(model) or self._is_converted(model):
            return 0
        folder = self.folder.downloads / f"models--{source.repo.replace('/', '--')}"
        if str(folder) not in self.history(model).intended:
            self.journal.append(FileIntended(model.entry.model, "download", str(folder)))
        fetched = fetch_model(
            source,
            stop=context.stop,
            sink=context.sink,
            trust_remote_code=self._run_request(model).source.trust_remote_code,
            cache=self.folder.downloads,
        )
        known = self.history(model).files
        new = [path for path in fetched.files if str(path) not in known]
        self.journal.append(*(FileMade(model.entry.model, "download", str(path), stamp(path)) for path in new))
        return sum(path.stat().st_size for path in new)

    def _prepare(self, model: CheckedModel, context: Context) -> int:
        workspace = self._workspace(model, context)
        request, name, entry = self._run_request(model), model.entry.model, model.entry.fingerprint
        converted_before = self._conversions(workspace)
        if not converted_before and str(workspace.root) not in self.history(model).intended:
            self.journal.append(FileIntended(name, "converted", str(workspace.root)))
        plans: list[Plan] = []

        def take(plan: Plan) -> None:
            refuse_hopeless(plan, one_by_one=True)
            if request.publish is not None:
                makeable = [step for step in plan.levels if step.state != "fails"]
                named = [(step.level.name, step.level.ftype, len(step.files)) for step in makeable]
                planned_paths(named, workspace.model, request.publish.name_template)
            plans.append(plan)
            raise _PlanKnown

        with suppress(_PlanKnown):
            run(replace(request, publish=None), Context(_without_notices(context.sink), context.stop), on_plan=take)
        (plan,) = plans
        conversions = self._conversions(workspace)
        events: list[BatchEvent] = []
        if str(workspace.root) in self.history(model).intended:
            events += [FileMade(name, "converted", str(path), stamp(path)) for path in conversions]
        assert request.levels is not None
        levels, steps = _planned(plan, request.levels), {step.level.name: step for step in plan.levels}
        events += [
            FileIntended(name, "level", str(path))
            for step in plan.levels
            for path in step.files
            if step.state == "todo" and not path.exists()
        ]
        events += [LevelFailed(name, entry, step.level.name, _refusal(step)) for step in plan.failing]
        source = sum(path.stat().st_size for path in conversions) or model.source
        planned = tuple(level for level in levels if level.name not in steps or steps[level.name].state != "fails")
        working = plan.measure.n_bytes if plan.measure is not None else 0
        events.append(ModelPrepared(name, entry, str(workspace.root), source, bool(conversions), planned, working))
        self.journal.append(*events)
        downloads = self.history(model).files_of("download")
        if conversions and downloads and self.request.keep != "all":
            with hold(workspace, self.request.environment.command):
                release_original(Journal(workspace.journal))
            remove_files(downloads, self.journal, self.folder.downloads, context.sink)
        return source

    def _make(self, model: CheckedModel, levels: Sequence[str], lane: int, context: Context) -> StageOutcome:
        history = self.history(model)
        request, prepared = self._run_request(model, lane), history.prepared
        assert request.levels is not None
        assert prepared is not None
        self._note_released(model, context)
        wanted = replace(request.levels, names=tuple(levels), preset="")
        if history.made:  # what can be said was said for the first levels
            context = Context(_without_notices(context.sink), context.stop)
        result = run(replace(request, levels=wanted, publish=None), context)
        self._record_levels(model, result.levels, levels)
        unmeasured = result.evaluated.failed if result.evaluated is not None else {}
        for level, error in unmeasured.items():
            self.journal.append(LevelFailed(model.entry.model, model.entry.fingerprint, level, ThreeLines.of(error)))
        names = tuple(level.step.level.name for level in result.levels if level.error is None)
        return StageOutcome(prepared.source + sum(level.n_bytes or 0 for level in result.levels), names)

    def _publish(self, model: CheckedModel, levels: Sequence[str], context: Context) -> int:
        """Upload levels and look at them on the hub. Nothing is written in the workspace, in which others may be made."""
        workspace = self._workspace(model, context)
        request = self._publish_request(model, workspace)
        job = PublishJob(
            request,
            workspace,
            Journal(workspace.journal),
            publisher_of(request, PublishingHub(context.stop, context.sink), context.sink),
        )
        job.publisher.check()
        sizes = 0
        for name in self.history(model).names.get(tuple(levels), ()):
            level = ready_level(workspace, job.journal, name, save=False)
            job.upload(level)
            sizes += level.n_bytes
        job.publisher.verify()
        return sizes

    def _complete(self, model: CheckedModel, context: Context) -> StageOutcome:
        """Publish what is not on the hub yet, the card and the report; everything is looked at once more."""
        self._note_released(model, context)
        names = tuple(name for group in self.history(model).names.values() for name in group)
        if not names:
            raise InvalidDataError("There is nothing to publish", "no level could be made", "See the failures of its levels.")
        request = self._publish_request(model, self._workspace(model, context))
        result = publish(replace(request, levels=names), context)
        return StageOutcome(result.n_bytes, url=result.url)

    def sweep(self, model: CheckedModel, context: Context) -> None:
        """Remove levels that were published and verified, unless others of the model are being made at the moment."""
        history, lock = self.history(model), self._busy[model.entry.model]
        if self.request.keep != "nothing" or not history.published or not lock.acquire(blocking=False):
            return
        try:
            files = [file for file in history.files_of("level") if file.level in history.published]
            remove_files(files, self.journal, self.folder.downloads, context.sink)
        finally:
            lock.release()

    def conclude(self, model: CheckedModel, context: Context, url: str = "") -> None:
        """Record that a model is done, and remove its source unless everything is kept."""
        self.journal.append(ModelDone(model.entry.model, model.entry.fingerprint, url))
        if self.request.keep != "all":
            self.remove_source(model, context)

    def remove_source(self, model: CheckedModel, context: Context) -> int:
        """Remove what was downloaded and converted for a model; returns the bytes that became free."""
        history = self.history(model)
        files = [*history.files_of("converted"), *history.files_of("download")]
        return remove_files(files, self.journal, self.folder.downloads, context.sink)

    # -- parts --------------------------------------------------------------------------------------------------------------

    def _run_request(self, model: CheckedModel, lane: int | None = None) -> RunRequest:
        """The request of ``run`` for a model, in the batch's work directory and with its downloads. ``lane``: the number of the
        compute lane, where levels are made: on a cluster by that worker alone. All else is done by this machine."""
        assert model.request is not None
        request, environment = model.request, self.request.environment
        trust = request.source.trust_remote_code or self.request.trust_remote_code
        source = replace(request.source, trust_remote_code=trust)
        if self._own_download(model):
            source = replace(source, cache=self.folder.downloads)
        cluster = replace(environment.cluster, lane=lane) if environment.cluster is not None and lane is not None else None
        own = replace(request.environment, work_dir=environment.work_dir, cluster=cluster)
        return replace(request, source=source, environment=own)

    def _own_download(self, model: CheckedModel) -> bool:
        """Whether the model's files are in the batch's own folder: they were not all in the user's cache at first."""
        return model.own_download or "download" in self.history(model).intended.values()

    def _workspace(self, model: CheckedModel, context: Context) -> Workspace:
        text = model.entry.model
        return find_workspace(parse_source(text), text, self.request.environment.work_dir, ignore, context.stop)

    def _conversions(self, workspace: Workspace) -> list[Path]:
        """The GGUFs that the workspace's model was converted to, as its journal has them."""
        if not workspace.journal.is_file():
            return []
        records = Journal(workspace.journal).of_kind("convert").values()
        return [workspace.root / each.output.name for each in records if outputs_intact(each, workspace.root)]

    def is_downloaded(self, model: CheckedModel) -> bool:
        """Whether nothing has to be downloaded: everything is there unchanged, or the model was converted already."""
        files = self.history(model).files_of("download")
        there = all(Path(file.path).is_file() and stamp(Path(file.path)) == file.stamp for file in files)
        return self._is_converted(model) or (self.history(model).downloaded and bool(files) and there)

    def _is_converted(self, model: CheckedModel) -> bool:
        """Whether the model was converted before, so that its download is no longer needed."""
        history = self.history(model)
        return bool(history.files_of("converted")) and all(
            Path(file.path).is_file() and stamp(Path(file.path)) == file.stamp for file in history.files_of("converted")
        )

    def _record_levels(self, model: CheckedModel, results: Sequence[LevelResult], asked: Sequence[str]) -> None:
        """Record files of finished levels as the batch's, where nothing was in their place before, and what failed."""
        name, entry, history = model.entry.model, model.entry.fingerprint, self.history(model)
        events: list[BatchEvent] = []
        for result in results:
            made_as = result.step.level.name
            level = made_as if made_as in asked or len(asked) != 1 else asked[0]
            if result.error is not None:
                events.append(LevelFailed(name, entry, level, ThreeLines.of(result.error)))
                continue
            for path in result.step.files:
                if str(path) in history.intended or result.status == "done":
                    events.append(FileMade(name, "level", str(path), stamp(path), level))
        self.journal.append(*events)

    def _publish_request(self, model: CheckedModel, workspace: Workspace) -> PublishRequest:
        """The request of ``publish`` for the model's workspace."""
        assert model.request is not None
        assert model.request.publish is not None
        own = self._run_request(model).environment
        return replace(model.request.publish, model=str(workspace.root), environment=own)

    def _note_released(self, model: CheckedModel, context: Context) -> None:
        """Tell the workspace which levels were removed after they were published: reports go on to list them. Nothing else
        uses the workspace meanwhile."""
        history = self.history(model)
        published = {name for levels, names in history.names.items() if {*levels} <= history.published for name in names}
        if not published:
            return
        workspace = self._workspace(model, context)
        with hold(workspace, self.request.environment.command):
            journal = Journal(workspace.journal)
            for level, record in journal.of_kind("level").items():
                if level in published and not outputs_intact(record, workspace.root):
                    release_level(journal, level)


def _without_notices(sink: Sink) -> Sink:
    """The sink without what the next stage says again."""

    def pass_on(event: Event) -> None:
        if not isinstance(event, Notice):
            sink(event)

    return pass_on


def _planned(plan: Plan, request: LevelsRequest) -> tuple[PlannedLevel, ...]:
    """The levels of a plan as they can be asked for one by one: stock levels by name, mixes by their target."""
    targets = [target.spelling for target in mix_targets(request.names)]
    mixes = [step for step in plan.levels if _is_mix(step)]
    stock = [step for step in plan.levels if not _is_mix(step)]
    sizes = {step.level.name: step.facts.n_bytes or 0 for step in mixes}
    largest = max(sizes.values(), default=0)
    return (
        *(PlannedLevel(step.level.name, step.facts.n_bytes or 0) for step in stock),
        *(PlannedLevel(target, sizes.get(target, largest)) for target in targets),
    )


def _is_mix(step: LevelStep) -> bool:
    return bool(step.level.pins) or step.level.name.upper().startswith("MIX")


def _refusal(step: LevelStep) -> ThreeLines:
    error = InvalidDataError(f"{step.level.name} was not made", step.reason, step.remedy or "Choose other levels.")
    return ThreeLines.of(error)
