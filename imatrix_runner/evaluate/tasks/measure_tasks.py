"""``--tasks``: source and levels compute the same requests, and each level's scores are compared with the source's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.engines.abilities import TaskAnswerer
from imatrix_runner.engines.files.task_outcomes import read_outcomes
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.task_jobs import TaskJob, TaskOutcome, TaskRequest
from imatrix_runner.errors import EngineError, InterruptedRunError, InvalidDataError, NoSpaceError, RunnerError, UsageError
from imatrix_runner.evaluate.measure import once
from imatrix_runner.evaluate.tasks.harness import Harness, problem_error
from imatrix_runner.evaluate.tasks.harness_messages import MetricScores, PreparedTasks, SubjectScores
from imatrix_runner.evaluate.tasks.task_names import TaskChoice, leaves_code_out, parse_tasks
from imatrix_runner.evaluate.tasks.task_verdict import TaskComparison, TaskItems, TaskScores, compare_scores
from imatrix_runner.events import Finished, Progress, Started, info, warning
from imatrix_runner.extras import TASKS
from imatrix_runner.files import atomic_writer, encode_json, sha256
from imatrix_runner.fingerprints import counted_apart, fingerprint_of, harmless, spelt
from imatrix_runner.journal import StepRecord, differences
from imatrix_runner.steps import LEVEL_INPUT, MODEL_INPUT, step_id

_SOURCE = "source"
_MOST_PARTS = 8
"""Most parts of a group that are shown one by one."""


@dataclass(frozen=True)
class TasksRequest:
    """``names``: tasks, groups, YAML files, ``mini``; ``limit``: the first items of each task (None: all). ``allow_code``:
    programs that models write may be run. ``again``: levels are scored anew, whatever is known."""

    names: tuple[str, ...] = field(metadata=spelt("--tasks", always=True))
    limit: int | None = field(default=None, metadata=spelt("--limit"))
    allow_code: bool = field(default=False, metadata=spelt("--allow-code-execution"))
    options: CollectOptions = field(default_factory=CollectOptions, metadata=counted_apart("the words after the tasks"))
    again: bool = field(default=False, metadata=harmless("the same outcomes come again"))


@dataclass(frozen=True)
class TaskResults:
    """``levels``: scores of each level, or why it has none; ``failed``: by task, why it could not be used."""

    levels: Mapping[str, TaskScores | RunnerError]
    failed: Mapping[str, RunnerError]


def check_tasks(request: TasksRequest, session: Session) -> TaskAnswerer:
    """What computes the tasks, or why there can be none: known before anything else is measured."""
    engine = session.engine
    if engine.task_answerer is None:
        raise UsageError(
            "Tasks can only be computed by the embedded engine",
            f"this is the {engine.name} engine, and llama.cpp's programs do not tell how likely a text is",
            "Leave --engine out, or --tasks.",
        )
    TASKS.require("Computing tasks")
    parse_tasks(request.names, allow_code=request.allow_code)
    return engine.task_answerer


def score_levels(
    request: TasksRequest,
    frozen: Frozen,
    levels: Sequence[tuple[str, Path, str]],
    known: Mapping[str, TaskScores],
    session: Session,
    folder: Path,
) -> TaskResults:
    """The scores of levels (name, first file, content ``sha256:…``) next to their source's; ``known``: those in the journal.

    Requests, outcomes and scores lie in ``folder``. Raises what keeps all tasks or the source from being computed.
    """
    answerer = check_tasks(request, session)
    folder.mkdir(parents=True, exist_ok=True)
    return _TaskMeasurement(request, frozen, session, answerer, folder).run(levels, known)


@dataclass(frozen=True)
class _TaskMeasurement:
    request: TasksRequest
    frozen: Frozen
    session: Session
    answerer: TaskAnswerer
    folder: Path

    def run(self, levels: Sequence[tuple[str, Path, str]], known: Mapping[str, TaskScores]) -> TaskResults:
        prepared, failed = self._prepared
        inputs = self._inputs(prepared)
        reasons = {name: self._reason(name, {**inputs, LEVEL_INPUT: content}) for name, _, content in levels}
        found: dict[str, TaskScores | RunnerError] = {
            name: known[name] for name, reason in reasons.items() if not reason and name in known
        }
        todo = [level for level in levels if level[0] not in found]
        if todo:
            self._score(todo, prepared, inputs, reasons, found, failed)
        return TaskResults({name: found[name] for name, _, _ in levels}, failed)

    @cached_property
    def _choices(self) -> list[TaskChoice]:
        return parse_tasks(self.request.names, allow_code=self.request.allow_code)

    @cached_property
    def _harness(self) -> Harness:
        return Harness(self.session.runner, self.folder, self.session.log("tasks"))

    @cached_property
    def _prepared(self) -> tuple[PreparedTasks, dict[str, RunnerError]]:
        """The tasks that can be used, and why others cannot. Raises the first reason where none can."""
        request, sink = self.request, self.session.sink
        if leaves_code_out(request.names, allow_code=request.allow_code):
            sink(info("The code part of mini is left out: it runs programs that the models write (--allow-code-execution)."))
        sink(Started("prepare tasks", "loading the tasks"))
        specs = [spec for choice in self._choices for spec in choice.specs]
        prepared = self._harness.prepare(specs, request.limit, allow_code=request.allow_code)
        labels = {spec: choice.label for choice in self._choices for spec in choice.specs}
        failed = {f"task {labels[each.spec]}": problem_error(each, labels[each.spec]) for each in prepared.problems}
        if not prepared.tasks:
            sink(Finished("prepare tasks", "failed"))
            raise next(iter(failed.values()))
        n_items = sum(each.n_items for each in prepared.tasks)
        sink(Finished("prepare tasks", "done", f"{n_items} items, {sum(each.n_requests for each in prepared.tasks)} requests"))
        for error in failed.values():
            sink(warning(error.sentence()))
        if request.allow_code:
            sink(info("Programs that the models write are run in a sandbox, without network and files of this machine."))
        return prepared, failed

    def _inputs(self, prepared: PreparedTasks) -> dict[str, str]:
        request = self.request
        options = " ".join(filter(None, (fingerprint_of(request, "answers"), fingerprint_of(request.options, "answers"))))
        return {
            MODEL_INPUT: self.frozen.fingerprint,
            "tasks": f"sha256:{prepared.digest}",
            "requests": f"sha256:{sha256(self._harness.requests)}",
            "options": options,
            "engine": self.session.engine.arithmetic(),
            "harness": prepared.version,
        }

    def _reason(self, name: str, inputs: Mapping[str, str]) -> str:
        before = self.session.journal.get(step_id("tasks", name))
        if before is None:
            return "not computed yet"
        changed = differences(before, inputs)
        return f"changed: {', '.join(changed)}" if changed else ("asked for" if self.request.again else "")

    def _score(
        self,
        todo: Sequence[tuple[str, Path, str]],
        prepared: PreparedTasks,
        inputs: Mapping[str, str],
        reasons: Mapping[str, str],
        found: dict[str, TaskScores | RunnerError],
        failed: dict[str, RunnerError],
    ) -> None:
        source = self._complete(_SOURCE, self.frozen.model.path, self.frozen.fingerprint, inputs)
        self.frozen.check_unchanged()
        outcomes = {_SOURCE: source}
        seconds: dict[str, float] = {}
        said: set[str] = set()
        for name, file, content in todo:
            began = time.monotonic()
            try:
                outcomes[name] = self._complete(name, file, content, inputs)
            except (InterruptedRunError, NoSpaceError):
                raise
            except RunnerError as error:
                self.session.sink(Finished(step_id("tasks", name), "failed", once(error.why, said)))
                found[name] = error
            seconds[name] = time.monotonic() - began
        if len(outcomes) == 1:
            return
        scores = self._scores(outcomes)
        silent = self._silent(prepared, source)
        failed.update(silent)
        for name, _, content in todo:
            if name not in outcomes:
                continue
            rows = self._compared(prepared, scores, outcomes, name, {each.removeprefix("task ") for each in silent})
            result = TaskScores(name, tuple(rows), self.request.allow_code, self.request.limit, prepared.version)
            found[name] = result
            whole, reason = {**inputs, LEVEL_INPUT: content}, reasons[name] or "not computed yet"
            record = StepRecord.now(whole, [], reason, seconds[name], commands=[self._command()], facts=result)
            self.session.journal.record(step_id("tasks", name), record)

    def _complete(self, name: str, model: Path, content: str, inputs: Mapping[str, str]) -> list[TaskOutcome]:
        """The outcomes of all requests, from where they lie already or the engine."""
        session, step, requests = self.session, step_id("tasks", name), self._harness.requests
        out, began = self.folder / f"{name}.outcomes", time.monotonic()
        kept = ("requests", "engine")
        options = fingerprint_of(self.request.options, "answers")
        fingerprint = encode_json({**{each: inputs[each] for each in kept}, "model": content, "options": options}).decode()
        if self.request.again:
            out.unlink(missing_ok=True)
        n_requests = sum(each.n_requests for each in self._prepared[0].tasks)
        session.sink(Started(step, f"{name} computes the tasks", n_requests, "requests"))
        outcomes = read_outcomes(out, fingerprint)
        if len(outcomes) < n_requests:
            log = session.log(step.replace(" ", "-"))
            job = TaskJob(step, model, requests, out, self.request.options, fingerprint, log)
            self.answerer.answer_tasks(job, session.sink)
            outcomes = read_outcomes(out, fingerprint)
        if len(outcomes) != n_requests:
            raise EngineError("The worker ended early", f"{out.name} is not complete", "Run the same command again.")
        session.sink(Finished(step, "done", "", time.monotonic() - began))
        return [outcomes[number] for number in range(n_requests)]

    def _scores(self, outcomes: Mapping[str, Sequence[TaskOutcome]]) -> dict[str, SubjectScores]:
        files = {}
        for name, mine in outcomes.items():
            files[name] = self.folder / f"{name}.outcomes.json"
            with atomic_writer(files[name]) as handle:
                handle.write(msgspec.json.encode(list(mine)))
        sink = self.session.sink
        sink(Started("score tasks", "scoring", None, "tasks"))
        specs = list(dict.fromkeys(loaded.spec for loaded in self._prepared[0].tasks))
        scored = self._harness.score(
            specs,
            self.request.limit,
            files,
            lambda done, total: sink(Progress("score tasks", done, total)),
            allow_code=self.request.allow_code,
        )
        sink(Finished("score tasks", "done"))
        for file in files.values():
            file.unlink(missing_ok=True)
        return {each.label: each for each in scored.subjects}

    @cached_property
    def _asked(self) -> list[TaskRequest]:
        return [msgspec.json.decode(line, type=TaskRequest) for line in self._harness.requests.read_bytes().splitlines()]

    def _silent(self, prepared: PreparedTasks, source: Sequence[TaskOutcome]) -> dict[str, RunnerError]:
        """The choices in which the source wrote nothing at all: a level that does so would be as good."""
        found: dict[str, RunnerError] = {}
        for choice in self._choices:
            places = [number for number in _places(prepared, choice.specs) if self._asked[number].kind == "generate"]
            if places and all(not source[number].text.strip() for number in places):
                found[f"task {choice.label}"] = InvalidDataError(
                    f"The task {choice.label} says nothing about levels of {self.frozen.model.name}",
                    f"the source answers none of its {len(places)} questions: every answer is empty",
                    "Choose a task for this kind of model: base models continue texts, and do not follow instructions.",
                )
        return found

    def _compared(
        self,
        prepared: PreparedTasks,
        scores: Mapping[str, SubjectScores],
        outcomes: Mapping[str, Sequence[TaskOutcome]],
        level: str,
        silent: set[str],
    ) -> list[TaskComparison]:
        rows: list[TaskComparison] = []
        for choice in self._choices:
            if choice.label in silent:
                continue
            mine = [each for each in scores[_SOURCE].scores if each.spec in choice.specs]
            theirs = [each for each in scores[level].scores if each.spec in choice.specs]
            remark = self._remark(_places(prepared, choice.specs), outcomes[_SOURCE], outcomes[level])
            rows += compare_choice(choice.label, mine, theirs, remark)
        return rows

    def _remark(self, places: Sequence[int], source: Sequence[TaskOutcome], level: Sequence[TaskOutcome]) -> str:
        """What else must be known of a choice's figures: empty answers, prompts that were cut."""
        written = [number for number in places if self._asked[number].kind == "generate"]
        said = []
        for name, outcomes in (("the source", source), ("the level", level)):
            if empty := sum(not outcomes[number].text.strip() for number in written):
                said.append(f"{name} answered nothing to {empty} of {len(written)}")
        if cut := sum(level[number].dropped > 0 for number in places):
            said.append(f"{cut} of {len(places)} prompts were cut on the left: they are longer than the model's context")
        return "; ".join(said)

    def _command(self) -> list[str]:
        request = self.request
        words = ["imatrix-runner", "evaluate", self.frozen.model.source.location, "--tasks", ",".join(request.names)]
        words += ["--limit", str(request.limit)] if request.limit is not None else []
        return [*words, *(["--allow-code-execution"] if request.allow_code else [])]


def _places(prepared: PreparedTasks, specs: Sequence[str]) -> list[int]:
    """The numbers of the requests that ``specs`` led to."""
    found: list[int] = []
    begin = 0
    for each in prepared.tasks:
        if each.spec in specs:
            found += range(begin, begin + each.n_requests)
        begin += each.n_requests
    return found


def compare_choice(
    label: str, source: Sequence[MetricScores], level: Sequence[MetricScores], remark: str
) -> list[TaskComparison]:
    """The comparisons of a task, or of all tasks of a group together and, if they are few, one by one. Pure."""
    tasks = list(dict.fromkeys(each.task for each in source))
    pairs = [(mine, theirs) for mine in source for theirs in level if (mine.task, mine.metric) == (theirs.task, theirs.metric)]
    metrics = dict.fromkeys(mine.metric for mine, _ in pairs)
    rows: list[TaskComparison] = []
    for metric in metrics:
        of_metric = [(mine, theirs) for mine, theirs in pairs if mine.metric == metric]
        if len(of_metric) == len(tasks) > 1:
            rows.append(compare_scores(_items(label, of_metric), remark))
            if len(tasks) <= _MOST_PARTS:
                rows += [compare_scores(_items(pair[0].task, [pair]), part=True) for pair in of_metric]
        else:
            rows += [compare_scores(_items(pair[0].task, [pair]), remark) for pair in of_metric]
    return rows


def _items(name: str, pairs: Sequence[tuple[MetricScores, MetricScores]]) -> TaskItems:
    first = pairs[0][0]
    return TaskItems(
        name,
        first.metric,
        tuple(value for mine, _ in pairs for value in mine.values),
        tuple(value for _, theirs in pairs for value in theirs.values),
        tuple(weight for mine, _ in pairs for weight in mine.weights),
        first.higher,
        first.log,
    )
