"""Looks at everything before it leaves this machine: for secrets and paths, and at the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from imatrix_runner.events import Sink, info, warning
from imatrix_runner.journal import Journal
from imatrix_runner.process import Runner
from imatrix_runner.publish.local_files import ReadyLevel
from imatrix_runner.publish.publish_plan import FileToPublish
from imatrix_runner.publish.secrets import Leak, LocalNames, refuse_findings, scan_file, scan_text
from imatrix_runner.publish.template_check import check_template
from imatrix_runner.report.facts.gather_model import find_source
from imatrix_runner.workspace import Workspace

_BINARY = (".png",)


def refuse_secrets(files: Iterable[FileToPublish], local: LocalNames, sink: Sink) -> None:
    """Raise :class:`InvalidDataError` if a file holds a secret or a path of this machine; say where names of it stand."""
    findings: list[Leak] = []
    for file in files:
        if file.content is not None and not file.name.endswith(_BINARY):
            findings += scan_text(file.name, file.content.decode("utf-8", errors="replace"), local)
        elif file.path is not None:
            findings += scan_file(file.path, file.name, local)
    refuse_findings(findings)
    for finding in findings:
        sink(warning(f"{finding.sentence()}. It may be meant, and is published."))


def tell_of_template(workspace: Workspace, journal: Journal, levels: Sequence[ReadyLevel], runner: Runner, sink: Sink) -> None:
    """Render the chat template of a level as the source's and llama.cpp's engine do, and say what differs. All levels of a
    workspace have the same template."""
    level = next((level for level in levels if level.is_here), None)
    if level is None:
        return
    found = check_template(workspace.root / level.files[0][0], _source(workspace, journal, level), runner)
    for finding in found.findings:
        sink(warning(f"Chat template: {finding.sentence()}"))
    for sentence in found.not_compared:
        sink(info(f"Not compared: {sentence}"))


def _source(workspace: Workspace, journal: Journal, level: ReadyLevel) -> Path | None:
    """The directory or the GGUF that a level was made from; None if it is gone."""
    place = journal.fact("source_at") or ""
    if not place.startswith("hub:") and Path(place).is_absolute() and Path(place).is_dir():
        return Path(place)
    paths = find_source(workspace, journal, journal.fact("model_file") or "").paths
    return paths[0] if paths and paths[0].name != level.files[0][0] else None
