"""``run``: resolve the model, obtain the imatrix, plan every level, make the levels, and return the result of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.advise.memory import SPARE_BYTES, context_memory
from imatrix_runner.app.attest_levels import attest_levels, require_attestable
from imatrix_runner.app.background_uploads import level_uploads, try_to_finish
from imatrix_runner.app.evaluate import EvaluateResult, check_request, domain_of, evaluate_levels
from imatrix_runner.app.local_use import write_modelfiles
from imatrix_runner.app.publish import PublishResult
from imatrix_runner.app.report import ReportFiles, make_report
from imatrix_runner.app.run_levels import choose_levels, make_levels, refuse_hopeless, rounded
from imatrix_runner.app.speed_targets import verify_speeds
from imatrix_runner.context.context import Context, Session, held, settle
from imatrix_runner.context.engine_choice import EngineChoice, EngineNeeds, make_checker
from imatrix_runner.context.open_model import Frozen, announce, freeze, open_source
from imatrix_runner.context.ownership import claim, find_workspace, place_of
from imatrix_runner.context.requests import MODES, LevelsRequest, RunRequest
from imatrix_runner.documents.corpus import open_corpus
from imatrix_runner.engines.jobs import PassFigures
from imatrix_runner.engines.levels import Level
from imatrix_runner.engines.roundings import FEEDBACK, STOCK
from imatrix_runner.errors import InvalidDataError, RunnerError
from imatrix_runner.evaluate.held_out import foresee
from imatrix_runner.evaluate.predict_levels import predict_levels
from imatrix_runner.evaluate.prompt_answers import check_prompts
from imatrix_runner.evaluate.set_aside import with_part_set_aside
from imatrix_runner.events import detail, ignore, info, warning
from imatrix_runner.files import free_bytes, human_bytes
from imatrix_runner.imatrix import obtain as imatrix_flow
from imatrix_runner.imatrix.collection_facts import CollectedFacts
from imatrix_runner.imatrix.covariances import CovarianceSet
from imatrix_runner.imatrix.expected import ExpectedMatrix
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.imatrix.formats import read as read_matrix
from imatrix_runner.imatrix.ineffective_collection import warn_of_placement
from imatrix_runner.imatrix.plan_generation import as_built
from imatrix_runner.journal import Journal
from imatrix_runner.mixes.covariance_source import CovarianceSource
from imatrix_runner.mixes.mix_planner import MixPlanner, pending_step
from imatrix_runner.mixes.rounding_planner import RoundingPlanner
from imatrix_runner.mixes.targets import mix_targets, need_text
from imatrix_runner.models.kind import require_measurable
from imatrix_runner.models.model import Model, Source, parse_source
from imatrix_runner.quantize.disk_room import passing_bytes, reserved_bytes
from imatrix_runner.quantize.executor import LevelResult, MadeLevels
from imatrix_runner.quantize.level_files import finish_renames
from imatrix_runner.quantize.plan import MOST_JOBS, LevelStep, MeasureStep, MixingStep, Plan, PredictedKld
from imatrix_runner.quantize.plan_notes import plan_notes
from imatrix_runner.quantize.planner import LevelPlanner
from imatrix_runner.quantize.recipe import ignored_tensor_types
from imatrix_runner.quantize.warnings import warn_of_level_options, warn_of_making
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.hardware import likes_bf16

_CONTEXT = 4096
"""Tokens of context that a mix for a given memory leaves room for: the default of ``advise``."""


@dataclass(frozen=True)
class RunResult:
    """The plan of a run and its outcome; ``levels`` is empty for a dry run and for ``imatrix generate``.

    ``engine`` is the engine's name, ``toolchain`` its identity: program or library, version, build. ``collected``: how the
    imatrix was made, from the journal, if it was made here; ``passes``: figures of each single pass over the model.
    ``unpublished``: why not everything is on the hub, where ``--publish`` asked for it. ``modelfiles``: those for Ollama, by
    level.
    """

    plan: Plan
    model: Model
    engine: str
    toolchain: str
    imatrix: MatrixFile | None
    levels: tuple[LevelResult, ...]
    seconds: float
    collected: CollectedFacts | None = None
    passes: tuple[PassFigures, ...] = ()
    evaluated: EvaluateResult | None = None
    report: ReportFiles | None = None
    published: PublishResult | None = None
    unpublished: RunnerError | None = None
    modelfiles: Mapping[str, Path] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[LevelResult, ...]:
        return tuple(level for level in self.levels if level.status == "failed")


def run(
    request: RunRequest, context: Context, *, dry_run: bool = False, on_plan: Callable[[Plan], None] | None = None
) -> RunResult:
    """Carry out a request. ``on_plan`` is called with the plan before anything is computed; a dry run ends there.

    Raises :class:`RunnerError` for errors that stop the whole run; a level that fails alone is in the result.
    """
    began = time.monotonic()
    for text in request.warnings:
        context.sink(warning(text))
    machine, choice = settle(request.environment, _needs(request), context.sink)
    source = parse_source(request.source.model)
    workspace = find_workspace(
        source,
        request.source.model,
        request.environment.work_dir,
        context.sink,
        context.stop,
        force=request.environment.force,
    )
    with (
        held(workspace, request.environment, context, dry_run=dry_run) as runner,
        scratch_folder() as scratch,
        ExitStack() as stack,
    ):
        cluster = None if dry_run else request.environment.cluster
        engine = stack.enter_context(choice.opened(runner, cluster, context.sink))
        journal, additional = Journal(workspace.journal), choice.make_additional(runner)
        full = request.levels is not None and request.levels.verify == "full"
        checker = make_checker(machine, runner) if full else None
        session = Session(workspace, journal, machine, engine, runner, context.sink, dry_run, additional, checker)
        if request.attest:
            require_attestable(session)
        if not dry_run:
            finish_renames(journal, workspace)
        uploads = stack.enter_context(level_uploads(request.publish, session))
        request = with_part_set_aside(request, session, scratch)
        job = _Job(request, session, choice)
        levels = job.levels()
        job.check_inputs()
        model = job.open_model(source)
        frozen = freeze(model, session)
        chosen = imatrix_flow.choose(request.imatrix, source, frozen, session)
        if chosen.request is not None:
            job.advise_type(model)
        planner = LevelPlanner(request.levels, frozen, session) if request.levels is not None else None
        choices = job.choices(planner, chosen, chosen.file, levels)
        plan = job.within_target(job.plan(model, chosen, planner, choices, levels, chosen.file))
        if planner is not None:
            known = tuple(step for step in plan.levels if step.files)
            warn_of_level_options(planner, known, chosen.step, chosen.file, chosen.expected)
            warn_of_making(planner.request, session)
        predicted = job.predict(plan, planner, chosen) if planner is not None else {}
        plan = replace(plan, measure=job.foresee(plan, frozen), notes=plan_notes(plan.levels, model), predicted=predicted)
        if work := choices.work():
            session.sink(info(work))
        if uploads is not None:
            uploads.check(plan.levels)
        if on_plan is not None:
            on_plan(plan)
        matrix = chosen.file
        made, evaluated, report = MadeLevels((), ()), None, None
        modelfiles: Mapping[str, Path] = {}
        if not dry_run:
            refuse_hopeless(plan, one_by_one=request.levels is not None and request.levels.one_by_one)
            job.begin(source, frozen, tuple(step.level for step in plan.levels))
            if chosen.request is not None:
                matrix = imatrix_flow.generate(chosen, session)
                imatrix_flow.warn_of_findings(matrix, model, session.sink)
                choices = job.choices(planner, chosen, matrix, levels)
            choices.choose()
            if choices.some or chosen.request is not None:
                again = job.within_target(job.plan(model, chosen, planner, choices, levels, matrix))
                plan = replace(again, measure=plan.measure, notes=plan.notes, predicted=predicted)
            if choices.some:
                session.journal.remember(levels=",".join(step.level.name for step in plan.levels))
            if planner is not None:
                made = make_levels(plan, planner, matrix, session, job.covariances(plan, planner), uploads)
                job.verify_speeds(planner)
                if request.attest:
                    attest_levels(plan.levels, frozen, matrix, session)
                evaluated = job.evaluate(made, frozen)
                if any(result.status != "failed" for result in made.results):
                    command = request.environment.command
                    report = make_report(workspace, journal, runner, context.sink, command=command, strict=False)
                    modelfiles = write_modelfiles(workspace, journal, runner, context.sink)
            session.journal.remember(finished="yes")
        published, unpublished = try_to_finish(uploads if report is not None else None)
        seconds = time.monotonic() - began
        collected = imatrix_flow.collected_facts(matrix, session)
        return RunResult(
            plan,
            model,
            engine.name,
            engine.identity(),
            matrix,
            made.results,
            seconds,
            collected,
            made.passes,
            evaluated,
            report,
            published,
            unpublished,
            modelfiles,
        )


def _needs(request: RunRequest) -> EngineNeeds:
    options = request.imatrix.options
    return EngineNeeds(request.levels.names if request.levels is not None else (), options.extra, options.n_gpu_layers)


@dataclass(frozen=True)
class _Choices:
    """What is chosen by measuring: the types of mixes, and the rounding of levels."""

    mixes: MixPlanner | None = None
    roundings: RoundingPlanner | None = None

    @property
    def some(self) -> bool:
        return self.mixes is not None or self.roundings is not None

    def work(self) -> str:
        """What covariances will take, where some are needed that are not there; else empty."""
        if self.roundings is not None and any(level.rounding == FEEDBACK for level in self.roundings.levels):
            return self.roundings.source.work()
        mixes = self.mixes
        return mixes.source.work() if mixes is not None and mixes.planner.request.rounding == FEEDBACK else ""

    def choose(self) -> None:
        if self.roundings is not None:
            self.roundings.choose()
        if self.mixes is not None:
            self.mixes.choose()


@dataclass(frozen=True)
class _Job:
    request: RunRequest
    session: Session
    choice: EngineChoice

    def open_model(self, source: Source) -> Model:
        levels = self.request.levels
        allow = levels is None or levels.options.allow_requantize
        model = open_source(source, self.request.source, self.session, allow_requantize=allow)
        announce(model, self.session.sink)
        if self.request.measure is not None:
            require_measurable(model)
        warn_of_placement(self.request.imatrix.options, model, self.session, self.choice.no_gpu())
        return model

    def check_inputs(self) -> None:
        """Check what can be checked before a model is fetched or converted."""
        text, mode = self.request.imatrix.text, self.request.imatrix.mode
        levels = self.request.levels
        mixing = levels is not None and need_text(levels.names, levels.rounding)
        if text is not None and (mixing or mode in ("auto", "generate")):
            open_corpus(text)
        if mode not in MODES:
            read_matrix(Path(mode).expanduser())
        if (measure := self.request.measure) is not None:
            there = self.session.workspace.find_imatrix() is not None or not (text is not None or mode == "generate")
            check_request(measure, None if there else text or resource(CALIBRATION_TEXT), self.session)

    def levels(self) -> tuple[Level, ...]:
        request = self.request.levels
        if request is None:
            return ()
        levels = tuple(rounded(level, request) for level in choose_levels(request, self.session.types, self.session.sink))
        ignored = [level.name for level in levels if ignored_tensor_types(level, request.options)]
        if ignored:
            self.session.sink(warning(f"llama.cpp ignores --tensor-type for {', '.join(ignored)}."))
        return levels

    def plan(
        self,
        model: Model,
        chosen: imatrix_flow.ImatrixChoice,
        planner: LevelPlanner | None,
        choices: _Choices,
        levels: tuple[Level, ...],
        matrix: MatrixFile | None,
    ) -> Plan:
        """The plan of everything that will happen; made again once an imatrix is generated, and choices are made."""
        root = self.session.workspace.root
        steps: tuple[LevelStep, ...] = ()
        mixing: MixingStep | None = None
        if planner is not None:
            fingerprint, expected = self._imatrix_input(chosen, matrix)
            mixes, roundings = choices.mixes, choices.roundings
            mixed, pending = mixes.known() if mixes is not None else ({}, ())
            rounded = roundings.known() if roundings is not None else {}
            named = [rounded.get(level.name, level) for level in levels]
            wanted = tuple({level.name: level for level in (*named, *mixed.values())}.values())
            steps = planner.plan(wanted, matrix, fingerprint, expected) if wanted else ()
            steps = self._without_needy(steps, planner.request) if not chosen.step.present else steps
            steps = (*steps, *map(pending_step, pending))
            mixing = mixes.work(len(pending)) if mixes is not None else None
        free = free_bytes(root) + reserved_bytes(self.session.workspace)
        return Plan(root, model.name, chosen.step, steps, free, mixing=mixing, passing_bytes=self._passing_bytes(steps))

    def _passing_bytes(self, steps: Sequence[LevelStep]) -> int:
        levels, session = self.request.levels, self.session
        if levels is None or not levels.options.is_split:
            return 0
        apart = [step for step in steps if session.engine_for(step.level.name).capabilities.cuts_written_levels]
        return passing_bytes(apart, levels.jobs or MOST_JOBS)

    def choices(
        self,
        planner: LevelPlanner | None,
        chosen: imatrix_flow.ImatrixChoice,
        matrix: MatrixFile | None,
        levels: tuple[Level, ...],
    ) -> _Choices:
        """What is chosen by measuring before levels are made."""
        if planner is None:
            return _Choices()
        return _Choices(self.mixes(planner, chosen, matrix), self.roundings(planner, chosen, matrix, levels))

    def mixes(self, planner: LevelPlanner, chosen: imatrix_flow.ImatrixChoice, matrix: MatrixFile | None) -> MixPlanner | None:
        """The mixes of the request; None without any."""
        targets = mix_targets(planner.request.names)
        if not targets:
            return None
        fingerprint, expected = self._imatrix_input(chosen, matrix)
        source = self._covariances(planner)
        context = context_memory(planner.frozen.model, _CONTEXT).n_bytes or 0
        speed = imatrix_flow.collecting_speed(matrix, self.session)
        return MixPlanner(planner, targets, source, fingerprint, matrix, expected, context + SPARE_BYTES, speed)

    def roundings(
        self,
        planner: LevelPlanner,
        chosen: imatrix_flow.ImatrixChoice,
        matrix: MatrixFile | None,
        levels: tuple[Level, ...],
    ) -> RoundingPlanner | None:
        """The levels of the request that are not rounded as llama-quantize does; None without any."""
        others = tuple(level for level in levels if level.rounding != STOCK)
        if not others:
            return None
        fingerprint, expected = self._imatrix_input(chosen, matrix)
        return RoundingPlanner(planner, others, self._covariances(planner), fingerprint, matrix, expected)

    def _covariances(self, planner: LevelPlanner) -> CovarianceSource:
        """The calibration text as what costs, roundings and covariances are measured on."""
        corpus = open_corpus(self.request.imatrix.text or resource(CALIBRATION_TEXT))
        options = as_built(self.request.imatrix, corpus, ignore).options
        return CovarianceSource(planner.frozen, self.session, corpus, options, planner.request.feedback_tokens)

    def _imatrix_input(
        self, chosen: imatrix_flow.ImatrixChoice, matrix: MatrixFile | None
    ) -> tuple[str, ExpectedMatrix | None]:
        """The imatrix as an input of levels, and the entries expected of one that is still to be made."""
        if matrix is None and chosen.step.present:
            return "still to be made", chosen.expected
        return imatrix_flow.fingerprint(matrix, self.session), None

    def _without_needy(self, steps: tuple[LevelStep, ...], request: LevelsRequest) -> tuple[LevelStep, ...]:
        """The steps without default levels that need an imatrix; levels that were requested by name stay, and fail."""
        needy = [step.level.name for step in steps if step.state == "fails" and step.facts.needs_imatrix]
        if request.names or request.preset or not needy:
            return steps
        self.session.sink(info(f"{', '.join(needy)} left out: they need an imatrix, and there is none."))
        return tuple(step for step in steps if step.level.name not in needy)

    def begin(self, source: Source, frozen: Frozen, levels: tuple[Level, ...]) -> None:
        """Record the workspace's source and the request, so that ``status`` can show what is missing and the command that
        continues."""
        model, journal = frozen.model, self.session.journal
        names = ",".join(level.name for level in levels)
        command = self.request.environment.command
        # A model inside the workspace was converted, and the workspace claimed at that time.
        if journal.fact("source_at") is None or not model.path.is_relative_to(self.session.workspace.root):
            claim(journal, place_of(source), frozen.fingerprint, model.n_bytes)
        journal.remember(
            model_file=frozen.fingerprint,
            model=model.name,
            source=model.source.location,
            dequantised=model.source.dequantised,
            levels=names,
            command=command,
            finished="no",
        )

    def within_target(self, plan: Plan) -> Plan:
        """The plan without the levels that are larger than ``--target-size``, which could not be picked."""
        target = self.request.measure.target_size if self.request.measure is not None else None
        if target is None:
            return plan
        fit = tuple(step for step in plan.levels if (step.facts.n_bytes or 0) <= target)
        if not fit:
            least = min(plan.levels, key=lambda step: step.facts.n_bytes or 0)
            raise InvalidDataError(
                f"No level is as small as {human_bytes(target)}",
                f"the smallest of those requested is {least.level.name} with {human_bytes(least.facts.n_bytes or 0)}",
                "Ask for smaller --levels (IQ2_XXS, IQ1_S), or raise --target-size.",
            )
        left_out = [step.level.name for step in plan.levels if step not in fit]
        if left_out:
            self.session.sink(detail(f"Larger than {human_bytes(target)}, left out: {', '.join(left_out)}."))
        return replace(plan, levels=fit)

    def covariances(self, plan: Plan, planner: LevelPlanner) -> CovarianceSet | None:
        """The covariances that levels still to be made need; None if none does."""
        if not any(step.level.rounding == FEEDBACK for step in plan.todo):
            return None
        return self._covariances(planner).obtain()

    def foresee(self, plan: Plan, frozen: Frozen) -> MeasureStep | None:
        """What ``--evaluate`` will take; None without it, or if there will be no level to measure (:func:`refuse_hopeless`)."""
        request, levels = self.request.measure, self.request.levels
        writable = plan.new_bytes <= plan.free_bytes or (levels is not None and levels.one_by_one)
        if request is None or not writable or len(plan.failing) == len(plan.levels):
            return None
        if (domain := domain_of(request)) is not None:
            check_prompts(domain, frozen.model, self.session)
        return foresee(request, frozen, plan, self.session)

    def predict(self, plan: Plan, planner: LevelPlanner, chosen: imatrix_flow.ImatrixChoice) -> Mapping[str, PredictedKld]:
        """The KLD of the plan's stock levels, as far as a cost map predicts it."""
        levels = [step.level for step in plan.levels if step.files and step.state != "fails"]
        fingerprint, _ = self._imatrix_input(chosen, chosen.file)
        return predict_levels(planner, levels, chosen.file, fingerprint)

    def evaluate(self, made: MadeLevels, frozen: Frozen) -> EvaluateResult | None:
        """Measure the levels that were made or were there already, with ``--evaluate``; None without it."""
        request, levels = self.request.measure, self.request.levels
        there = tuple(result.step.level.name for result in made.results if result.status != "failed")
        if request is None or levels is None or not there:
            return None
        return evaluate_levels(replace(request, levels=there), levels, frozen, self.session)

    def verify_speeds(self, planner: LevelPlanner) -> None:
        """Time the mixes that were asked for a speed."""
        targets = mix_targets(planner.request.names)
        verify_speeds(targets, self._covariances(planner).options, planner.frozen, self.session)

    def advise_type(self, model: Model) -> None:
        """Before an imatrix is computed, say so if a BF16 file of the same model would take much less time."""
        on_gpu = bool(self.session.engine.devices) and self.request.imatrix.options.n_gpu_layers != "0"
        bindings = self.choice.bindings
        if bindings is not None and not on_gpu and model.main_type in ("F16", "F32") and likes_bf16(bindings.features):
            self.session.sink(
                info(
                    f"The model is {model.main_type}; this processor computes BF16 about 1.4x faster than F16. "
                    "If the original was published in BF16, a BF16 file of it is as exact and quicker."
                )
            )
