"""The main job: resolve the model, obtain the imatrix, plan every level, make them, say what became of each."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.calibration.corpus import open_corpus
from imatrix_runner.engines.base import PassFigures
from imatrix_runner.errors import InvalidDataError, NoSpaceError
from imatrix_runner.events import Sink, detail, info, warning
from imatrix_runner.files import existing_parent, free_bytes, human_bytes
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.imatrix.formats import read as read_matrix
from imatrix_runner.journal import Journal
from imatrix_runner.models.kind import require_measurable
from imatrix_runner.models.sources import Model, Source, parse_source
from imatrix_runner.quantize.levels import DEFAULT_LEVELS, Level, offered, preset_levels, resolve_levels
from imatrix_runner.quantize.recipe import ignored_tensor_types
from imatrix_runner.resources import CALIBRATION_TEXT, resource
from imatrix_runner.toolchain.hardware import likes_bf16
from imatrix_runner.toolchain.probe import QuantType
from imatrix_runner.workflow import imatrix as imatrix_flow
from imatrix_runner.workflow.answers import check_prompts
from imatrix_runner.workflow.choice import Choice, Needs, make_checker
from imatrix_runner.workflow.context import Context, Session, held, settle
from imatrix_runner.workflow.evaluate import EvaluateResult, check_request, domain_of, evaluate_levels
from imatrix_runner.workflow.ineffective import warn_of_level_options, warn_of_making, warn_of_placement
from imatrix_runner.workflow.levels import LevelPlanner
from imatrix_runner.workflow.making import LevelMaker, LevelResult, MadeLevels, refused, reserved_bytes, skipped
from imatrix_runner.workflow.ownership import MODEL_FILE, PLACE, claim, find_workspace, place_of
from imatrix_runner.workflow.plan import LevelStep, MeasureStep, Plan
from imatrix_runner.workflow.plan_notes import plan_notes
from imatrix_runner.workflow.report import ReportFiles, make_report
from imatrix_runner.workflow.request import MODES, LevelsRequest, RunRequest
from imatrix_runner.workflow.set_aside import with_part_set_aside
from imatrix_runner.workflow.source import Frozen, announce, freeze, open_source
from imatrix_runner.workflow.yardstick import foresee


@dataclass(frozen=True)
class RunResult:
    """What a run planned and what became of it; ``levels`` is empty for a dry run and for ``imatrix generate``.

    ``engine`` is the name of the engine that computed, ``toolchain`` its identity: program or library, version, build.
    ``collected`` is what the journal knows of how the imatrix was made, if it was made here; ``passes`` where the time of the
    passes over the model went.
    """

    plan: Plan
    model: Model
    engine: str
    toolchain: str
    imatrix: MatrixFile | None
    levels: tuple[LevelResult, ...]
    seconds: float
    collected: Mapping[str, object] | None = None
    passes: tuple[PassFigures, ...] = ()
    evaluated: EvaluateResult | None = None
    report: ReportFiles | None = None

    @property
    def failed(self) -> tuple[LevelResult, ...]:
        return tuple(level for level in self.levels if level.status == "failed")


def run(
    request: RunRequest, context: Context, *, dry_run: bool = False, on_plan: Callable[[Plan], None] | None = None
) -> RunResult:
    """Do what was asked for. ``on_plan`` sees the plan before anything is computed; a dry run ends there.

    Raises errors of ours for what stops the whole run; a level that fails alone is in the result.
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
    with held(workspace, request.environment, context, dry_run=dry_run) as runner:
        engine = choice.make(runner)
        journal, beside = Journal(workspace.journal), choice.make_beside(runner)
        full = request.levels is not None and request.levels.verify == "full"
        checker = make_checker(machine, runner) if full else None
        session = Session(workspace, journal, machine, engine, runner, context.sink, dry_run, beside, checker)
        request = with_part_set_aside(request, session)
        job = _Job(request, session, choice)
        levels = job.levels()
        job.check_inputs()
        model = job.open_model(source)
        frozen = freeze(model, session)
        chosen = imatrix_flow.choose(request.imatrix, source, frozen, session)
        if chosen.request is not None:
            job.advise_type(model)
        planner = LevelPlanner(request.levels, frozen, session) if request.levels is not None else None
        plan = job.within_target(job.plan(model, chosen, planner, levels, chosen.file))
        if planner is not None:
            warn_of_level_options(planner, plan.levels, chosen.step, chosen.file, chosen.expected)
            warn_of_making(planner.request, session)
        plan = replace(plan, measure=job.foresee(plan, frozen), notes=plan_notes(plan.levels, model))
        if on_plan is not None:
            on_plan(plan)
        matrix = chosen.file
        made, evaluated, report = MadeLevels((), ()), None, None
        if not dry_run:
            refuse_hopeless(plan, one_by_one=request.levels is not None and request.levels.one_by_one)
            job.begin(source, frozen, tuple(step.level for step in plan.levels))
            if chosen.request is not None:
                matrix = imatrix_flow.generate(chosen, session)
                imatrix_flow.tell_weaknesses(matrix, model, session.sink)
                again = job.within_target(job.plan(model, chosen, planner, levels, matrix))
                plan = replace(again, measure=plan.measure, notes=plan.notes)
            if planner is not None:
                made = make_levels(plan, planner, matrix, session)
                evaluated = job.evaluate(made, frozen)
                if any(result.status != "failed" for result in made.results):
                    command = request.environment.command
                    report = make_report(workspace, journal, runner, context.sink, command=command, strict=False)
            session.journal.remember(finished="yes")
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
        )


def _needs(request: RunRequest) -> Needs:
    options = request.imatrix.options
    return Needs(request.levels.names if request.levels is not None else (), options.extra, options.n_gpu_layers)


@dataclass(frozen=True)
class _Job:
    request: RunRequest
    session: Session
    choice: Choice

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
        """What can be seen to be wrong before a model is fetched or converted."""
        text, mode = self.request.imatrix.text, self.request.imatrix.mode
        if text is not None and mode in ("auto", "generate"):
            open_corpus(text)
        elif mode not in MODES:
            read_matrix(Path(mode).expanduser())
        if (measure := self.request.measure) is not None:
            there = self.session.workspace.find_imatrix() is not None or not (text is not None or mode == "generate")
            check_request(measure, None if there else text or resource(CALIBRATION_TEXT), self.session)

    def levels(self) -> tuple[Level, ...]:
        request = self.request.levels
        if request is None:
            return ()
        levels = choose_levels(request, self.session.types, self.session.sink)
        ignored = [level.name for level in levels if ignored_tensor_types(level, request.options)]
        if ignored:
            self.session.sink(warning(f"llama.cpp ignores --tensor-type for {', '.join(ignored)}."))
        return levels

    def plan(
        self,
        model: Model,
        chosen: imatrix_flow.Chosen,
        planner: LevelPlanner | None,
        levels: tuple[Level, ...],
        matrix: MatrixFile | None,
    ) -> Plan:
        """Everything that will happen; asked for again once a generated imatrix is there."""
        root = self.session.workspace.root
        steps: tuple[LevelStep, ...] = ()
        if planner is not None:
            pending = matrix is None and chosen.step.present
            fingerprint = "still to be made" if pending else imatrix_flow.fingerprint(matrix, self.session)
            steps = planner.plan(levels, matrix, fingerprint, chosen.expected if pending else None)
            steps = self._without_needy(steps, planner.request) if not chosen.step.present else steps
        free = free_bytes(root) + reserved_bytes(self.session.workspace)
        return Plan(root, model.name, chosen.step, steps, free)

    def _without_needy(self, steps: tuple[LevelStep, ...], request: LevelsRequest) -> tuple[LevelStep, ...]:
        """Of the default levels, which nobody named, those that can be made without an imatrix."""
        needy = [step.level.name for step in steps if step.state == "fails" and step.facts.needs_imatrix]
        if request.names or request.preset or not needy:
            return steps
        self.session.sink(info(f"{', '.join(needy)} need an imatrix, and there is none: they are left out."))
        return tuple(step for step in steps if step.level.name not in needy)

    def begin(self, source: Source, frozen: Frozen, levels: tuple[Level, ...]) -> None:
        """Write down whose workspace this is and what was asked for, so that ``status`` can tell what is missing and how to go
        on."""
        model, journal = frozen.model, self.session.journal
        names = ",".join(level.name for level in levels)
        command = self.request.environment.command
        # What lies in the workspace was converted, and claimed with its checkpoint.
        if journal.fact(PLACE) is None or not model.path.is_relative_to(self.session.workspace.root):
            claim(journal, place_of(source), frozen.fingerprint, model.n_bytes)
        journal.remember(
            **{MODEL_FILE: frozen.fingerprint},
            model=model.name,
            source=model.source.location,
            dequantised=model.source.dequantised,
            levels=names,
            command=command,
            finished="no",
        )

    def within_target(self, plan: Plan) -> Plan:
        """The plan without the levels that are larger than ``--target-size``: they could not be picked."""
        target = self.request.measure.target_size if self.request.measure is not None else None
        if target is None:
            return plan
        fit = tuple(step for step in plan.levels if (step.facts.n_bytes or 0) <= target)
        if not fit:
            least = min(plan.levels, key=lambda step: step.facts.n_bytes or 0)
            raise InvalidDataError(
                f"No level is as small as {human_bytes(target)}",
                f"the smallest of those asked for is {least.level.name} with {human_bytes(least.facts.n_bytes or 0)}",
                "Ask for smaller --levels (IQ2_XXS, IQ1_S), or raise --target-size.",
            )
        left_out = [step.level.name for step in plan.levels if step not in fit]
        if left_out:
            self.session.sink(detail(f"Larger than {human_bytes(target)}, left out: {', '.join(left_out)}."))
        return replace(plan, levels=fit)

    def foresee(self, plan: Plan, frozen: Frozen) -> MeasureStep | None:
        """What ``--evaluate`` will take, where there will be levels to measure (:func:`refuse_hopeless`)."""
        request, levels = self.request.measure, self.request.levels
        writable = plan.new_bytes <= plan.free_bytes or (levels is not None and levels.one_by_one)
        if request is None or not writable or len(plan.failing) == len(plan.levels):
            return None
        if (domain := domain_of(request)) is not None:
            check_prompts(domain, frozen.model, self.session)
        return foresee(request, frozen, plan, self.session)

    def evaluate(self, made: MadeLevels, frozen: Frozen) -> EvaluateResult | None:
        """``--evaluate``: measure the levels that are there now."""
        request, levels = self.request.measure, self.request.levels
        there = tuple(result.step.level.name for result in made.results if result.status != "failed")
        if request is None or levels is None or not there:
            return None
        return evaluate_levels(replace(request, levels=there), levels, frozen, self.session)

    def advise_type(self, model: Model) -> None:
        """A matrix is about to be computed: say so when another type of the same model would take much less time."""
        on_gpu = bool(self.session.engine.devices) and self.request.imatrix.options.n_gpu_layers != "0"
        bindings = self.choice.bindings
        if bindings is not None and not on_gpu and model.main_type in ("F16", "F32") and likes_bf16(bindings.features):
            self.session.sink(
                info(
                    f"The model is {model.main_type}; this processor computes BF16 about 1.4x faster than F16. "
                    "If the original was published in BF16, a BF16 file of it is as exact and quicker."
                )
            )


def refuse_hopeless(plan: Plan, *, one_by_one: bool = False) -> None:
    """Refuse to start what the disk cannot hold, or where not one level can be made. ``one_by_one``: as many as fit."""
    if plan.new_bytes > plan.free_bytes and not one_by_one:
        raise NoSpaceError(
            f"The {len(plan.todo)} levels do not fit on the disk" if plan.todo else "The imatrix does not fit on the disk",
            f"{human_bytes(plan.new_bytes)} needed, {human_bytes(plan.free_bytes)} free at {existing_parent(plan.workspace)}",
            "Free some space, ask for fewer --levels, make what fits with --one-by-one, or choose another --work-dir.",
        )
    if plan.levels and len(plan.failing) == len(plan.levels):
        first = plan.failing[0]
        many = len(plan.levels) > 1
        raise InvalidDataError(
            f"None of the {len(plan.levels)} levels can be made" if many else f"{first.level.name} cannot be made",
            f"{first.level.name}: {first.reason}" if many else first.reason,
            first.remedy or "See every reason with --dry-run, or choose other levels.",
        )


def make_levels(plan: Plan, planner: LevelPlanner, matrix: MatrixFile | None, session: Session) -> MadeLevels:
    """Make what is to do; results come in the order of the request."""
    results = {step.level.name: skipped(step) for step in plan.levels if step.state == "up-to-date"}
    results.update({step.level.name: refused(step) for step in plan.failing})
    _tell_changes(plan.todo, session.sink)
    passes: tuple[PassFigures, ...] = ()
    if plan.todo:
        maker = LevelMaker(planner.request, planner.frozen, session, matrix, planner.weights(matrix), session.sink)
        made = maker.run(plan.todo)
        passes = made.passes
        results.update({result.step.level.name: result for result in made.results})
    else:
        shutil.rmtree(session.workspace.partial, ignore_errors=True)  # of a run that was killed at its very end
    return MadeLevels(tuple(results[step.level.name] for step in plan.levels), passes)


def _tell_changes(steps: tuple[LevelStep, ...], sink: Sink) -> None:
    """Name what changed since levels were made, once per reason."""
    for reason in dict.fromkeys(step.reason for step in steps if step.reason.startswith("changed: ")):
        names = [step.level.name for step in steps if step.reason == reason]
        sink(info(f"{', '.join(names)} made again, {reason}"))


def choose_levels(request: LevelsRequest, types: Sequence[QuantType], sink: Sink) -> tuple[Level, ...]:
    """The levels of a request, each once. A preset's levels that this llama.cpp does not offer are left out, and said."""
    if request.preset:
        levels, missing = preset_levels(request.preset, types)
        if missing:
            sink(warning(f"This llama.cpp does not offer {', '.join(missing)}; the preset goes on without."))
        named = resolve_levels(request.names, types) if request.names else ()
        return tuple({level.name: level for level in (*levels, *named)}.values())
    names = request.names or tuple(name for name in DEFAULT_LEVELS if name in offered(types))
    return resolve_levels(names, types)
