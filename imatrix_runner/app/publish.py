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
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Sink, ignore, info, warning
from imatrix_runner.files import human_bytes
from imatrix_runner.journal import Journal
from imatrix_runner.models.hub import Hub, PublishingHub
from imatrix_runner.process import Runner
from imatrix_runner.publish.before_upload import refuse_secrets, tell_of_template
from imatrix_runner.publish.companions import companions, report_on, with_merged_card
from imatrix_runner.publish.how_made import how_made
from imatrix_runner.publish.local_files import ReadyLevel, level_files, ready_level, ready_levels, recipe_files, small_file
from imatrix_runner.publish.publish_plan import FileState, PublishUnit, is_same, missing
from imatrix_runner.publish.published_names import level_paths, same_labels
from imatrix_runner.publish.publisher import FileResult, RepositoryPublisher, Target
from imatrix_runner.publish.secrets import local_names
from imatrix_runner.quantize.level_files import finish_renames
from imatrix_runner.report.document import Report, read_report
from imatrix_runner.report.views.forms import JSON
from imatrix_runner.safe_text import shown
from imatrix_runner.workspace import Workspace

_MOST_PLAIN_BYTES = 50 * 1000**3
"""The largest file that a hub serves by plain HTTP."""


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
        if not dry_run:
            finish_renames(journal, workspace)
        job = PublishJob(request, workspace, journal, publisher_of(request, hub, context.sink))
        job.publisher.check()
        levels = job.publishable(ready_levels(workspace, journal, request.levels, save=not dry_run))
        paths = job.paths(levels, context.sink)
        units = [job.level_unit(level, paths[level.name]) for level in levels]
        last = job.last_unit(job.report(runner, context.sink, dry_run=dry_run), levels)
        job.warn_of_labels(paths)
        for name, n_bytes, _ in (file for level in levels for file in level.files):
            job.warn_of_size(name, n_bytes)
        everything = [*units, last]
        job.look_through(everything)
        job.tell_of_template(levels, runner)
        if dry_run:
            return job.dry_run(everything, time.monotonic() - began)
        job.publisher.refuse(everything)
        for level, unit in zip(levels, units, strict=True):
            ready_level(workspace, journal, level.name, save=False)  # uploads of others may have taken hours
            job.publisher.bring(unit)
        return job.finish(last, began)


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

    def paths(self, levels: Sequence[ReadyLevel], sink: Sink = ignore) -> Mapping[str, tuple[str, ...]]:
        """The paths of levels' files in the repository, by level; ``sink`` gets remarks on names."""
        return level_paths(levels, self.workspace.model, self.request.name_template, sink)

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

    def look_through(self, units: Sequence[PublishUnit]) -> None:
        """Refuse secrets and paths of this machine in what would be uploaded."""
        place = self.journal.fact("source_at") or ""
        folders = [Path(place).parent] if Path(place).is_absolute() else []
        local = local_names(self.workspace.root, *folders, secrets=self.publisher.hub.held_secrets())
        remote = self.publisher.known()
        refuse_secrets((file for unit in units for file in missing(unit.files, remote)), local, self.publisher.sink)

    def warn_of_size(self, name: str, n_bytes: int) -> None:
        """Say so if a file is larger than what hubs serve by plain HTTP."""
        if n_bytes > _MOST_PLAIN_BYTES:
            text = f"{name} has {human_bytes(n_bytes)}: hubs serve files of more than 50 GB only to programs that know Xet"
            self.publisher.sink(warning(f"{text}. Make it in shards with --split-max-size 48G."))

    def warn_of_labels(self, paths: Mapping[str, tuple[str, ...]]) -> None:
        """Say where programs will find two files of one label, because the repository has another one."""
        for mine, other in same_labels([names[0] for names in paths.values()], self.publisher.known().files):
            instead = f"which programs may load instead of {mine}: their labels are the same"
            self.publisher.sink(warning(f"{self.request.to} also holds {shown(other)}, {instead}."))

    def tell_of_template(self, levels: Sequence[ReadyLevel], runner: Runner) -> None:
        """Check the chat template, if a level will be uploaded."""
        if not all(map(self._is_there, levels)):
            tell_of_template(self.workspace, self.journal, levels, runner, self.publisher.sink)

    def upload(self, level: ReadyLevel) -> None:
        """Publish one level, after the checks that every file must pass."""
        unit = self.level_unit(level, self.paths([level])[level.name])
        self.publisher.refuse([unit])
        self.look_through([unit])
        self.publisher.bring(unit)

    def publishable(self, levels: Sequence[ReadyLevel]) -> tuple[ReadyLevel, ...]:
        """The levels without those that were not asked for by name and are neither here nor on the hub."""
        lost = [level for level in levels if not self.request.levels and not level.is_here and not self._is_there(level)]
        for level in lost:
            self.publisher.sink(info(f"{level.name} is left out: its file is gone, and {self.request.to} does not have it."))
        left = tuple(level for level in levels if level not in lost)
        if not left:
            raise InvalidDataError(
                f"There is nothing to publish in {self.workspace.root}",
                "the files of all its levels are gone",
                "Make some first: imatrix-runner run MODEL",
            )
        return left

    def _is_there(self, level: ReadyLevel) -> bool:
        """Whether the hub has all files of a level."""
        remote, paths = self.publisher.known().files, self.paths([level])[level.name]
        return all(is_same(file, remote.get(file.name)) for file in level_files(self.workspace, level, paths))

    def last_unit(self, report: Report, levels: Sequence[ReadyLevel]) -> PublishUnit:
        """What comes with ``levels``, and with those that the hub has already."""
        wanted = {level.name for level in levels}
        names = [each.name for each in report.levels if each.name not in wanted]
        others = [ready_level(self.workspace, self.journal, name, save=False) for name in names]
        shown = [*levels, *(level for level in others if self._is_there(level))]
        paths = self.paths(shown)
        found = {name: path for level in shown for (name, _, _), path in zip(level.files, paths[level.name], strict=True)}
        unit = companions(self.workspace, self.journal, report_on(report, {level.name for level in shown}), found)
        made = [file for level in shown for file in how_made(self.workspace, level, paths[level.name])]
        return replace(unit, files=(*unit.files, *made))

    def finish(self, last: PublishUnit, began: float) -> PublishResult:
        """Publish what comes with the levels, and verify everything."""
        publisher = self.publisher
        publisher.bring(last, lambda changes: with_merged_card(last, changes, publisher.sink))
        verified = publisher.verify()
        collection = publisher.hub.collect(self.request.collection, self.request.to) if self.request.collection else ""
        return PublishResult(
            self.request.to,
            publisher.hub.page(self.request.to),
            publisher.known().commit,
            publisher.results,
            time.monotonic() - began,
            verified,
            collection,
        )

    def dry_run(self, units: Sequence[PublishUnit], seconds: float) -> PublishResult:
        """What would be uploaded, what is there already, and what is in the way."""
        states, publisher = self.publisher.states(units), self.publisher
        planned = tuple(
            PlannedFile(file.name, unit.level, file.n_bytes, states[file.name]) for unit in units for file in unit.files
        )
        repo = self.request.to
        return PublishResult(repo, publisher.hub.page(repo), publisher.known().commit, (), seconds, planned=planned)


def command_of(workspace: Path, request: PublishRequest) -> str:
    """The command that publishes a workspace as a request says."""
    words = ["imatrix-runner", "publish", str(workspace), "--to", request.to]
    words += ["--private"] if request.private else []
    for name, value in (("--gated", request.gated), ("--licence", request.licence), ("--collection", request.collection)):
        words += [name, value] if value else []
    words += ["--levels", ",".join(request.levels)] if request.levels else []
    words += ["--name-template", request.name_template] if request.name_template != "{model}-{level}" else []
    return shlex.join(words)
