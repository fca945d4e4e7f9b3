"""What comes with the levels: the card, the report's other files, the imatrix, the manifest of its calibration text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from imatrix_runner.events import Sink, warning
from imatrix_runner.files import sha256
from imatrix_runner.journal import Journal, outputs_intact
from imatrix_runner.models.hub import Changes
from imatrix_runner.models.hub.cards import card_flaw
from imatrix_runner.models.hub.label_rules import is_model_for_llama_cpp
from imatrix_runner.publish.card_merge import MergedCard, has_marks, marked, merge_cards, without_marks
from imatrix_runner.publish.file_names import PublishedFile, checked_names
from imatrix_runner.publish.local_files import (
    calibration_manifest,
    file_on_disk,
    imatrix_path,
    known_digest,
    projectors,
    small_file,
)
from imatrix_runner.publish.publish_plan import CARD, FileToPublish, PublishUnit, is_published_here, is_same
from imatrix_runner.report.document import Report, ReportFile, ReportLevel, read_report
from imatrix_runner.report.views.forms import JSON, MARKDOWN, render_forms
from imatrix_runner.steps import step_id
from imatrix_runner.workspace import Workspace

TITLE = "Upload card, imatrix and report"


def companions(workspace: Workspace, journal: Journal, report: Report, paths: Mapping[str, str]) -> PublishUnit:
    """Everything that describes the levels of a report. ``paths``: of files in the repository, by name in the workspace.

    Raises :class:`UsageError` for a file whose name is against a rule.
    """
    imatrix = report.imatrix
    if imatrix is not None:
        paths = {**paths, imatrix.file.name: _imatrix_name(imatrix.file.name)}
    shown = as_published(report, paths)
    forms = _forms_on_disk(workspace, journal, shown) or render_forms(shown)
    card = small_file(CARD, marked(forms.pop(MARKDOWN).decode()).encode())
    files = [card, *(small_file(name, content) for name, content in forms.items())]
    if imatrix is not None and (imatrix.made_here or imatrix.origin):
        path = imatrix_path(workspace, journal, imatrix.file.sha256, imatrix.file.name)
        files += [file_on_disk(paths[imatrix.file.name], path, imatrix.file.sha256)] if path is not None else []
    manifest = calibration_manifest(workspace, journal, report)
    files += [file_on_disk(manifest.name, manifest, sha256(manifest))] if manifest is not None else []
    files += [file_on_disk(path.name, path, known_digest(journal, path)) for path in projectors(workspace)]
    checked_names([PublishedFile(file.name) for file in files])
    return PublishUnit(TITLE, tuple(files))


def _forms_on_disk(workspace: Workspace, journal: Journal, report: Report) -> dict[str, bytes]:
    """The report's files in the workspace, if they are of this very report and nobody changed them; else empty. Pictures take
    seconds to draw."""
    record, document = journal.get(step_id("report")), workspace.root / JSON
    if record is None or not outputs_intact(record, workspace.root) or read_report(document) != report:
        return {}
    return {output.name: (workspace.root / output.name).read_bytes() for output in record.outputs}


def _imatrix_name(name: str) -> str:
    """The name of an imatrix in the repository: its own, unless llama.cpp would take the file for a model."""
    return "imatrix.gguf" if name.endswith(".gguf") and is_model_for_llama_cpp(name) else name


def report_on(report: Report, names: Collection[str]) -> Report:
    """The report without the levels that are not among ``names``."""
    if all(level.name in names for level in report.levels):
        return report
    left = {level.name for level in report.levels} - {*names}
    levels = [
        replace(
            level,
            same_as=level.same_as if level.same_as not in left else "",
            others=tuple(other for other in level.others if other not in left),
        )
        for level in report.levels
        if level.name not in left
    ]
    return replace(
        report,
        levels=tuple(levels),
        comparisons=tuple(each for each in report.comparisons if each.level not in left),
        without_twin=tuple(each for each in report.without_twin if each.level not in left),
        domain=tuple(each for each in report.domain if each.level not in left),
        tasks=tuple(each for each in report.tasks if each.level not in left),
        picks=tuple(each for each in report.picks if each.level not in left),
        steps=tuple(each for each in report.steps if each.what not in left),
    )


def as_published(report: Report, paths: Mapping[str, str]) -> Report:
    """The report with the names that its files have in the repository."""

    def file(found: ReportFile) -> ReportFile:
        return replace(found, name=paths.get(found.name, found.name))

    def level(found: ReportLevel) -> ReportLevel:
        return replace(found, files=tuple(map(file, found.files)))

    imatrix = report.imatrix
    imatrix = replace(imatrix, file=file(imatrix.file)) if imatrix is not None else None
    return replace(report, levels=tuple(map(level, report.levels)), imatrix=imatrix)


def with_merged_card(unit: PublishUnit, changes: Changes, sink: Sink) -> PublishUnit:
    """The same with what people wrote into the card on the hub."""
    card = card_of(unit)
    there = changes.remote.files.get(CARD)
    if there is None or is_same(card, there):
        return unit
    content = changes.read(CARD, changes.remote.commit)
    try:
        theirs = content.decode()
    except UnicodeDecodeError:
        sink(warning("The card on the hub is not UTF-8; it stays as it is."))
        return replace(unit, files=tuple(small_file(CARD, content) if file is card else file for file in unit.files))
    assert card.content is not None
    if not has_marks(theirs) and _is_untouched(changes):
        return unit
    merged = merge_cards(without_marks(card.content.decode()), theirs)
    if flaw := card_flaw(merged.text):
        sink(warning(f"The metadata of the card on the hub cannot be read ({flaw}); the card stays as it is."))
        merged = MergedCard(theirs)
    for sentence in merged.warnings:
        sink(warning(sentence))
    content = merged.text.encode()
    return replace(unit, files=tuple(small_file(CARD, content) if file is card else file for file in unit.files))


def _is_untouched(changes: Changes) -> bool:
    """Whether the card on the hub is as this program wrote it."""
    last = changes.last_changes([CARD]).get(CARD)
    return any(commit.commit == last and is_published_here(commit) for commit in changes.commits())


def card_of(unit: PublishUnit) -> FileToPublish:
    """The card among the files of a unit."""
    return next(file for file in unit.files if file.name == CARD)
