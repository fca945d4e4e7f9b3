"""``compare``: measures GGUF files that were made elsewhere on the text that the levels are measured on, and says which to take
at which size."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.app.report import ReportFiles, make_report
from imatrix_runner.context.context import Context, Session, held, settle
from imatrix_runner.context.engine_choice import EngineNeeds
from imatrix_runner.context.open_model import Frozen, announce, freeze, hash_files, open_source
from imatrix_runner.context.ownership import claim, find_workspace, is_free, place_of
from imatrix_runner.context.requests import CompareRequest, MeasureRequest
from imatrix_runner.engines.files.logits import scored_tokens
from imatrix_runner.engines.measures import Divergence
from imatrix_runner.errors import InterruptedRunError, NoSpaceError, RunnerError, UsageError
from imatrix_runner.evaluate.clone_recipe import CloneRecipe, clone_recipe
from imatrix_runner.evaluate.compare_mixes import measured_here
from imatrix_runner.evaluate.disk_budget import waves
from imatrix_runner.evaluate.equal_size import EqualSizeVerdict, SizeChoice, at_equal_size, size_choices
from imatrix_runner.evaluate.held_out import HeldOut, choose_held_out
from imatrix_runner.evaluate.measure import Measurer, Subject
from imatrix_runner.evaluate.measurements import OtherMeasured, content_of, levels_made
from imatrix_runner.evaluate.mix_verdict import MeasuredSize
from imatrix_runner.evaluate.other_files import OtherFile, check_plain_tensors, described_at, fetched, look_at
from imatrix_runner.events import warning
from imatrix_runner.files import human_bytes, joint_sha256
from imatrix_runner.imatrix.ineffective_collection import warn_of_placement
from imatrix_runner.journal import Journal, StepRecord, differences
from imatrix_runner.models.hub import Hub
from imatrix_runner.models.model import Model, parse_source
from imatrix_runner.quantize.level_files import finish_renames
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.steps import LEVEL_INPUT, MODEL_INPUT, step_id
from imatrix_runner.workspace import Workspace

_FETCHED = "fetched"
"""The folder in the workspace's folder of measurements that files of a hub are fetched into."""


@dataclass(frozen=True)
class ComparePlan:
    """What will be compared, before anything large is fetched. ``refused``: files that are not, by place; ``levels``: own ones,
    of which those in ``todo`` are measured too."""

    model: Model
    held_out: HeldOut
    files: tuple[OtherFile, ...]
    refused: Mapping[str, RunnerError]
    levels: tuple[str, ...]
    todo: tuple[str, ...]


@dataclass(frozen=True)
class ComparedFile:
    """A measured file. ``plain``: number of tensors that neither it nor the source has quantised, all equal; ``figures``: as of
    a level."""

    file: OtherFile
    plain: int
    figures: Divergence
    verdict: EqualSizeVerdict


@dataclass(frozen=True)
class CompareResult:
    """``own``: the workspace's levels that were measured on this text, the smallest first; ``choices``: which of all files to
    take from which size on; ``failed`` by place."""

    workspace: Workspace
    plan: ComparePlan
    compared: tuple[ComparedFile, ...] = ()
    own: tuple[MeasuredSize, ...] = ()
    choices: tuple[SizeChoice, ...] = ()
    failed: Mapping[str, RunnerError] = field(default_factory=dict)
    report: ReportFiles | None = None
    seconds: float = 0.0


def compare_files(
    request: CompareRequest,
    context: Context,
    *,
    dry_run: bool = False,
    on_plan: Callable[[ComparePlan], None] | None = None,
) -> CompareResult:
    """Compare files with the levels of a workspace and with each other. A dry run ends with the plan: what their headers say.

    Raises :class:`RunnerError` for errors that concern all of them; a file that fails alone is in the result.
    """
    began = time.monotonic()
    with _opened(request, context, dry_run=dry_run) as (model, session), scratch_folder() as folder:
        frozen = freeze(model, session)
        if not dry_run and is_free(session.journal):
            claim(session.journal, place_of(parse_source(request.source.model)), frozen.fingerprint, model.n_bytes)
            session.journal.remember(model=model.name, source=model.source.location)
        if model.is_quantised:
            session.sink(warning(f"{model.name} is quantised itself: figures are distances from it, not from its original."))
        job = _Comparison(request, frozen, session, Hub(session.stop, session.sink), folder)
        plan = job.plan()
        if on_plan is not None:
            on_plan(plan)
        if dry_run or not plan.files:
            return CompareResult(session.workspace, plan, failed=plan.refused)
        return replace(job.run(plan), seconds=time.monotonic() - began)


def clone_file(request: CompareRequest, context: Context) -> CloneRecipe:
    """The recipe of the one file of the request, for its source. Nothing is written. Raises :class:`RunnerError`."""
    with _opened(request, context, dry_run=True) as (model, session), scratch_folder() as folder:
        described, place = described_at(request.files[0], Hub(session.stop, session.sink), folder)
        return clone_recipe(described, place, model)


@contextmanager
def _opened(request: CompareRequest, context: Context, *, dry_run: bool) -> Iterator[tuple[Model, Session]]:
    machine, choice = settle(request.environment, EngineNeeds((), (), request.measure.options.n_gpu_layers), context.sink)
    source = parse_source(request.source.model)
    workspace = find_workspace(source, request.source.model, request.environment.work_dir, context.sink, context.stop)
    with (
        held(workspace, request.environment, context, dry_run=dry_run) as runner,
        choice.opened(runner, None, context.sink) as engine,
    ):
        journal = Journal(workspace.journal)
        if not dry_run:
            finish_renames(journal, workspace)
        session = Session(workspace, journal, machine, engine, runner, context.sink, dry_run, choice.make_additional(runner))
        model = open_source(source, request.source, session, allow_requantize=True)
        announce(model, session.sink)
        warn_of_placement(request.measure.options, model, session, choice.no_gpu())
        yield model, session


@dataclass(frozen=True)
class _Comparison:
    request: CompareRequest
    frozen: Frozen
    session: Session
    hub: Hub
    folder: Path

    def plan(self) -> ComparePlan:
        if not self.session.engine.capabilities.scores_tokens:
            raise UsageError(
                "compare needs the embedded engine",
                "llama-perplexity keeps no scores of single tokens, from which files are compared",
                "Leave --engine out, or use --engine embedded.",
            )
        model = self.frozen.model
        files: dict[str, OtherFile] = {}
        refused: dict[str, RunnerError] = {}
        for given in self.request.files:
            for place, found in look_at(given, model, self.hub, self.folder).items():
                if isinstance(found, OtherFile):
                    files[place] = found
                else:
                    refused[place] = found
        named = self._hashed(_distinct(files.values(), levels_made(self.session.journal)))
        measure, own = self.request.measure, self._own()
        while True:
            sizes = [each.n_bytes for each in named if not each.paths]
            try:
                held_out = choose_held_out(measure, self.frozen, len(own) + len(named) - len(sizes), sizes, self.session)
                break
            except NoSpaceError as error:
                if not sizes:
                    raise
                largest = max((each for each in named if not each.paths), key=lambda each: each.n_bytes)
                refused[largest.place] = NoSpaceError(
                    f"There is no room for {largest.place}",
                    f"it takes {human_bytes(largest.n_bytes)}; {error.why.rpartition(', and ')[2]} for it and its measurement",
                    "Raise --max-disk or free some space, or fetch it to another disk and give its path.",
                )
                named = [each for each in named if each is not largest]
        subjects = self._own_subjects(own, held_out, measure)
        todo = tuple(subject.name for subject in subjects if subject.todo)
        return ComparePlan(model, held_out, tuple(named), refused, own, todo)

    def run(self, plan: ComparePlan) -> CompareResult:
        measurer = Measurer(plan.held_out, self.frozen, self.session, self.session.sink)
        failed = dict(plan.refused)
        subjects = self._own_subjects(plan.levels, plan.held_out, self.request.measure)
        others = [(each, self._subject(each)) for each in plan.files]
        if self.request.measure.again:
            measurer.forget([*subjects, *(subject for _, subject in others)])
        here = [pair for pair in others if pair[0].paths or measurer.knows(pair[1])]
        figures, plain = dict[str, Divergence](), dict[str, int]()

        def measure(some: Sequence[tuple[OtherFile, Subject]], also: Sequence[Subject] = ()) -> None:
            """Measure files that are there, and own levels with them."""
            fine = []
            for other, subject in some:
                try:
                    if other.paths:
                        plain[other.name] = check_plain_tensors(other.paths, other.place, self.frozen.model, self.session.stop)
                    fine.append((other, subject))
                except InterruptedRunError:
                    raise
                except RunnerError as error:
                    failed[other.place] = error
            places = {subject.name: other.place for other, subject in fine}
            for name, found in measurer.measure([*also, *(subject for _, subject in fine)]).items():
                if isinstance(found, Divergence):
                    figures[name] = found
                else:
                    failed[places.get(name, name)] = found

        measure(here, [subject for subject in subjects if subject.todo])
        away = {other.name: (other, subject) for other, subject in others if (other, subject) not in here}
        for wave in waves({name: pair[0].n_bytes for name, pair in away.items()}, plan.held_out.fit.room):
            for name in wave:
                other, subject = away[name]
                with self._fetched(other, failed) as there:
                    if there is not None:
                        measure([(there, replace(subject, file=there.paths[0]))])
        own = sorted(measured_here(measurer, self.session, levels_made(self.session.journal)), key=lambda each: each.n_bytes)
        measurer.tidy()
        shutil.rmtree(self._downloads, ignore_errors=True)
        return self._verdicts(plan, measurer, own, figures, plain, failed)

    def _verdicts(
        self,
        plan: ComparePlan,
        measurer: Measurer,
        own: Sequence[MeasuredSize],
        figures: Mapping[str, Divergence],
        plain: Mapping[str, int],
        failed: Mapping[str, RunnerError],
    ) -> CompareResult:
        compared: list[ComparedFile] = []
        sizes: list[MeasuredSize] = []
        rows = scored_tokens(plan.held_out.extent.n_ctx)
        for other in plan.files:
            found = figures.get(other.name)
            if found is None:
                continue
            chunks = measurer.scored(self._subject(other))["kld"].astype(float).reshape(-1, rows).mean(axis=1)
            size = MeasuredSize(other.name, other.n_bytes, found.kld, chunks)
            sizes.append(size)
            verdict = at_equal_size(size, own)
            compared.append(ComparedFile(other, plain.get(other.name, 0), found, verdict))
            self._record(plan.held_out, other, found, verdict, own)
        choices, session = size_choices([*own, *sizes]), self.session
        report = make_report(session.workspace, session.journal, session.runner, session.sink, strict=False) if own else None
        return CompareResult(session.workspace, plan, tuple(compared), tuple(own), choices, failed, report)

    def _record(
        self,
        held_out: HeldOut,
        other: OtherFile,
        found: Divergence,
        verdict: EqualSizeVerdict,
        own: Sequence[MeasuredSize],
    ) -> None:
        """Record a comparison, for reports."""
        place = other.place if other.published is not None else Path(other.place).name
        facts = OtherMeasured(
            other.name,
            place,
            other.n_bytes,
            found.kld,
            found.same_top.value,
            verdict,
            held_out.sha256,
            held_out.extent.n_chunks,
            held_out.extent.n_ctx,
            {each.level: each.kld.value for each in own if each.level in verdict.between},
        )
        inputs = {**held_out.whole_inputs, LEVEL_INPUT: other.content}
        record = StepRecord.now(inputs, [], "it is compared", 0.0, facts=facts)
        self.session.journal.record(step_id("other", other.name), record)

    def _own(self) -> tuple[str, ...]:
        """The finished levels that were made from this source and are still there."""
        journal = self.session.journal
        return tuple(
            name
            for name, record in levels_made(journal).items()
            if record.inputs.get(MODEL_INPUT) == self.frozen.fingerprint
            and journal.still_there(step_id("level", name), save=not self.session.dry_run)
        )

    def _own_subjects(self, names: Sequence[str], held_out: HeldOut, measure: MeasureRequest) -> list[Subject]:
        made, journal, found = levels_made(self.session.journal), self.session.journal, list[Subject]()
        for name in names:
            step, inputs = step_id("evaluate", name), {LEVEL_INPUT: content_of(made[name])}
            before = journal.get(step)
            known = before is not None and not differences(before, {**held_out.whole_inputs, **inputs}) and not measure.again
            file = self.session.workspace.root / made[name].output.name
            found.append(Subject(name, step, file, inputs, "" if known else "files are compared with it"))
        return found

    def _subject(self, other: OtherFile) -> Subject:
        file = other.paths[0] if other.paths else self.session.workspace.root / f"{other.name}.gguf"
        return Subject(other.name, step_id("evaluate", other.name), file, {LEVEL_INPUT: other.content}, "it is compared")

    def _hashed(self, files: Sequence[OtherFile]) -> list[OtherFile]:
        """The files, each with a text that changes with its content."""
        return [
            each if each.content else replace(each, content=joint_sha256(hash_files(each.paths, self.session)))
            for each in files
        ]

    @contextmanager
    def _fetched(self, other: OtherFile, failed: dict[str, RunnerError]) -> Iterator[OtherFile | None]:
        """The file with its paths, from the hub's cache or fetched; None if that failed. What was fetched here is removed
        afterwards, unless it is to be kept."""
        try:
            there = fetched(other, self.hub) if self.request.keep else self._known_or_fetched(other)
        except InterruptedRunError:
            raise
        except RunnerError as error:
            failed[other.place] = error
            yield None
            return
        yield there
        shutil.rmtree(self._downloads, ignore_errors=True)

    @property
    def _downloads(self) -> Path:
        """A hub's cache for what is removed again. What a kill leaves in it is used by the next command."""
        return self.session.workspace.evaluation / _FETCHED

    def _known_or_fetched(self, other: OtherFile) -> OtherFile:
        """From the hub's own cache if all of it is there, else fetched into a cache of the workspace's."""
        cached = replace(self.hub, offline=True)
        try:
            return fetched(other, cached)
        except RunnerError:
            return fetched(other, replace(self.hub, cache=self._downloads))


def _distinct(files: Iterable[OtherFile], taken: Iterable[str]) -> list[OtherFile]:
    """The files, each with a name of its own that no level has."""
    names, found = {"source", "reference", *taken}, list[OtherFile]()
    for each in files:
        name, number = each.name, 1
        while name in names:
            number += 1
            name = f"{each.name} {number}"
        names.add(name)
        found.append(replace(each, name=name))
    return found
