"""``publish``: check access and names, upload each level, then the card, the imatrix and the report, and verify all of it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.app.report import gather, make_report
from imatrix_runner.context.context import Context, held
from imatrix_runner.context.named_workspace import workspace_of
from imatrix_runner.context.requests import PublishRequest
from imatrix_runner.events import Sink
from imatrix_runner.journal import Journal
from imatrix_runner.models.hub import Hub, PublishingHub
from imatrix_runner.process import Runner
from imatrix_runner.publish.companions import companions, with_merged_card
from imatrix_runner.publish.local_files import ReadyLevel, level_files, ready_levels, recipe_files, small_file
from imatrix_runner.publish.publish_plan import FileState, PublishUnit
from imatrix_runner.publish.published_names import level_paths
from imatrix_runner.publish.publisher import FileResult, RepositoryPublisher, Target
from imatrix_runner.report.document import Report, read_report
from imatrix_runner.report.views.forms import JSON
from imatrix_runner.workspace import Workspace


@dataclass(frozen=True)
class PlannedFile:
    """A file of a dry run. ``level`` is empty for files that belong to all levels."""

    name: str
    level: str
    n_bytes: int
    state: FileState


@dataclass(frozen=True)
class PublishResult:
    """What was published. ``commit``: the newest of the repository; ``files``: every file with what became of it; ``verified``:
    the hub has all of them with their hashes. A dry run has ``planned`` instead of ``files``, and ``commit`` is empty if the
    repository does not exist. ``seconds``: from the start of the command. ``n_bytes``: of the files uploaded now."""

    repo: str
    url: str
    commit: str
    files: tuple[FileResult, ...] = ()
    seconds: float = 0.0
    verified: bool = False
    collection: str = ""
    planned: tuple[PlannedFile, ...] = field(default=())

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files if file.status == "uploaded")


def publish(request: PublishRequest, context: Context, *, dry_run: bool = False) -> PublishResult:
    """Carry out a request; a dry run looks at the hub and writes nothing, here or there.

    Raises :class:`RunnerError`: for what is refused before anything is uploaded, and for uploads that fail. The same request
    continues: what is missing follows from the repository.
    """
    began = time.monotonic()
    hub = PublishingHub(context.stop, context.sink)
    hub.check_usable(request.to)
    work_dir = request.environment.work_dir
    workspace = workspace_of(request.model, work_dir, context.sink, context.stop)
    with held(workspace, request.environment, context, dry_run=dry_run) as runner:
        journal = Journal(workspace.journal)
        job = PublishJob(request, workspace, journal, publisher_of(request, hub, context.sink))
        job.publisher.check()
        levels = ready_levels(workspace, journal, request.levels, save=not dry_run)
        paths = job.paths(levels)
        report = job.report(runner, context.sink, dry_run=dry_run)
        units = [*(job.level_unit(level, paths[level.name]) for level in levels), job.last_unit(report, levels, paths)]
        if dry_run:
            return job.dry_run(units, time.monotonic() - began)
        job.publisher.refuse(units[:-1])
        for unit in units[:-1]:
            job.publisher.bring(unit)
        return job.finish(units[-1], began)


def publisher_of(request: PublishRequest, hub: PublishingHub, sink: Sink) -> RepositoryPublisher:
    """The publisher of a request."""
    return RepositoryPublisher(Target(request.to, request.private, request.gated), hub, sink)


@dataclass(frozen=True)
class PublishJob:
    """The steps of publishing one workspace, whose lock the caller holds."""

    request: PublishRequest
    workspace: Workspace
    journal: Journal
    publisher: RepositoryPublisher

    def paths(self, levels: Sequence[ReadyLevel]) -> Mapping[str, tuple[str, ...]]:
        """The paths of levels' files in the repository, by level."""
        return level_paths(levels, self.workspace.model, self.request.name_template, self.publisher.sink)

    def report(self, runner: Runner, sink: Sink, *, dry_run: bool) -> Report:
        """The report whose forms are published; the one in the workspace is made anew if something changed."""
        repo, licence = self.request.to, self.request.licence
        if dry_run:
            return self._foreseen(gather(self.workspace, self.journal, runner, sink))
        made = make_report(self.workspace, self.journal, runner, sink, repo=repo, licence=licence, strict=False)
        if not made.report.model.license and (found := self._licence_of_source(made.report, sink)):
            made = make_report(self.workspace, self.journal, runner, sink, licence=found, strict=False)
        return self._foreseen(made.report) if made.stale else made.report

    def _foreseen(self, found: Report) -> Report:
        """The report as it will be: the one that is there, if nothing would change in it."""
        licence = self.request.licence
        model = replace(found.model, license=licence, license_name="", license_link="") if licence else found.model
        found = replace(found, repo=self.request.to, model=model)
        path = self.workspace.root / JSON
        before = read_report(path) if path.is_file() else None
        same = before is not None and replace(found, made=before.made) == before
        return before if before is not None and same else found

    def _licence_of_source(self, report: Report, sink: Sink) -> str:
        """The licence on the card of the source's repository; empty if it is not on the hub, or states none."""
        repo = next(iter((*report.model.base_models, report.model.repo)), "")
        listing = Hub(self.publisher.hub.stop, sink).look_up(repo) if repo else ""
        return listing.licence or "" if not isinstance(listing, str) else ""

    def level_unit(self, level: ReadyLevel, paths: Sequence[str]) -> PublishUnit:
        """The files of a level, and the recipe of a mix."""
        files = [*level_files(self.workspace, level, paths)]
        files += [small_file(path.name, content) for path, content in recipe_files(self.workspace, level)]
        return PublishUnit(f"Upload {level.name}", tuple(files), level.name)

    def last_unit(self, report: Report, levels: Sequence[ReadyLevel], paths: Mapping[str, tuple[str, ...]]) -> PublishUnit:
        """What comes with the levels."""
        names = {name: path for level in levels for (name, _, _), path in zip(level.files, paths[level.name], strict=True)}
        return companions(self.workspace, self.journal, report, names)

    def finish(self, last: PublishUnit, began: float) -> PublishResult:
        """Publish what comes with the levels, and verify everything."""
        publisher = self.publisher
        publisher.bring(last, lambda changes: with_merged_card(last, changes))
        verified = publisher.verify()
        assert publisher.remote is not None
        collection = publisher.hub.collect(self.request.collection, self.request.to) if self.request.collection else ""
        return PublishResult(
            self.request.to,
            publisher.hub.page(self.request.to),
            publisher.remote.commit,
            tuple(publisher.results),
            time.monotonic() - began,
            verified,
            collection,
        )

    def dry_run(self, units: Sequence[PublishUnit], seconds: float) -> PublishResult:
        """What would be uploaded, what is there already, and what is in the way."""
        states, publisher = self.publisher.states(units), self.publisher
        assert publisher.remote is not None
        planned = tuple(
            PlannedFile(file.name, unit.level, file.n_bytes, states[file.name]) for unit in units for file in unit.files
        )
        repo = self.request.to
        return PublishResult(repo, publisher.hub.page(repo), publisher.remote.commit, (), seconds, planned=planned)


def command_of(workspace: Path, request: PublishRequest) -> str:
    """The command that publishes a workspace as a request says."""
    words = ["imatrix-runner", "publish", str(workspace), "--to", request.to]
    words += ["--private"] if request.private else []
    for name, value in (("--gated", request.gated), ("--licence", request.licence), ("--collection", request.collection)):
        words += [name, value] if value else []
    words += ["--levels", ",".join(request.levels)] if request.levels else []
    words += ["--name-template", request.name_template] if request.name_template != "{model}-{level}" else []
    return shlex.join(words)
