"""What the parent and the child that knows lm-evaluation-harness write to each other, as JSON files."""

from __future__ import annotations

import msgspec


class HarnessRequest(msgspec.Struct, frozen=True):
    """``specs``: names of tasks or of groups, or paths of YAML files; ``limit``: the first items of each task (None: all).
    ``requests``: the file that ``prepare`` writes and ``score`` checks; ``out``: where the result goes. ``outcomes``: by
    subject, the file of what an engine computed; None to prepare. ``allow_code``: whether programs may be run."""

    specs: tuple[str, ...]
    requests: str
    out: str
    limit: int | None = None
    allow_code: bool = False
    outcomes: dict[str, str] | None = None


class LoadedTask(msgspec.Struct, frozen=True):
    """A task that ``spec`` named, alone or with others."""

    spec: str
    name: str
    n_items: int
    n_requests: int


class TaskProblem(msgspec.Struct, frozen=True):
    """Why ``spec`` cannot be used. ``kind``: unknown, data, code, code-refused, unfit, broken."""

    spec: str
    kind: str
    why: str


class PreparedTasks(msgspec.Struct, frozen=True):
    """``digest``: of the tasks' settings and items; ``version``: the harness's. ``error``: what, why, what to do and exit code
    of an error that concerns all tasks."""

    tasks: tuple[LoadedTask, ...] = ()
    problems: tuple[TaskProblem, ...] = ()
    digest: str = ""
    version: str = ""
    error: tuple[str, str, str, int] | None = None


class MetricScores(msgspec.Struct, frozen=True):
    """A score for each item of a task, in order. ``weights``: what each counts (empty: 1); ``higher``: more is better;
    ``log``: sums of ln p, whose figure is a perplexity."""

    spec: str
    task: str
    metric: str
    values: tuple[float, ...]
    weights: tuple[float, ...]
    higher: bool
    log: bool


class SubjectScores(msgspec.Struct, frozen=True):
    """All scores of one model."""

    label: str
    scores: tuple[MetricScores, ...]


class Scored(msgspec.Struct, frozen=True):
    """``changed``: the tasks ask something else than what was computed, so there are no scores."""

    subjects: tuple[SubjectScores, ...] = ()
    changed: bool = False
    error: tuple[str, str, str, int] | None = None
