"""Scores on tasks, as rows for tables: the table, the page and the card show the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from imatrix_runner.engines.measures import Estimate
from imatrix_runner.evaluate.tasks.task_verdict import TaskComparison, TaskScores
from imatrix_runner.report.views.wording import figure, points


@dataclass(frozen=True)
class TaskRow:
    """One level on one task: the figures as they are shown."""

    level: str
    found: TaskComparison

    @property
    def source(self) -> str:
        return _score(self.found, self.found.source)

    @property
    def score(self) -> str:
        return _score(self.found, self.found.score)

    @property
    def difference(self) -> str:
        """``-6.0 ± 2.1 points (p 0.012)``."""
        found, p = self.found, f"p {self.found.p:.2g}" if self.found.p >= 1e-3 else "p < 0.001"
        if _is_share(found):
            return f"{points(found.difference.value, 1)} ± {100 * found.difference.error:.1f} ({p})"
        return f"{found.difference.value:+.3g} ± {found.difference.error:.2g} ({p})"

    @property
    def verdict(self) -> str:
        """The verdict, with the number of items that a smaller difference needs."""
        found = self.found
        if found.verdict == "no difference seen":
            return f"no difference seen with {found.n_items} items (one of 5 points needs about {found.needed})"
        changed = f" ({found.lost} lost, {found.gained} gained)" if found.lost is not None else ""
        return (found.verdict.upper() if found.is_alarm else found.verdict) + changed


def task_rows(scores: Sequence[TaskScores]) -> list[TaskRow]:
    """The rows of all levels, in their order."""
    return [TaskRow(each.level, found) for each in scores for found in each.comparisons]


def task_remarks(scores: Sequence[TaskScores]) -> list[str]:
    """What else must be known, a sentence each."""
    return list(dict.fromkeys(_remarks(scores)))


def _remarks(scores: Sequence[TaskScores]) -> Iterator[str]:
    levels: dict[tuple[str, str], list[str]] = {}
    for each in scores:
        for found in each.comparisons:
            if found.remark:
                levels.setdefault((found.task, found.remark), []).append(each.level)
    for (task, remark), names in levels.items():
        yield f"{task} ({', '.join(dict.fromkeys(names))}): {remark}."
    if limited := next((each.limit for each in scores if each.limit is not None), None):
        yield f"Only the first {limited} items of each task were computed."
    if any(each.ran_code for each in scores):
        yield "Programs that the models wrote were run in a sandbox (--allow-code-execution)."


def _is_share(found: TaskComparison) -> bool:
    return found.lost is not None or all(0 <= each.value <= 1 for each in (found.source, found.score))


def _score(found: TaskComparison, value: Estimate) -> str:
    if _is_share(found):
        return f"{100 * value.value:.1f} ± {100 * value.error:.1f} %"
    return f"{figure(value.value)} ± {value.error:.2g}"
