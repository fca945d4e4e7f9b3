"""Writes the report of a workspace: ``report.json`` from its journal and files, and from that a page, a model card and a
picture."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner import __version__
from imatrix_runner import report as report_room
from imatrix_runner.errors import InvalidDataError, NoSpaceError, from_os_error
from imatrix_runner.evaluate.measurements import levels_made
from imatrix_runner.events import Finished, Saved, Sink, Started, warning
from imatrix_runner.files import discard, part_path, stamp
from imatrix_runner.journal import Journal, StepOutput, StepRecord, differences, is_intact
from imatrix_runner.process import Runner
from imatrix_runner.report.document import Report, encode_report, read_report
from imatrix_runner.report.facts.gather import gather, remember_target
from imatrix_runner.report.facts.gather_model import remember_source
from imatrix_runner.report.facts.gather_speeds import remember_speed
from imatrix_runner.report.views.forms import HTML, JSON, MARKDOWN, NAMES, PICTURE, form_names, render_forms
from imatrix_runner.steps import step_id
from imatrix_runner.workspace import Workspace

__all__ = ["NAMES", "STEP", "ReportFiles", "gather", "make_report", "remember_speed", "remember_target"]

STEP = step_id("report")


@dataclass(frozen=True)
class ReportFiles:
    """A report and its files. ``picture`` is None if too little was measured for one; ``made`` is False if nothing had changed
    and the earlier files stay; ``stale``: the files could not be written."""

    report: Report
    json: Path
    html: Path
    markdown: Path
    picture: Path | None
    made: bool
    stale: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.html, self.markdown, *((self.picture,) if self.picture is not None else ()), self.json)


def make_report(
    workspace: Workspace,
    journal: Journal,
    runner: Runner,
    sink: Sink,
    *,
    command: str = "",
    quantized_by: str = "",
    repo: str = "",
    licence: str = "",
    strict: bool = True,
) -> ReportFiles:
    """Gather the facts and write the report's files, unless nothing changed. The caller holds the workspace's lock.

    ``command``: the line that was typed (empty: the last one that made something). ``quantized_by``: whom the card names as the
    maker; ``repo``: the hub id in its commands; ``licence``: the card's, in place of the source's (empty: as in the last
    report). A file in the way that was not made here,
    and a full disk, are errors if ``strict``, else warnings; in both cases nothing is written. Raises
    :class:`InvalidDataError` if there is nothing to report.
    """
    made = journal.still_there(STEP, save=True)  # in a copied workspace, files are recognised by content once
    for name in levels_made(journal):
        journal.still_there(step_id("level", name), save=True)
    if quantized_by:
        journal.remember(quantized_by=quantized_by)
    if repo:
        journal.remember(repo=repo)
    if licence:
        journal.remember(licence=licence)
    forms = _forms()
    before = _before(workspace, journal, forms) if made else None
    report = gather(workspace, journal, runner, sink, command=command, before=before)
    remember_source(journal, report.model)
    inputs, record = {"facts": _fingerprint(report), "forms": forms}, journal.get(STEP)
    if before is not None and record is not None and not differences(record, inputs):
        return _files(workspace, before, made=False)
    if (foreign := _foreign(workspace, record, form_names(report))) is not None:
        if strict:
            raise foreign
        sink(warning(foreign.sentence()))
        return replace(_files(workspace, report, made=False), stale=True)
    sink(Started(STEP, "report"))
    try:
        _write(workspace, journal, report, inputs)
    except NoSpaceError as error:
        if strict:
            raise
        sink(Finished(STEP, "failed", error.why))
        sink(warning(f"{error.what}: {error.why}. {_again(workspace)}"))
        return replace(_files(workspace, report, made=False), stale=True)
    files = _files(workspace, report, made=True)
    for path in files.paths:
        sink(Saved(str(path), STEP, path.stat().st_size))
    sink(Finished(STEP, "done", files.html.name))
    return files


def _before(workspace: Workspace, journal: Journal, forms: str) -> Report | None:
    """The report that is there already, if this version of the program made it."""
    record = journal.get(STEP)
    if record is None or record.inputs.get("forms") != forms:
        return None
    return read_report(workspace.root / JSON)


def _fingerprint(report: Report) -> str:
    """Digest of the report's content except for the time it was made."""
    return f"sha256:{hashlib.sha256(encode_report(replace(report, made=''))).hexdigest()}"


def _forms() -> str:
    """Digest of the code and templates of the report: another version may render the same facts differently."""
    digest = hashlib.sha256(__version__.encode())
    folder = Path(report_room.__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def _foreign(workspace: Workspace, record: StepRecord | None, names: Sequence[str]) -> InvalidDataError | None:
    """The error for a file that must not be replaced (changed, or not made here), if any. Checked before rendering."""
    outputs = {output.name: output for output in record.outputs} if record is not None else {}
    for name in names:
        path, known = workspace.root / name, outputs.get(name)
        if path.exists() and (known is None or not is_intact(known, workspace.root)):
            return InvalidDataError(
                f"{path} is in the way of the report",
                "it was changed since it was made" if known is not None else "it was not made here",
                f"Rename it to keep it, or delete it. {_again(workspace)}",
            )
    return None


def _again(workspace: Workspace) -> str:
    return f"Then type: imatrix-runner report {shlex.quote(str(workspace.root))}"


def _write(workspace: Workspace, journal: Journal, report: Report, inputs: Mapping[str, str]) -> None:
    began = time.monotonic()
    contents = render_forms(report)
    finals = {name: workspace.root / name for name in contents}
    parts = {name: part_path(final) for name, final in finals.items()}
    try:
        for name, content in contents.items():
            parts[name].write_bytes(content)
        outputs = [
            StepOutput(name, stamp(parts[name]), hashlib.sha256(content).hexdigest()) for name, content in contents.items()
        ]
        record = StepRecord.now(inputs, outputs, "asked for, or something changed", time.monotonic() - began)
        journal.conclude(STEP, record, [(parts[name], finals[name]) for name in contents])
    except OSError as error:
        raise from_os_error(error, "writing the report", workspace.root) from error
    finally:
        for part in parts.values():
            discard(part)


def _files(workspace: Workspace, report: Report, *, made: bool) -> ReportFiles:
    root = workspace.root
    picture = root / PICTURE if PICTURE in form_names(report) else None
    return ReportFiles(report, root / JSON, root / HTML, root / MARKDOWN, picture, made)
