"""``evaluate``, also the last step of ``run --evaluate``: measures every level against its source, and against baselines."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.app.report import ReportFiles, make_report, remember_speed, remember_target
from imatrix_runner.context.context import Context, Session, held, settle
from imatrix_runner.context.engine_choice import EngineNeeds
from imatrix_runner.context.open_model import Frozen, announce, freeze, open_source
from imatrix_runner.context.ownership import find_workspace
from imatrix_runner.context.requests import EvaluateRequest, LevelsRequest, MeasureRequest
from imatrix_runner.engines.levels import offered
from imatrix_runner.engines.measures import Divergence
from imatrix_runner.errors import RunnerError, UsageError
from imatrix_runner.evaluate.ab_levels import Baselines
from imatrix_runner.evaluate.ab_verdict import Comparison, compare
from imatrix_runner.evaluate.answer_agreement import DomainResult
from imatrix_runner.evaluate.compare_mixes import compare_mixes
from imatrix_runner.evaluate.disk_budget import waves
from imatrix_runner.evaluate.held_out import HeldOut, check_text, choose_held_out
from imatrix_runner.evaluate.kld_statistics import summarise
from imatrix_runner.evaluate.measure import Measurer, Subject
from imatrix_runner.evaluate.measure_speed import TimedFile, fewest_layers, measure_speeds, speed_meter
from imatrix_runner.evaluate.measurements import (
    SPEED_OF_SOURCE,
    Alone,
    comparisons,
    content_of,
    levels_made,
    measured,
    scored_on_tasks,
)
from imatrix_runner.evaluate.mix_verdict import MixVerdict
from imatrix_runner.evaluate.prompt_answers import DomainRequest, answer_levels, check_answerable, check_prompts
from imatrix_runner.evaluate.recommendations import Measure, Pick, target
from imatrix_runner.evaluate.speed_figures import MeasuredSpeed, fast_enough
from imatrix_runner.evaluate.tasks.measure_tasks import TasksRequest, check_tasks, score_levels
from imatrix_runner.evaluate.tasks.task_verdict import TaskScores
from imatrix_runner.events import warning
from imatrix_runner.files import free_bytes
from imatrix_runner.imatrix.ineffective_collection import warn_of_placement
from imatrix_runner.journal import Journal, StepRecord, differences
from imatrix_runner.mixes.mix_facts import levels_of_targets
from imatrix_runner.models.model import parse_source
from imatrix_runner.quantize.level_facts import facts_of_level
from imatrix_runner.quantize.level_files import finish_renames
from imatrix_runner.quantize.plan import LevelStep
from imatrix_runner.quantize.plan_notes import same_tensors
from imatrix_runner.steps import LEVEL_INPUT, MODEL_INPUT, step_id
from imatrix_runner.workspace import Workspace


@dataclass(frozen=True)
class MeasurePlan:
    """What will be measured. ``baselines``: those to make and measure, by level; ``compared``: levels whose comparison with
    their baseline is known; ``alone``: levels without a baseline, and why; ``same``: levels that get the figures of another
    one, because their files hold the same tensors."""

    held_out: HeldOut
    subjects: tuple[Subject, ...]
    baselines: Mapping[str, tuple[LevelStep, Subject]]
    compared: tuple[str, ...]
    alone: Mapping[str, str]
    free_bytes: int
    same: Mapping[str, str] = field(default_factory=dict)

    @property
    def todo(self) -> tuple[Subject, ...]:
        return tuple(subject for subject in self.subjects if subject.todo and subject.name not in self.same)


@dataclass(frozen=True)
class EvaluateResult:
    """``measured`` and ``failed`` by level (a baseline by its subject's name); a dry run has neither. ``mixes``: all mixes
    compared with stock levels on this text; ``speeds``: of levels and of the source; ``fast``: the level that ``--min-speed``
    picks."""

    workspace: Workspace
    plan: MeasurePlan
    measured: Mapping[str, Divergence] = field(default_factory=dict)
    failed: Mapping[str, RunnerError] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    domain: tuple[DomainResult, ...] = ()
    tasks: tuple[TaskScores, ...] = ()
    target: Pick | None = None
    mixes: tuple[MixVerdict, ...] = ()
    speeds: Mapping[str, MeasuredSpeed] = field(default_factory=dict)
    fast: Pick | None = None
    report: ReportFiles | None = None
    seconds: float = 0.0


OnPlan = Callable[[MeasurePlan], None]


def evaluate(
    request: EvaluateRequest, context: Context, *, dry_run: bool = False, on_plan: OnPlan | None = None
) -> EvaluateResult:
    """Measure the levels of a workspace. Raises :class:`RunnerError` for errors that concern all of them."""
    for text in request.warnings:
        context.sink(warning(text))
    needs = EngineNeeds((), (), request.measure.options.n_gpu_layers)
    machine, choice = settle(request.environment, needs, context.sink)
    source = parse_source(request.source.model)
    workspace = find_workspace(source, request.source.model, request.environment.work_dir, context.sink, context.stop)
    if not workspace.journal.is_file():
        raise UsageError(
            f"There is nothing to measure in {workspace.root}",
            "no level of this model was made there",
            f"Make some first: imatrix-runner run {shlex.quote(request.source.model)}",
        )
    cluster = None if dry_run else request.environment.cluster
    with (
        held(workspace, request.environment, context, dry_run=dry_run) as runner,
        choice.opened(runner, cluster, context.sink) as engine,
    ):
        journal = Journal(workspace.journal)
        if not dry_run:
            finish_renames(journal, workspace)
        session = Session(workspace, journal, machine, engine, runner, context.sink, dry_run, choice.make_additional(runner))
        model = open_source(source, request.source, session, allow_requantize=True)
        announce(model, session.sink)
        warn_of_placement(request.measure.options, model, session, choice.no_gpu())

        def begin(plan: MeasurePlan) -> None:
            if not dry_run:  # from now on `status` shows the command that continues
                journal.remember(measuring=request.environment.command)
            if on_plan is not None:
                on_plan(plan)

        result = evaluate_levels(request.measure, request.making, freeze(model, session), session, on_plan=begin)
        if not dry_run:
            result = replace(result, report=make_report(workspace, journal, runner, session.sink, strict=False))
            journal.remember(measuring="")
        return result


def evaluate_levels(
    request: MeasureRequest,
    making: LevelsRequest,
    frozen: Frozen,
    session: Session,
    *,
    on_plan: OnPlan | None = None,
) -> EvaluateResult:
    """Measure levels of an open workspace. A dry run ends with the plan."""
    began = time.monotonic()
    job = _Evaluation(request, frozen, session, Baselines(making, frozen, session))
    plan = job.plan()
    if on_plan is not None:
        on_plan(plan)
    if session.dry_run:
        return EvaluateResult(session.workspace, plan)
    return job.run(plan, began)


def check_request(request: MeasureRequest, calibration: Path | None, session: Session) -> None:
    """Check what can be checked of a measurement before there is anything to measure. ``calibration``: the text that the
    imatrix will be collected from, if known. Raises :class:`InvalidDataError`, :class:`UsageError`."""
    check_text(request, calibration, session.sink)
    if request.speed is not None:
        speed_meter(session)
    if (domain := domain_of(request)) is not None:
        check_answerable(domain, session)
    if (tasks := tasks_of(request)) is not None:
        check_tasks(tasks, session)


def tasks_of(request: MeasureRequest) -> TasksRequest | None:
    """Return what ``--tasks`` requests; None without it."""
    if not request.tasks:
        return None
    return TasksRequest(request.tasks, request.task_limit, request.allow_code, request.options, request.again)


def domain_of(request: MeasureRequest) -> DomainRequest | None:
    """Return what ``--domain`` requests; None without it."""
    if request.domain is None:
        return None
    return DomainRequest(request.domain, request.n_predict, request.options, request.chat_template, request.again)


@dataclass(frozen=True)
class _Evaluation:
    request: MeasureRequest
    frozen: Frozen
    session: Session
    baselines: Baselines

    def plan(self) -> MeasurePlan:
        session = self.session
        made = self._levels()
        if (domain := domain_of(self.request)) is not None:
            check_prompts(domain, self.frozen.model, session)
        if self.request.speed is not None:
            speed_meter(session)
        if (tasks := tasks_of(self.request)) is not None:
            check_tasks(tasks, session)
        same = same_tensors({name: (record.inputs, facts_of_level(record)) for name, record in made.items()})
        distinct = {name: record for name, record in made.items() if name not in same}
        steps, alone = self.baselines.plan(distinct) if self.request.baselines else ((), {})
        sizes = [step.facts.n_bytes or 0 for step in steps]
        held_out = choose_held_out(self.request, self.frozen, len(distinct), sizes, session)
        subjects = tuple(self._subject(name, record, held_out) for name, record in made.items())
        pairs = {step.level.name: (step, self.baselines.subject(step)) for step in steps}
        wanted = {name: pair for name, pair in pairs.items() if self._compare_again(name, made[name], held_out, pair[1])}
        compared = tuple(name for name in pairs if name not in wanted)
        return MeasurePlan(held_out, subjects, wanted, compared, alone, free_bytes(session.workspace.root), same)

    def run(self, plan: MeasurePlan, began: float) -> EvaluateResult:
        session = self.session
        measurer = Measurer(plan.held_out, self.frozen, session, session.sink)
        found: dict[str, Divergence] = {}
        failed: dict[str, RunnerError] = {}
        if self.request.again:
            measurer.forget([*plan.subjects, *(baseline for _, baseline in plan.baselines.values())])
        if plan.held_out.base is not None and (plan.todo or plan.baselines):
            measurer.check_given()
        _sort(measurer.measure(plan.todo), found, failed)
        everything = {**self._known(plan), **found}
        for subject in plan.subjects:
            if subject.todo and (of := plan.same.get(subject.name)) is not None:
                if of in everything:
                    measurer.repeat(subject, of)
                    everything[subject.name] = everything[of]
                else:
                    failed[subject.name] = failed[of]
        self._record_alone(plan)
        pairs = self._compare(plan, measurer, everything, failed)
        mixes = compare_mixes(measurer, session)
        measurer.tidy()
        self.baselines.tidy()
        answers = self._answers(plan, failed)
        speeds = self._speeds(plan, failed)
        tasks = self._tasks(plan, failed)
        return EvaluateResult(
            session.workspace,
            plan,
            everything,
            failed,
            pairs,
            answers,
            tasks,
            self._target(everything),
            mixes,
            speeds,
            self._fast(everything, speeds, plan),
            seconds=time.monotonic() - began,
        )

    def _levels(self) -> dict[str, StepRecord]:
        """The finished levels that were requested, in that order; without a request all of them, from the largest."""
        session = self.session
        journal, root, source = session.journal, session.workspace.root, shlex.quote(self.frozen.model.source.location)
        there = {
            name: record
            for name, record in levels_made(journal).items()
            if journal.still_there(step_id("level", name), save=not session.dry_run)
        }
        there = self._of_this_source(there, source)
        if not self.request.levels:
            if not there:
                raise UsageError(
                    f"There is nothing to measure in {root}",
                    "no level was made there, or their files are gone",
                    f"Make some first: imatrix-runner run {source}",
                )
            return dict(sorted(there.items(), key=lambda each: (-_size(each[1]), each[0])))
        known = {name.upper(): name for name in there}
        chosen = levels_of_targets(session.journal)
        known |= {target.upper(): facts.level for target, facts in chosen.items() if facts.level in there}
        known |= {alias: known[level.name] for alias, level in offered(session.types).items() if level.name in known}
        missing = [name for name in self.request.levels if name.upper() not in known]
        if missing:
            raise UsageError(
                f"{', '.join(missing)} cannot be measured",
                f"{root} has no such finished level, only: {', '.join(there) or 'none'}",
                f"Make it first: imatrix-runner run {source} --levels {','.join(missing)}",
            )
        return {known[name.upper()]: there[known[name.upper()]] for name in self.request.levels}

    def _record_alone(self, plan: MeasurePlan) -> None:
        """Record, for reports, why levels have no baseline."""
        levels = {subject.name: subject for subject in plan.subjects}
        for name, why in plan.alone.items():
            record = StepRecord.now(levels[name].inputs, [], "asked for", 0.0, facts=Alone(why))
            self.session.journal.record(step_id("alone", name), record)

    def _of_this_source(self, there: Mapping[str, StepRecord], source: str) -> dict[str, StepRecord]:
        """The levels that were made from the model that they are measured against; a warning names the others.

        Raises :class:`UsageError` if others were requested, or if there are only others: their figures would include the
        difference between the two sources.
        """
        mine = {name: record for name, record in there.items() if record.inputs.get(MODEL_INPUT) == self.frozen.fingerprint}
        others = [name for name in there if name not in mine]
        asked = {name.upper() for name in self.request.levels}
        wanted = [name for name in others if name.upper() in asked] if asked or mine else others
        if wanted:
            raise UsageError(
                f"{', '.join(wanted)} cannot be measured against this {self.frozen.model.name}",
                "made from another file or an earlier version of this one; the figures would include that difference",
                f"Make them again: imatrix-runner run {source} --levels {','.join(wanted)}",
            )
        if others and not asked:
            self.session.sink(warning(f"Not measured, because they were made from another source: {', '.join(others)}."))
        return mine

    def _subject(self, name: str, record: StepRecord, held_out: HeldOut) -> Subject:
        inputs = {LEVEL_INPUT: content_of(record)}
        whole = {**held_out.whole_inputs, **inputs}
        before = self.session.journal.get(step_id("evaluate", name))
        reason = "not measured yet"
        if before is not None:
            changed = differences(before, whole)
            reason = f"changed: {', '.join(changed)}" if changed else ("asked for" if self.request.again else "")
        file = self.session.workspace.root / record.output.name
        return Subject(name, step_id("evaluate", name), file, inputs, reason)

    def _known(self, plan: MeasurePlan) -> dict[str, Divergence]:
        """The figures of the levels that need no new measurement."""
        there = measured(self.session.journal)
        return {subject.name: there[subject.name].divergence for subject in plan.subjects if not subject.todo}

    def _compare_again(self, name: str, made: StepRecord, held_out: HeldOut, baseline: Subject) -> bool:
        before = self.session.journal.get(step_id("compare", name))
        return self.request.again or before is None or bool(differences(before, _pair_inputs(made, held_out, baseline)))

    def _compare(
        self, plan: MeasurePlan, measurer: Measurer, known: Mapping[str, Divergence], failed: dict[str, RunnerError]
    ) -> tuple[Comparison, ...]:
        """Make baselines, as many at a time as fit on the disk, measure them, and compare each with its level."""
        if not self.request.baselines:
            return ()
        todo = {name: pair for name, pair in plan.baselines.items() if name in known}
        unmade = {name: step.facts.n_bytes or 0 for name, (step, baseline) in todo.items() if not measurer.knows(baseline)}
        compared = {*plan.compared}
        for wave in ([name for name in todo if name not in unmade], *waves(unmade, plan.held_out.fit.room)):
            steps = [todo[name][0] for name in wave if name in unmade]
            spoiled = self.baselines.make(steps)
            failed.update({todo[name][1].name: error for name, error in spoiled.items()})
            found: dict[str, Divergence] = {}
            _sort(measurer.measure([todo[name][1] for name in wave if name not in spoiled]), found, failed)
            for name in wave:
                baseline = todo[name][1]
                if baseline.name in found:
                    self._record_pair(plan, measurer, name, known[name], found[baseline.name], baseline)
                    compared.add(name)
            self.baselines.remove(steps)
        there = comparisons(self.session.journal)
        return tuple(there[subject.name] for subject in plan.subjects if subject.name in compared)

    def _answers(self, plan: MeasurePlan, failed: dict[str, RunnerError]) -> tuple[DomainResult, ...]:
        """How source and levels answer the ``--domain`` prompts; levels whose measurement failed are left out."""
        domain = domain_of(self.request)
        if domain is None:
            return ()
        asked = [each for each in plan.subjects if each.name not in failed and each.name not in plan.same]
        levels = [(each.name, each.file, each.inputs[LEVEL_INPUT]) for each in asked]
        found = answer_levels(domain, self.frozen, levels, self.session, self.session.workspace.evaluation)
        failed.update({name: outcome for name, outcome in found.items() if isinstance(outcome, RunnerError)})
        return tuple(outcome for outcome in found.values() if isinstance(outcome, DomainResult))

    def _speeds(self, plan: MeasurePlan, failed: dict[str, RunnerError]) -> dict[str, MeasuredSpeed]:
        """How fast the source and the levels run, with ``--speed``."""
        request = self.request
        if request.speed is None:
            return {}
        asked = [_timed(each) for each in plan.subjects if each.name not in failed and each.name not in plan.same]
        found = measure_speeds(request.speed, request.options, self.frozen, asked, self.session, again=request.again)
        failed.update({name: outcome for name, outcome in found.items() if isinstance(outcome, RunnerError)})
        return {name: outcome for name, outcome in found.items() if isinstance(outcome, MeasuredSpeed)}

    def _fast(self, known: Mapping[str, Divergence], speeds: Mapping[str, MeasuredSpeed], plan: MeasurePlan) -> Pick | None:
        """The measured level that meets ``--min-speed``, with the least ``-ngl`` where there are GPUs; a warning if there is
        none."""
        request = self.request
        least = request.speed.least if request.speed is not None else None
        layers = ""
        if request.speed is None or least is None:
            remember_speed(self.session.journal, None)
            return None
        points = self._points(known)
        pick = fast_enough(points, speeds, least)
        n_layers = self.frozen.model.header.integer(f"{self.frozen.model.architecture}.block_count")
        if self.session.engine.devices and n_layers is not None:
            for point in sorted(points, key=lambda each: (each.kld, each.n_bytes)):
                level = next(_timed(each) for each in plan.subjects if each.name == point.level)
                fewest = fewest_layers(request.speed, request.options, level, n_layers, least, self.session)
                if fewest is not None:
                    layers = str(fewest)
                    rule = f"the closest to the source that generates {least:g} tokens/s, with -ngl {layers}"
                    pick = Pick("speed", point.level, rule)
                    break
        remember_speed(self.session.journal, least, pick if layers else None)
        if pick is None:
            found = {name: each for name, each in speeds.items() if name != SPEED_OF_SOURCE}
            best = max(found, key=lambda name: found[name].generation.mean, default=None)
            fastest = f"; the fastest is {best} with {found[best].generation.mean:.1f}" if best is not None else ""
            self.session.sink(warning(f"No measured level generates {least:g} tokens/s here{fastest}."))
        return pick

    def _tasks(self, plan: MeasurePlan, failed: dict[str, RunnerError]) -> tuple[TaskScores, ...]:
        """The scores of levels on ``--tasks``; levels whose measurement failed are left out."""
        request = tasks_of(self.request)
        if request is None:
            return ()
        asked = [each for each in plan.subjects if each.name not in failed and each.name not in plan.same]
        levels = [(each.name, each.file, each.inputs[LEVEL_INPUT]) for each in asked]
        folder = self.session.workspace.evaluation / "tasks"
        found = score_levels(request, self.frozen, levels, scored_on_tasks(self.session.journal), self.session, folder)
        failed.update(found.failed)
        failed.update({name: outcome for name, outcome in found.levels.items() if isinstance(outcome, RunnerError)})
        return tuple(outcome for outcome in found.levels.values() if isinstance(outcome, TaskScores))

    def _record_pair(
        self, plan: MeasurePlan, measurer: Measurer, name: str, made: Divergence, without: Divergence, baseline: Subject
    ) -> None:
        level = next(subject for subject in plan.subjects if subject.name == name)
        tokens = measurer.scored(level)[: made.n_tokens], measurer.scored(baseline)[: without.n_tokens]
        paired = (len(tokens[0]), len(tokens[1])) == (made.n_tokens, without.n_tokens)
        if paired and made.n_tokens != without.n_tokens:  # --until-precise: the tokens that both have are compared
            shared = min(made.n_tokens, without.n_tokens)
            tokens = tokens[0][:shared], tokens[1][:shared]
            made, without = map(summarise, tokens)
        pair = compare(name, made, without, tokens if paired else None)
        inputs = _pair_inputs(levels_made(self.session.journal)[name], plan.held_out, baseline)
        record = StepRecord.now(inputs, [], "asked for", 0.0, facts=pair)
        self.session.journal.record(step_id("compare", name), record)

    def _target(self, known: Mapping[str, Divergence]) -> Pick | None:
        """The measured level that meets ``--target-kld`` and ``--target-size``; a warning if there is none."""
        request = self.request
        remember_target(self.session.journal, request.target_kld, request.target_size)  # None, too, replaces an old target
        if request.target_kld is None and request.target_size is None:
            return None
        points = self._points(known)
        pick = target(points, request.target_kld, request.target_size)
        if pick is None:
            best = min(points, key=lambda each: each.kld, default=None)
            closest = f"; the closest to the source is {best.level} with {best.kld:.4g}" if best is not None else ""
            self.session.sink(warning(f"No measured level meets the target{closest}."))
        return pick

    def _points(self, known: Mapping[str, Divergence]) -> list[Measure]:
        """The measured levels as points; those that hold the same tensors as another are one."""
        made = levels_made(self.session.journal)
        return [
            Measure.of(name, size, found, eligible=facts_of_level(made[name]).gains(size, self.frozen.model.n_bytes))
            for name, found in known.items()
            for size in [_size(made[name])]
        ]


def _pair_inputs(made: StepRecord, held_out: HeldOut, baseline: Subject) -> dict[str, str]:
    return {**held_out.whole_inputs, LEVEL_INPUT: content_of(made), "twin": baseline.inputs[LEVEL_INPUT]}


def _timed(subject: Subject) -> TimedFile:
    return TimedFile(subject.name, subject.file, subject.inputs[LEVEL_INPUT])


def _size(made: StepRecord) -> int:
    return sum(output.stamp.size for output in made.outputs)


def _sort(
    found: Mapping[str, Divergence | RunnerError], measured: dict[str, Divergence], failed: dict[str, RunnerError]
) -> None:
    for name, outcome in found.items():
        if isinstance(outcome, Divergence):
            measured[name] = outcome
        else:
            failed[name] = outcome
