"""What is known of a workspace, gathered into one report: from the journal's records, the imatrix, the files' own headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone

from imatrix_runner import __version__
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.evaluate.picks import Measure, Pick, recommend, target
from imatrix_runner.events import Sink, detail, warning
from imatrix_runner.files import encode_json
from imatrix_runner.journal import Journal, Record, outputs_intact
from imatrix_runner.models.origin import repository_in
from imatrix_runner.process import Runner
from imatrix_runner.report.document import Report, ReportEvaluation, ReportFile, ReportLevel, WithoutTwin
from imatrix_runner.untrusted import UnreadableError, from_json
from imatrix_runner.workflow.measured import EVALUATE, Measured, alone, answered, comparisons, levels_made, measured
from imatrix_runner.workflow.ownership import MODEL_FILE
from imatrix_runner.workflow.plan import facts_of_record
from imatrix_runner.workflow.plan_notes import same_tensors
from imatrix_runner.workflow.report_caveats import caveats
from imatrix_runner.workflow.report_imatrix import NONE, collected, describe_imatrix
from imatrix_runner.workflow.report_source import describe_source, origin_of
from imatrix_runner.workflow.report_steps import bare_command, describe_steps
from imatrix_runner.workspace import Workspace

_PROGRAM = f"imatrix-runner {__version__}"


def gather(
    workspace: Workspace,
    journal: Journal,
    runner: Runner,
    sink: Sink,
    *,
    command: str = "",
    before: Report | None = None,
) -> Report:
    """All that is known of a workspace, without changing anything in it; ``runner`` renders the chat template.

    Levels whose files are gone or were changed are left out, as are those of another source than the last run, and figures
    measured otherwise than the newest. ``before``: an earlier report of it, which may save computing. Raises
    :class:`InvalidDataError` if there is nothing to tell.
    """
    records, source = _levels_here(workspace, journal, sink)
    figures, evaluation = _measured(journal, records, sink)
    origin = origin_of(journal)
    local = "" if origin.repo else journal.fact("source") or ""
    made = [_level(name, record, figures.get(name), local) for name, record in records.items()]
    levels = sorted(made, key=lambda level: (-level.n_bytes, level.name))
    first = workspace.root / levels[0].files[0].name if levels else None
    model = describe_source(workspace, journal, source, first, runner, sink)
    used, imatrix = _imatrix_used(records, sink), None
    if used != NONE:
        imatrix = describe_imatrix(workspace, journal, used, first, before.imatrix if before is not None else None)
    collection = collected(workspace, journal, imatrix.file.sha256) if imatrix is not None and imatrix.made_here else None
    levels = _grouped(levels, records)
    compared, answers, measures = comparisons(journal), answered(journal), _measures(levels, records, model.n_bytes)
    lonely = alone(journal)
    newest = _newest(records)
    report = Report(
        model=model,
        levels=tuple(levels),
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        program=_PROGRAM,
        command=bare_command(command or journal.fact("command") or "", local),
        toolchain=newest.inputs["engine"] if newest is not None else imatrix.engine if imatrix is not None else "",
        imatrix=imatrix,
        evaluation=evaluation,
        comparisons=tuple(
            compared[each.name]
            for each in levels
            if not each.same_as and each.name in compared and compared[each.name].with_imatrix == each.measured
        ),
        without_twin=tuple(
            WithoutTwin(each.name, lonely[each.name])
            for each in levels
            if not each.same_as and each.name in lonely and each.name not in compared
        ),
        domain=tuple(answers[each.name] for each in levels if each.name in answers and not each.same_as),
        picks=(*_target(journal, measures), *recommend(measures)),
        steps=describe_steps(journal, records, collection, model, local),
        quantized_by=journal.fact("quantized_by") or "",
        repo=repository_in(journal.fact("repo")) or "",
    )
    return replace(report, caveats=caveats(report, measures))


def _levels_here(workspace: Workspace, journal: Journal, sink: Sink) -> tuple[dict[str, Record], str]:
    """The records of the finished levels of one source, and that source's fingerprint."""
    here: dict[str, Record] = {}
    for name, record in levels_made(journal).items():
        if outputs_intact(record, workspace.root):
            here[name] = record
        else:
            sink(detail(f"{name} is not in the report: its file is gone or was changed."))
    newest = _newest(here) or _newest(
        {step: record for step, record in journal.steps().items() if "model file" in record.inputs}
    )
    if newest is None:
        raise InvalidDataError(
            f"There is nothing to report of {workspace.root}",
            "neither a level nor an imatrix was finished there",
            "Make some first: imatrix-runner run MODEL",
        )
    source = journal.fact(MODEL_FILE) or newest.inputs["model file"]
    strangers = [name for name, record in here.items() if record.inputs["model file"] != source]
    if strangers:
        sink(warning(f"Not in the report, because they were made from another source: {', '.join(strangers)}."))
    return {name: record for name, record in here.items() if name not in strangers}, source


def _newest(records: Mapping[str, Record]) -> Record | None:
    return max(records.values(), key=lambda record: record.finished, default=None)


def _measured(
    journal: Journal, records: Mapping[str, Record], sink: Sink
) -> tuple[dict[str, Measured], ReportEvaluation | None]:
    """Figures that can be compared with each other: those measured with the same text, chunks and reference as the newest."""
    found = {name: figures for name, figures in measured(journal).items() if name in records}
    if not found:
        return {}, None
    runs = {name: journal[f"{EVALUATE} {name}"] for name in found}
    yardstick = found[max(runs, key=lambda name: runs[name].finished)].evaluation
    same = {name: figures for name, figures in found.items() if _yardstick(figures.evaluation) == _yardstick(yardstick)}
    if len(same) < len(found):
        others = ", ".join(name for name in found if name not in same)
        sink(warning(f"{others} were measured otherwise than the others; the report leaves those figures out. Measure again."))
    return same, replace(yardstick, seconds=sum(runs[name].seconds for name in same))


def _yardstick(evaluation: ReportEvaluation) -> tuple[object, ...]:
    return evaluation.sha256, evaluation.n_chunks, evaluation.n_ctx, evaluation.reference


def _imatrix_used(records: Mapping[str, Record], sink: Sink) -> str:
    """The imatrix that levels name as their input, the newest one's where they differ; empty where there are no levels."""
    using = {name: record for name, record in records.items() if record.inputs["imatrix"] != NONE}
    newest = _newest(using)
    if newest is None:
        return NONE if records else ""
    used = newest.inputs["imatrix"]
    others = [name for name, record in using.items() if record.inputs["imatrix"] != used]
    if others:
        sink(warning(f"{', '.join(others)} were made with another imatrix than the one the report tells of."))
    return used


def _level(name: str, record: Record, figures: Measured | None, location: str) -> ReportLevel:
    facts = facts_of_record(record)
    files = tuple(ReportFile(output.name, output.stamp.size, output.sha256) for output in record.outputs)
    return ReportLevel(
        name=name,
        ftype=record.inputs["options"].split(" ")[0],
        files=files,
        n_bytes=sum(file.n_bytes for file in files),
        bits_per_weight=facts.bits_per_weight,
        needs_imatrix=facts.needs_imatrix,
        used_imatrix=record.inputs["imatrix"] != NONE,
        fallbacks=len(facts.fallbacks),
        fallback_share=facts.fallback_share,
        is_source=facts.is_source,
        seconds=record.seconds,
        finished=record.finished,
        command=bare_command(record.command, location),
        measured=figures.divergence if figures is not None else None,
        ppl_ratio=figures.ppl_ratio if figures is not None else None,
        pass_share=share if isinstance(share := record.facts.get("share"), float) else None,
    )


def remember_target(journal: Journal, kld: float | None, n_bytes: int | None) -> None:
    """Have reports name the level that meets these, in nats and bytes; None twice: no such level."""
    journal.remember(target=encode_json([kld, n_bytes]).decode())


def _target(journal: Journal, measures: Sequence[Measure]) -> tuple[Pick, ...]:
    try:
        kld, n_bytes = from_json(journal.fact("target") or "[null,null]", tuple[float | None, int | None])
    except UnreadableError:
        kld, n_bytes = None, None  # the next run with --target-kld or --target-size writes it anew
    pick = target(measures, kld, n_bytes) if kld is not None or n_bytes is not None else None
    return (pick,) if pick is not None else ()


def _grouped(levels: Sequence[ReportLevel], records: Mapping[str, Record]) -> list[ReportLevel]:
    """The levels, those that hold the same tensors pointing at the first of them."""
    same = same_tensors({level.name: (records[level.name].inputs, facts_of_record(records[level.name])) for level in levels})
    return [
        replace(level, same_as=same.get(level.name, ""), others=tuple(other for other, of in same.items() if of == level.name))
        for level in levels
    ]


def _measures(levels: Sequence[ReportLevel], records: Mapping[str, Record], source_bytes: int) -> list[Measure]:
    return [
        Measure.of(
            each.name,
            each.n_bytes,
            each.measured,
            eligible=facts_of_record(records[each.name]).gains(each.n_bytes, source_bytes),
        )
        for each in levels
        if each.measured is not None and not each.same_as
    ]
