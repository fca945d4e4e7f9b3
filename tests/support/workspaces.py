"""Workspaces to report of: made by the real command line, their levels measured by decree."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from imatrix_runner.app.report import NAMES, STEP, ReportFiles, gather, make_report
from imatrix_runner.cli.main import run_cli
from imatrix_runner.engines.measures import Divergence
from imatrix_runner.evaluate.measurements import Measured, content_of
from imatrix_runner.events import Event, Notice, Sink, ignore
from imatrix_runner.journal import Journal, StepRecord
from imatrix_runner.process import Runner
from imatrix_runner.report.document import Report
from imatrix_runner.steps import LEVEL_INPUT, Kind, step_id
from imatrix_runner.workspace import Workspace
from support.reports import comparison, divergence, domain, evaluation

LEVELS = ("Q8_0", "Q4_K_M", "IQ2_XS")
KLDS = dict(zip(LEVELS, (0.0011, 0.0174, 0.41), strict=True))


def run_here(folder: Path, *arguments: str | Path) -> Workspace:
    """``imatrix-runner ARGUMENTS`` with ``folder`` for its work directory; the one workspace that is there afterwards."""
    code = run_cli([*map(str, arguments), "--work-dir", str(folder / "work"), "-q"])
    assert code == 0
    (root,) = (folder / "work").iterdir()
    return Workspace(root, root.name)


def unreported(workspace: Workspace) -> Workspace:
    """As if no report had ever been made of it."""
    for name in NAMES:
        (workspace.root / name).unlink(missing_ok=True)
    journal = json.loads(workspace.journal.read_text(encoding="utf-8"))
    journal["steps"].pop(STEP, None)
    journal["facts"].pop("described", None)
    workspace.journal.write_text(json.dumps(journal), encoding="utf-8")
    return workspace


def reported(workspace: Workspace, sink: Sink = ignore) -> Report:
    """What :func:`gather` makes of it."""
    return gather(workspace, Journal(workspace.journal), Runner(), sink)


def report_files(workspace: Workspace, sink: Sink = ignore, **changes: Any) -> ReportFiles:
    return make_report(workspace, Journal(workspace.journal), Runner(), sink, **changes)


def timeless(report: Report) -> Report:
    """Without the moment it was made."""
    return replace(report, made="")


def copy(workspace: Workspace, to: Path) -> Workspace:
    """As a restored backup: the same content, nothing of the file system's own."""
    shutil.copytree(workspace.root, to / workspace.root.name)
    return Workspace(to / workspace.root.name, workspace.model)


def measure(workspace: Workspace, klds: Mapping[str, float] | None = None, **changes: Any) -> None:
    """Have the journal say that levels were measured to have these mean KLDs; ``changes`` to what they were measured with."""
    journal, facts = Journal(workspace.journal), evaluation(seconds=0.0, **changes)
    for name, kld in (klds or KLDS).items():
        _record(journal, "evaluate", name, Measured(divergence(kld), divergence(kld).ratio, facts), 3.5)


def compare_and_answer(workspace: Workspace, level: str) -> None:
    journal = Journal(workspace.journal)
    _record(journal, "compare", level, comparison(level, KLDS[level], 0.2), 0.0)
    _record(journal, "answer", level, domain(level), 7.0)


def _record(journal: Journal, what: Kind, level: str, value: Any, seconds: float) -> None:
    inputs = {LEVEL_INPUT: content_of(journal[f"level-{level}"])}
    journal.record(step_id(what, level), StepRecord.now(inputs, [], "asked for", seconds, facts=value))


def measured_kld(report: Report) -> dict[str, float]:
    found: dict[str, Divergence] = {each.name: each.measured for each in report.levels if each.measured is not None}
    return {name: figures.kld.value for name, figures in found.items()}


class Heard:
    """A sink that keeps what people would read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.lines.append(f"{event.level}: {event.text}")

    def told(self, *words: str) -> bool:
        """Whether one line holds all these words."""
        return any(all(word in line for word in words) for line in self.lines)
