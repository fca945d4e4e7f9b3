"""Outcomes of tasks on disk: one appended record for each batch of requests
(:mod:`~imatrix_runner.engines.files.appended_groups`)."""

from __future__ import annotations

from pathlib import Path

from imatrix_runner.engines.files.appended_groups import AppendedGroups, read_groups
from imatrix_runner.engines.task_jobs import TaskOutcome

_FORM = "task outcomes 1"


class OutcomesFile(AppendedGroups[TaskOutcome]):
    """``path`` open for appending. Complete batches of the same ``fingerprint`` are kept; anything else in it is dropped."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        super().__init__(path, _FORM, fingerprint, TaskOutcome, "writing outcomes of tasks")


def read_outcomes(path: Path, fingerprint: str) -> dict[int, TaskOutcome]:
    """The outcomes stored for ``fingerprint``, by number of their request; those of which all parts are there."""
    joined: dict[int, TaskOutcome] = {}
    counts: dict[int, int] = {}
    for outcome in sorted(read_groups(path, _FORM, fingerprint, TaskOutcome), key=lambda each: (each.request, each.part)):
        before = joined.get(outcome.request)
        joined[outcome.request] = before.add(outcome) if before is not None else outcome
        counts[outcome.request] = counts.get(outcome.request, 0) + 1
    return {number: outcome for number, outcome in joined.items() if counts[number] == outcome.parts}
