"""Gathers a workspace's report from the journal's records, the imatrix and the headers of the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone

from imatrix_runner import __version__
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.evaluate.measurements import (
    Measured,
    OtherMeasured,
    ReportEvaluation,
    alone,
    answered,
    comparisons,
    levels_made,
    measured,
    mix_verdicts,
    others_measured,
    scored_on_tasks,
)
from imatrix_runner.evaluate.mix_verdict import MixVerdict
from imatrix_runner.evaluate.recommendations import Measure, Pick, recommend, target
from imatrix_runner.events import Sink, detail, warning
from imatrix_runner.files import encode_json
from imatrix_runner.journal import Journal, StepRecord, commands_in, outputs_intact
from imatrix_runner.models.origin import repository_in
from imatrix_runner.process import Runner
from imatrix_runner.quantize.level_facts import LevelInputs, MadeFacts, facts_of_level, ftype_of, is_released
from imatrix_runner.quantize.plan_notes import same_tensors
from imatrix_runner.report.document import Report, ReportFile, ReportLevel, WithoutBaseline
from imatrix_runner.report.facts.caveats import caveats
from imatrix_runner.report.facts.gather_imatrix import collected, describe_imatrix
from imatrix_runner.report.facts.gather_mixes import describe_costs, describe_kept_stock, describe_mixes, with_types_file
from imatrix_runner.report.facts.gather_model import describe_source, origin_of
from imatrix_runner.report.facts.gather_roundings import describe_roundings
from imatrix_runner.report.facts.gather_speeds import described, known_speeds, speed_pick
from imatrix_runner.report.facts.gather_steps import bare_commands, describe_steps
from imatrix_runner.steps import MODEL_INPUT, WITHOUT_IMATRIX, step_id
from imatrix_runner.untrusted import UnreadableError, from_json
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
    """The report of a workspace; nothing in the workspace changes. ``runner`` renders the chat template.

    Left out are levels whose files are gone or changed (unless they were removed after they were published),
    levels of another source than the last run's, and figures measured on
    another text than the newest ones. ``before``: an earlier report, whose statistics may be reused. Raises
    :class:`InvalidDataError` if there is nothing to report.
    """
    records, source = _levels_here(workspace, journal, sink)
    figures, evaluation = _measured(journal, records, sink)
    verdicts = _holding(mix_verdicts(journal), figures)
    mixes = describe_mixes(workspace, journal, records, verdicts, sink)
    roundings = describe_roundings(journal, records, verdicts)
    records = {name: with_types_file(record, mixes.get(name), workspace) for name, record in records.items()}
    speeds = known_speeds(journal, records, source, sink)
    origin = origin_of(journal)
    local = "" if origin.repo else journal.fact("source") or ""
    made = [
        replace(
            _level(name, record, figures.get(name), local),
            mix=mixes.get(name),
            rounding=roundings.get(name),
            speed=speeds.of(name),
        )
        for name, record in records.items()
    ]
    levels = sorted(made, key=lambda level: (-level.n_bytes, level.name))
    first = next((path for each in levels if (path := workspace.root / each.files[0].name).is_file()), None)
    model = describe_source(workspace, journal, source, first, runner, sink)
    if licence := journal.fact("licence"):
        model = replace(model, license=licence, license_name="", license_link="")
    used, imatrix = _imatrix_used(records, sink), None
    if used != WITHOUT_IMATRIX:
        imatrix = describe_imatrix(workspace, journal, used, first, before.imatrix if before is not None else None)
    collection = collected(workspace, journal, imatrix.file.sha256) if imatrix is not None and imatrix.made_here else None
    levels = _grouped(levels, records)
    scored = scored_on_tasks(journal)
    compared, answers, measures = comparisons(journal), answered(journal), _measures(levels, records, model.n_bytes)
    worth_taking = _without_lost_mixes(measures, levels)
    lonely = alone(journal)
    newest = _newest(records)
    report = Report(
        model=model,
        levels=tuple(levels),
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        program=_PROGRAM,
        command=bare_commands(commands_in(command or journal.fact("command") or ""), local),
        toolchain=newest.inputs_as(LevelInputs).engine if newest is not None else imatrix.engine if imatrix is not None else "",
        imatrix=imatrix,
        kept_stock=describe_kept_stock(journal, source),
        costs=describe_costs(workspace, source, sink),
        evaluation=evaluation,
        comparisons=tuple(
            compared[each.name]
            for each in levels
            if not each.same_as and each.name in compared and compared[each.name].with_imatrix == each.measured
        ),
        without_twin=tuple(
            WithoutBaseline(each.name, lonely[each.name])
            for each in levels
            if not each.same_as and each.name in lonely and each.name not in compared
        ),
        others=_others(journal, source, figures, evaluation),
        tasks=tuple(scored[each.name] for each in levels if each.name in scored and not each.same_as),
        domain=tuple(answers[each.name] for each in levels if each.name in answers and not each.same_as),
        picks=(*_target(journal, measures), *speed_pick(journal, measures, speeds), *recommend(worth_taking)),
        steps=describe_steps(journal, records, collection, model, local),
        quantized_by=journal.fact("quantized_by") or "",
        repo=repository_in(journal.fact("repo")) or "",
        speed_setting=speeds.setting,
        source_speed=described(speeds.source) if speeds.source is not None else None,
    )
    return replace(report, caveats=caveats(report, worth_taking))


def _levels_here(workspace: Workspace, journal: Journal, sink: Sink) -> tuple[dict[str, StepRecord], str]:
    """Return the records of the finished levels of one source by name, and that source's fingerprint."""
    here: dict[str, StepRecord] = {}
    for name, record in levels_made(journal).items():
        if outputs_intact(record, workspace.root) or is_released(journal, name, record):
            here[name] = record
        else:
            sink(detail(f"{name} is not in the report: its file is gone or was changed."))
    newest = _newest(here) or _newest(
        {step: record for step, record in journal.steps().items() if MODEL_INPUT in record.inputs}
    )
    if newest is None:
        raise InvalidDataError(
            f"There is nothing to report on {workspace.root}",
            "neither a level nor an imatrix was finished there",
            "Make some first: imatrix-runner run MODEL",
        )
    source = journal.fact("model_file") or newest.inputs[MODEL_INPUT]
    foreign = [name for name, record in here.items() if record.inputs_as(LevelInputs).model_file != source]
    if foreign:
        sink(warning(f"Not in the report, because they were made from another source: {', '.join(foreign)}."))
    return {name: record for name, record in here.items() if name not in foreign}, source


def _newest(records: Mapping[str, StepRecord]) -> StepRecord | None:
    return max(records.values(), key=lambda record: record.finished, default=None)


def _measured(
    journal: Journal, records: Mapping[str, StepRecord], sink: Sink
) -> tuple[dict[str, Measured], ReportEvaluation | None]:
    """Return the figures that were measured with the same text, chunks and reference as the newest, and that evaluation."""
    found = {name: figures for name, figures in measured(journal).items() if name in records}
    if not found:
        return {}, None
    runs = {name: journal[step_id("evaluate", name)] for name in found}
    held_out = found[max(runs, key=lambda name: runs[name].finished)].evaluation
    same = {name: figures for name, figures in found.items() if _held_out_of(figures.evaluation) == _held_out_of(held_out)}
    if len(same) < len(found):
        others = ", ".join(name for name in found if name not in same)
        sink(warning(f"{others}: measured on another text or reference; the report leaves these figures out. Measure again."))
    longest = max((each.evaluation for each in same.values()), key=lambda each: each.n_tokens)
    whole = replace(held_out, n_chunks=longest.n_chunks, n_tokens=longest.n_tokens, ppl=longest.ppl)
    return same, replace(whole, seconds=sum(runs[name].seconds for name in same))


def _holding(verdicts: Mapping[str, MixVerdict], figures: Mapping[str, Measured]) -> dict[str, MixVerdict]:
    """The comparisons of mixes whose figures are those that the report has."""
    klds = {name: found.divergence.kld for name, found in figures.items()}
    return {
        name: verdict
        for name, verdict in verdicts.items()
        if klds.get(name) == verdict.kld and all(klds.get(each.level) == each.kld for each in verdict.stock)
    }


def _others(
    journal: Journal, source: str, figures: Mapping[str, Measured], evaluation: ReportEvaluation | None
) -> tuple[OtherMeasured, ...]:
    """The files of others whose comparisons are with the figures that the report has."""
    if evaluation is None or evaluation.until is not None:
        return ()
    klds = {name: found.divergence.kld.value for name, found in figures.items()}
    text = evaluation.sha256, evaluation.n_chunks, evaluation.n_ctx
    return tuple(others_measured(journal, source, klds, text))


def _held_out_of(evaluation: ReportEvaluation) -> tuple[object, ...]:
    amount = evaluation.n_chunks if evaluation.until is None else f"until {evaluation.until:g}"
    return evaluation.sha256, amount, evaluation.n_ctx, evaluation.reference


def _imatrix_used(records: Mapping[str, StepRecord], sink: Sink) -> str:
    """The imatrix that the levels were made with (if they differ, the newest level's); empty if there are no levels."""
    using = {name: record for name, record in records.items() if record.inputs_as(LevelInputs).imatrix != WITHOUT_IMATRIX}
    newest = _newest(using)
    if newest is None:
        return WITHOUT_IMATRIX if records else ""
    used = newest.inputs_as(LevelInputs).imatrix
    others = [name for name, record in using.items() if record.inputs_as(LevelInputs).imatrix != used]
    if others:
        sink(warning(f"{', '.join(others)} were made with another imatrix than the one in the report."))
    return used


def _level(name: str, record: StepRecord, figures: Measured | None, location: str) -> ReportLevel:
    inputs, made = record.inputs_as(LevelInputs), record.facts_as(MadeFacts)
    facts = made.level
    files = tuple(ReportFile(output.name, output.stamp.size, output.sha256) for output in record.outputs)
    return ReportLevel(
        name=name,
        ftype=ftype_of(record),
        files=files,
        n_bytes=sum(file.n_bytes for file in files),
        bits_per_weight=facts.bits_per_weight,
        needs_imatrix=facts.needs_imatrix,
        used_imatrix=inputs.imatrix != WITHOUT_IMATRIX,
        fallbacks=len(facts.fallbacks),
        fallback_share=facts.fallback_share,
        is_source=facts.is_source,
        seconds=record.seconds,
        finished=record.finished,
        command=bare_commands(record.commands, location),
        measured=figures.divergence if figures is not None else None,
        ppl_ratio=figures.ppl_ratio if figures is not None else None,
        pass_share=made.share,
    )


def remember_target(journal: Journal, kld: float | None, n_bytes: int | None) -> None:
    """Record the target, in nats and bytes, whose level reports name; both None: there is no target."""
    journal.remember(target=encode_json([kld, n_bytes]).decode())


def _target(journal: Journal, measures: Sequence[Measure]) -> tuple[Pick, ...]:
    try:
        kld, n_bytes = from_json(journal.fact("target") or "[null,null]", tuple[float | None, int | None])
    except UnreadableError:
        kld, n_bytes = None, None  # the next run with --target-kld or --target-size writes it anew
    pick = target(measures, kld, n_bytes) if kld is not None or n_bytes is not None else None
    return (pick,) if pick is not None else ()


def _grouped(levels: Sequence[ReportLevel], records: Mapping[str, StepRecord]) -> list[ReportLevel]:
    """The levels with ``same_as`` and ``others`` filled in for those that hold the same tensors."""
    same = same_tensors({level.name: (records[level.name].inputs, facts_of_level(records[level.name])) for level in levels})
    return [
        replace(level, same_as=same.get(level.name, ""), others=tuple(other for other, of in same.items() if of == level.name))
        for level in levels
    ]


def _without_lost_mixes(measures: Sequence[Measure], levels: Sequence[ReportLevel]) -> list[Measure]:
    """The candidates for recommendations: all but mixes and other roundings that are not better than stock of their size."""
    verdicts = {each.name: each.against.held_out for each in levels if each.against is not None}
    lost = {name for name, verdict in verdicts.items() if verdict is not None and not verdict.is_better}
    return [each for each in measures if each.level not in lost]


def _measures(levels: Sequence[ReportLevel], records: Mapping[str, StepRecord], source_bytes: int) -> list[Measure]:
    return [
        Measure.of(
            each.name,
            each.n_bytes,
            each.measured,
            eligible=facts_of_level(records[each.name]).gains(each.n_bytes, source_bytes),
        )
        for each in levels
        if each.measured is not None and not each.same_as
    ]
