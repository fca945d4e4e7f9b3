"""From a workspace to its report: what the journal and the files know becomes ``report.json``, and that a page, a card and a
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
from imatrix_runner.events import Finished, Saved, Sink, Started, warning
from imatrix_runner.files import discard, part_path, stamp
from imatrix_runner.journal import Journal, Output, Record, differences, is_intact
from imatrix_runner.process import Runner
from imatrix_runner.report.document import Report
from imatrix_runner.report.stored import encode_report, read_report
from imatrix_runner.workflow.measured import levels_made
from imatrix_runner.workflow.report_facts import gather, remember_target
from imatrix_runner.workflow.report_source import remember_source
from imatrix_runner.workspace import Workspace

__all__ = ["NAMES", "STEP", "ReportFiles", "gather", "make_report", "remember_target"]

STEP = "report"
JSON, HTML, MARKDOWN, PICTURE = "report.json", "report.html", "report.md", "report.png"
NAMES = (JSON, HTML, MARKDOWN, PICTURE)

_LEAST_POINTS = 2
"""Measured levels that make a picture worth drawing."""


@dataclass(frozen=True)
class ReportFiles:
    """A report and where it lies. ``picture`` is None where too little was measured for one; ``made`` is False if nothing had
    changed and the files are those of before; ``stale`` if they could not be made."""

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
    strict: bool = True,
) -> ReportFiles:
    """Gather and write; the caller holds the workspace. What did not change is not written again.

    ``command``: the line that was typed (empty: the last one that made something); ``quantized_by`` and ``repo``: whom the card
    names as the maker, and which hub id its commands name (empty: what it named last). A name that is taken by a file that was
    not made here, and a full disk, are errors, or unless ``strict`` warnings: then nothing is written. Raises
    :class:`InvalidDataError` where there is nothing to report.
    """
    for name in levels_made(journal):
        journal.still_there(f"level-{name}", save=True)  # a copied workspace: known by content from now on
    journal.remember(**{name: value for name, value in (("quantized_by", quantized_by), ("repo", repo)) if value})
    forms = _forms()
    before = _before(workspace, journal, forms)
    report = gather(workspace, journal, runner, sink, command=command, before=before)
    remember_source(journal, report.model)
    inputs, record = {"facts": _fingerprint(report), "forms": forms}, journal.get(STEP)
    if before is not None and record is not None and not differences(record, inputs):
        return _files(workspace, before, made=False)
    if (foreign := _foreign(workspace, record, _names(report))) is not None:
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
    """The report that lies there, if this program made it and nobody changed a file of it."""
    record = journal.get(STEP)
    if record is None or record.inputs.get("forms") != forms:
        return None
    return read_report(workspace.root / JSON) if journal.still_there(STEP, save=True) else None


def _fingerprint(report: Report) -> str:
    """Of everything but when it was made."""
    return f"sha256:{hashlib.sha256(encode_report(replace(report, made=''))).hexdigest()}"


def _forms() -> str:
    """Of the code and templates that make files of a report: another program may make others of the same facts."""
    digest = hashlib.sha256(__version__.encode())
    folder = Path(report_room.__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()}"


def _names(report: Report) -> tuple[str, ...]:
    """The files of a report; one that measured little has no picture."""
    drawn = sum(level.measured is not None for level in report.rows) >= _LEAST_POINTS
    return NAMES if drawn else tuple(name for name in NAMES if name != PICTURE)


def _foreign(workspace: Workspace, record: Record | None, names: Sequence[str]) -> InvalidDataError | None:
    """What to say of a file that is not ours to replace, before anything is rendered, and before what was ours is removed."""
    outputs = {output.name: output for output in record.outputs} if record is not None else {}
    for name in names:
        path, ours = workspace.root / name, outputs.get(name)
        if path.exists() and (ours is None or not is_intact(ours, workspace.root)):
            return InvalidDataError(
                f"{path} is in the way of the report",
                "it was changed since it was made" if ours is not None else "it was not made here",
                f"Rename it to keep it, or delete it. {_again(workspace)}",
            )
    return None


def _again(workspace: Workspace) -> str:
    return f"Then type: imatrix-runner report {shlex.quote(str(workspace.root))}"


def _render(report: Report) -> dict[str, bytes]:
    """The files of a report by name. Imported here, for charts take a while to load."""
    from imatrix_runner.report.card import render_card
    from imatrix_runner.report.page import render_html

    files = {HTML: render_html(report).encode(), MARKDOWN: render_card(report).encode(), JSON: encode_report(report)}
    if PICTURE in _names(report):
        from imatrix_runner.report.picture import render_png

        files[PICTURE] = render_png(report)
    return files


def _write(workspace: Workspace, journal: Journal, report: Report, inputs: Mapping[str, str]) -> None:
    began = time.monotonic()
    contents = _render(report)
    finals = {name: workspace.root / name for name in contents}
    parts = {name: part_path(final) for name, final in finals.items()}
    try:
        for name, content in contents.items():
            parts[name].write_bytes(content)
        outputs = [Output(name, stamp(parts[name]), hashlib.sha256(content).hexdigest()) for name, content in contents.items()]
        record = Record.now(inputs, outputs, "asked for, or something changed", time.monotonic() - began)
        journal.conclude(STEP, record, [(parts[name], finals[name]) for name in contents])
    except OSError as error:
        raise from_os_error(error, "writing the report", workspace.root) from error
    finally:
        for part in parts.values():
            discard(part)


def _files(workspace: Workspace, report: Report, *, made: bool) -> ReportFiles:
    root = workspace.root
    picture = root / PICTURE if PICTURE in _names(report) else None
    return ReportFiles(report, root / JSON, root / HTML, root / MARKDOWN, picture, made)
