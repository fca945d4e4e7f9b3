"""The child that knows lm-evaluation-harness: ``python -m imatrix_runner.evaluate.tasks.harness_worker REQUEST.json``.

A task may run Python of its own, read data sets and, if it is a code task, run what the model wrote; so none of it happens in
the process that holds the workspace. ``prepare`` writes the requests of all tasks to a file, ``score`` turns the outcomes of
those requests, computed by an engine in the meantime, into scores for each item. Programs run in the sandbox only
(:mod:`~imatrix_runner.evaluate.tasks.sandbox`), and only if the user allowed it.

The result goes to a file as JSON; stdout carries progress, ``{"done": n, "total": n}``.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from imatrix_runner.engines.task_jobs import TaskOutcome, TaskRequest
from imatrix_runner.errors import RunnerError
from imatrix_runner.evaluate.tasks.code_metric import CodeMetric, CodeNotAllowedError
from imatrix_runner.evaluate.tasks.harness_messages import (
    HarnessRequest,
    LoadedTask,
    MetricScores,
    PreparedTasks,
    Scored,
    SubjectScores,
    TaskProblem,
)
from imatrix_runner.evaluate.tasks.recorded_model import RecordedModel

_N_PREDICT = 256
"""lm-evaluation-harness's default of most tokens of an answer."""

_SHOT_SEED = 1234
"""lm-evaluation-harness's default seed for the choice of examples."""

_LONGEST = 400

Tasks = dict[str, Any]


class _ProblemError(Exception):
    """Why a task cannot be used."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind, self.why = kind, why


def main(path: str) -> int:
    request = msgspec.json.decode(Path(path).read_bytes(), type=HarnessRequest)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    random.seed(0)
    np.random.seed(_SHOT_SEED)
    metric = CodeMetric(request.allow_code)
    sys.modules["evaluate"] = _Evaluate(metric)
    result: PreparedTasks | Scored
    try:
        result = _prepare(request) if request.outcomes is None else _score(request, request.outcomes)
    except RunnerError as error:
        result = PreparedTasks(error=(error.what, error.why, error.todo, error.exit_code))
    Path(request.out).write_bytes(msgspec.json.encode(result))
    return 0


class _Evaluate(types.ModuleType):
    """Stands for the package ``evaluate``, whose ``code_eval`` would run programs in a plain child process: tasks that load it
    get our metric. The package itself, which imports PyTorch, is loaded only for what else a task asks of it."""

    def __init__(self, metric: CodeMetric) -> None:
        super().__init__("evaluate")
        self._metric = metric

    def load(self, name: str, *words: Any, **named: Any) -> Any:
        return self._metric if name == "code_eval" else self._package().load(name, *words, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._package(), name)

    def _package(self) -> Any:
        if sys.modules.get("evaluate") is not self:
            return sys.modules["evaluate"]
        del sys.modules["evaluate"]
        package: Any = importlib.import_module("evaluate")
        load: Callable[..., Any] = package.load
        package.load = lambda name, *words, **named: self._metric if name == "code_eval" else load(name, *words, **named)
        return package


# -- tasks ---------------------------------------------------------------------------------------------------------------------


def _load(spec: str, index: Callable[[], Any]) -> Tasks:
    """The tasks of a name, a group's name or a YAML file; relative paths in a file are those next to it."""
    from lm_eval.tasks import TaskManager

    if spec.endswith((".yaml", ".yml")):
        file = Path(spec)
        if not file.is_file():
            raise _ProblemError("unknown", f"there is no file {file}")
        os.chdir(file.parent)
        loaded = TaskManager(include_path=None, include_defaults=False).load([str(file)])
    else:
        names = index()
        if spec not in names.task_index:
            near = difflib.get_close_matches(spec, names.all_tasks, 3)
            raise _ProblemError(
                "unknown", "lm-evaluation-harness has no task of this name" + (f"; near: {', '.join(near)}" if near else "")
            )
        loaded = names.load([spec])
    tasks: Tasks = loaded["tasks"]
    return dict(sorted(tasks.items()))


def _checked(spec: str, index: Callable[[], Any], request: HarnessRequest) -> Tasks:
    try:
        tasks = _load(spec, index)
    except _ProblemError:
        raise
    except Exception as error:
        raise _problem_of(error) from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not request.allow_code:
            raise _ProblemError("code", f"{name} runs programs that the model writes")
        if getattr(task, "MULTIMODAL", False):
            raise _ProblemError("unfit", f"{name} asks about pictures or sound")
        if task.OUTPUT_TYPE == "generate_until":
            given = task.config.generation_kwargs or {}
            if given.get("do_sample") and given.get("temperature", 1.0):
                raise _ProblemError("unfit", f"{name} wants sampled answers, and here the most likely tokens are taken")
        try:
            task.set_fewshot_seed(_SHOT_SEED)
            task.build_all_requests(limit=request.limit, rank=0, world_size=1)
        except Exception as error:
            raise _problem_of(error) from error
    return tasks


def _problem_of(error: BaseException) -> _ProblemError:
    """What kept a task from being loaded, in the words of the innermost cause that says something about data."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(each, CodeNotAllowedError) for each in chain):
        return _ProblemError("code", "it runs programs that the model writes")
    if refused := next((each for each in chain if isinstance(each, RunnerError)), None):
        return _ProblemError("code-refused", refused.why)
    words = ("connect", "offline", "datasetnotfound", "filenotfound", "httperror", "timeout", "localentrynotfound", "gated")
    marked = [each for each in chain if any(word in f"{type(each).__name__} {each}".lower().replace(" ", "") for word in words)]
    about = marked[0] if marked else error
    text = " ".join(str(about).split())[:_LONGEST] or type(about).__name__
    return _ProblemError("data" if marked else "broken", f"{type(about).__name__}: {text}")


def _all_tasks(request: HarnessRequest) -> tuple[list[LoadedTask], list[tuple[str, str, Any]], list[TaskProblem]]:
    """What was loaded, ``(spec, name, task)`` in the order of requests, and what could not be."""
    from lm_eval.tasks import TaskManager

    names: list[Any] = []

    def index() -> Any:
        if not names:
            names.append(TaskManager())
        return names[0]

    loaded, found, problems = [], [], []
    home = Path.cwd()
    for spec in request.specs:
        os.chdir(home)
        try:
            tasks = _checked(spec, index, request)
        except _ProblemError as problem:
            problems.append(TaskProblem(spec, problem.kind, problem.why))
            continue
        for name, task in tasks.items():
            loaded.append(LoadedTask(spec, name, len({each.doc_id for each in task.instances}), len(task.instances)))
            found.append((spec, name, task))
    os.chdir(home)
    return loaded, found, problems


# -- preparing -----------------------------------------------------------------------------------------------------------------


def _prepare(request: HarnessRequest) -> PreparedTasks:
    """Write the requests of all tasks."""
    loaded, found, problems = _all_tasks(request)
    digest = hashlib.sha256()
    with Path(request.requests).open("wb") as out:
        for _, name, task in found:
            digest.update(json.dumps([name, task.dump_config()], default=_named, sort_keys=True).encode())
            for instance in task.instances:
                digest.update(json.dumps(instance.doc, default=str, sort_keys=True).encode())
                out.write(msgspec.json.encode(_request_of(instance)) + b"\n")
    return PreparedTasks(
        tasks=tuple(loaded),
        problems=tuple(problems),
        digest=digest.hexdigest(),
        version=importlib.metadata.version("lm_eval"),
    )


def _named(value: Any) -> str:
    """A function in a task's settings, by name: its address is another one each time."""
    return str(getattr(value, "__qualname__", None) or type(value).__name__)


def _request_of(instance: Any) -> TaskRequest:
    kind, arguments = instance.request_type, instance.args
    if kind == "loglikelihood":
        return TaskRequest("loglikelihood", _clean(arguments[0]), _clean(arguments[1]))
    if kind == "loglikelihood_rolling":
        return TaskRequest("rolling", _clean(arguments[0]))
    given = dict(arguments[1] or {})
    until = given.get("until") or []
    limits = (given.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"))
    n_predict = next((int(limit) for limit in limits if limit), _N_PREDICT)
    texts = [until] if isinstance(until, str) else list(until)
    return TaskRequest("generate", _clean(arguments[0]), until=tuple(map(_clean, texts)), n_predict=n_predict)


def _clean(text: str) -> str:
    """The text without what UTF-8 cannot express."""
    return str(text).encode("utf-8", "replace").decode()


# -- scoring -------------------------------------------------------------------------------------------------------------------


def _score(request: HarnessRequest, files: Mapping[str, str]) -> Scored:
    """The scores of each subject, from the file of its outcomes."""
    loaded, found, _ = _all_tasks(request)
    written = Path(request.requests).read_bytes().splitlines()
    requests = [msgspec.json.encode(_request_of(instance)) for _, _, task in found for instance in task.instances]
    if requests != written:
        return Scored(changed=True)
    total, done = len(files) * len(found), 0
    subjects = []
    for label, file in files.items():
        outcomes = msgspec.json.decode(Path(file).read_bytes(), type=list[TaskOutcome])
        scores: list[MetricScores] = []
        begin = 0
        for task_loaded, (_, _, task) in zip(loaded, found, strict=True):
            mine = outcomes[begin : begin + task_loaded.n_requests]
            begin += task_loaded.n_requests
            scores += _scores_of(task_loaded, task, mine)
            done += 1
            print(json.dumps({"done": done, "total": total}), flush=True)  # noqa: T201 - to the parent
        subjects.append(SubjectScores(label, tuple(scores)))
    return Scored(subjects=tuple(subjects))


def _scores_of(loaded: LoadedTask, task: Any, outcomes: Sequence[TaskOutcome]) -> Iterator[MetricScores]:
    """The scores of all items of a task, for each metric and filter, as the harness's own evaluator computes them."""
    model = RecordedModel(task.instances, outcomes)
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}
    for kind in dict.fromkeys(each.request_type for each in task.instances):
        asked = [each for each in task.instances if each.request_type == kind]
        for instance, answer in zip(asked, getattr(model, kind)(asked), strict=True):
            instance.resps.extend([answer] * (instance.repeats or 1))
    with contextlib.redirect_stdout(sys.stderr):
        task.apply_filters()
        by_item: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_item.setdefault(instance.doc_id, []).append(instance)
        filters = list(task.instances[0].filtered_resps)
        columns: dict[tuple[str, str], list[Any]] = {}
        for name in filters:
            for instances in by_item.values():
                ordered = sorted(instances, key=lambda each: each.idx)
                found = task.process_results(ordered[0].doc, [each.filtered_resps[name] for each in ordered])
                for metric, value in found.items():
                    columns.setdefault((str(metric), name), []).append(value)
    better = task.higher_is_better() or {}
    for (metric, name), values in columns.items():
        if len(values) == len(by_item) and (scores := _plain(metric, values)) is not None:
            shown = metric if len(filters) == 1 else f"{metric}, {name}"
            higher = bool(better.get(metric, True)) and not scores[2]
            yield MetricScores(loaded.spec, loaded.name, shown, scores[0], scores[1], higher, scores[2])


def _plain(metric: str, values: Sequence[Any]) -> tuple[tuple[float, ...], tuple[float, ...], bool] | None:
    """Scores, weights and whether they are logarithms; None where an item's score cannot be compared by itself."""
    if all(isinstance(value, (bool, int, float, np.integer, np.floating)) for value in values):
        numbers = tuple(float(value) for value in values)
        if metric == "perplexity":  # ln p of a text each
            return numbers, (1.0,) * len(numbers), True
        return (numbers, (), False) if all(map(np.isfinite, numbers)) else None
    if all(isinstance(value, (tuple, list)) and len(value) == 2 for value in values):
        first, second = zip(*values, strict=True)
        if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            return tuple(map(float, first)), tuple(map(float, second)), True
        if metric in ("f1", "mcc"):  # right and predicted class
            return tuple(float(_same(*pair)) for pair in values), (), False
    return None


def _same(right: Any, predicted: Any) -> bool:
    return bool(predicted in right) if isinstance(right, (list, tuple)) else bool(right == predicted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
