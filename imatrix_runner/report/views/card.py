"""``report.md``: the model card of a Hugging Face repository that holds the finished files (its ``README.md``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from imatrix_runner import safe_text
from imatrix_runner.evaluate.ab_verdict import RULE, Comparison
from imatrix_runner.evaluate.tasks.task_verdict import TASK_RULE
from imatrix_runner.files import human_bytes, human_seconds
from imatrix_runner.models.hub.cards import CardFacts, front_matter, licence_address
from imatrix_runner.models.origin import repository_in
from imatrix_runner.report.document import Report, ReportLevel, ReportStep
from imatrix_runner.report.views import wording
from imatrix_runner.report.views.card_notes import facts_of, making_of, measuring_of, mixes_of, notes_of, roundings_of
from imatrix_runner.report.views.descriptions import PICKED, describe
from imatrix_runner.report.views.markdown import (
    MAX_BLOCK,
    Markdown,
    fenced,
    file_address,
    inline,
    joined,
    link,
    markdown_templates,
)
from imatrix_runner.report.views.running import card_commands
from imatrix_runner.report.views.task_lines import TaskRow, task_remarks, task_rows

PICTURE = "report.png"
_UNKNOWN = "–"
_SHARD = re.compile(r"(.+)-00001-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class _Row:
    """A line of the table of files."""

    file: Markdown
    type: str
    size: str
    bits: str
    kld: str
    same_top: str
    ratio: str
    rate: str
    advice: str


@dataclass(frozen=True)
class _Choice:
    label: str
    file: Markdown
    size: str
    kld: str
    same_top: str
    rule: str


@dataclass(frozen=True)
class _Tasked:
    """A level on a task."""

    level: Markdown
    task: Markdown
    items: str
    source: str
    score: str
    difference: str
    verdict: str


@dataclass(frozen=True)
class _Compared:
    level: str
    with_imatrix: str
    without: str
    saved: str
    ppl: str
    same_top: str
    verdict: str


def render_card(report: Report) -> str:
    """The model card as Markdown. If the files' hub id is not known, commands use a placeholder (:func:`stand_in`)."""
    levels = sorted(report.rows, key=lambda level: -level.n_bytes)
    measured = [level for level in levels if level.measured is not None]
    advice = describe(levels, report.picks)
    base, where = _base(report), repository_in(report.repo) or ""
    body = (
        markdown_templates()
        .get_template("card.md.j2")
        .render(
            report=report,
            model=report.model,
            imatrix=any(level.used_imatrix for level in levels),
            levels=levels,
            measured=measured,
            evaluation=report.evaluation if measured else None,
            timed=any(level.speed for level in levels),
            speed_setting=wording.speed_setting(report.speed_setting) if report.speed_setting is not None else "",
            source_rate=wording.rate(report.source_speed.generation) if report.source_speed is not None else "",
            source=link(base, f"https://huggingface.co/{base}") if base else report.model.origin or report.model.name,
            facts=facts_of(report, _licence(report, base)),
            choices=_choices(report, levels),
            picture=PICTURE if len(measured) > 1 else "",
            rows=[_row(level, advice[level.name]) for level in levels],
            notes=[*map(inline, report.caveats), *notes_of(levels)],
            download=card_commands(report, levels, where or stand_in(report)),
            stand_in=Markdown("" if where else stand_in(report)),
            matrix=_matrix(report),
            projectors=joined(link(file.name, file_address(file.name)) for file in report.model.files if "mmproj" in file.name),
            # Whole or not at all: a cut format would be wrong.
            prompt_format=fenced(report.model.prompt_format) if 0 < len(report.model.prompt_format) <= MAX_BLOCK else "",
            comparisons=[_compared(each) for each in report.comparisons],
            rule=RULE,
            answers=report.domain,
            tasks=[_tasked(row) for row in task_rows(report.tasks)],
            task_rule=TASK_RULE,
            task_remarks=list(map(inline, task_remarks(report.tasks))),
            measuring=measuring_of(report),
            making=making_of(report),
            mixes=mixes_of(report),
            roundings=roundings_of(report),
            mix_commands=_mix_commands(levels),
            command=fenced(report.command, "sh") if report.command else "",
            commands=_commands(report.steps),
            words=wording,
        )
    )
    return _front_matter(report, base) + "\n" + body


def stand_in(report: Report) -> str:
    """Placeholder for the hub id of a repository that has none yet: ``OWNER/MODEL-GGUF``."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", report.model.name[:80]).strip("-._")
    owner = re.fullmatch(r"[A-Za-z0-9][\w-]{0,95}", report.quantized_by, re.ASCII)
    return f"{owner[0] if owner else 'OWNER'}/{name or 'MODEL'}-GGUF"


def _matrix(report: Report) -> Markdown:
    """A link to the importance matrix, if it is a file next to the levels; else empty."""
    imatrix = report.imatrix
    if imatrix is None or not (imatrix.made_here or imatrix.origin):
        return Markdown("")
    return link(imatrix.file.name, file_address(imatrix.file.name))


def _base(report: Report) -> str:
    """The hub id of the model that the files were made from; empty if it has none."""
    ids = (*report.model.base_models[:1], report.model.repo)
    return next((repo for each in ids if (repo := repository_in(each))), "")


def _front_matter(report: Report, base: str) -> str:
    model = report.model
    made_with = ("imatrix",) if any(level.used_imatrix for level in report.levels) else ()
    return front_matter(
        CardFacts(
            model_name=model.name,
            repo=base or report.model.tuned_from,
            relation="quantized" if base else "finetune",
            license=model.license,
            license_name=model.license_name,
            license_link=model.license_link,
            languages=model.languages,
            tags=model.tags,
            own_tags=("gguf", *made_with, "quantized"),
            quantized_by=report.quantized_by,
        )
    )


def _licence(report: Report, base: str) -> Markdown:
    model = report.model
    name = model.license_name if model.license.lower() in ("", "other") and model.license_name else model.license
    if not name:
        return Markdown("")
    address = licence_address(base, model.license_link)
    return link(name, address) if address else inline(name)


def _choices(report: Report, levels: Sequence[ReportLevel]) -> list[_Choice]:
    by_name = {level.name: level for level in levels}
    picked = [(pick, by_name[pick.level]) for pick in report.picks if pick.level in by_name]
    return [
        _Choice(
            PICKED[pick.why],
            _file(level, level.name),
            human_bytes(level.n_bytes),
            wording.kld(level.measured.kld.value) if level.measured else "",
            wording.percent(level.measured.same_top.value) if level.measured else "",
            pick.rule,
        )
        for pick, level in picked
    ]


def _row(level: ReportLevel, advice: str) -> _Row:
    found = level.measured
    return _Row(
        file=_file(level),
        type=level.label,
        size=human_bytes(level.n_bytes),
        bits=f"{level.bits_per_weight:.2f}" if level.bits_per_weight is not None else _UNKNOWN,
        kld=wording.kld_error(found.kld) if found else _UNKNOWN,
        same_top=wording.percent(found.same_top.value) if found else _UNKNOWN,
        ratio=f"{wording.points(level.ppl_ratio.value - 1)} %" if level.ppl_ratio else _UNKNOWN,
        rate=wording.rate(level.speed.generation) if level.speed else _UNKNOWN,
        advice=advice,
    )


def _file(level: ReportLevel, text: str = "") -> Markdown:
    """A link to a level's file; for a split level, to its first shard with the shards' pattern as text."""
    first = level.files[0].name
    shard = _SHARD.fullmatch(first)
    name = f"{shard[1]}-*-of-{shard[2]}.gguf" if shard and len(level.files) > 1 else first
    return link(text or name, file_address(first))


def _compared(each: Comparison) -> _Compared:
    return _Compared(
        level=each.level,
        with_imatrix=wording.kld(each.with_imatrix.kld.value),
        without=wording.kld(each.without.kld.value),
        saved=f"{wording.percent(each.saved.value)} ± {wording.percent(each.saved.error)}",
        ppl=wording.signed(each.ppl.value),
        same_top=f"{wording.points(each.same_top.value)} points",
        verdict=f"{each.verdict} ({each.remark})" if each.remark else each.verdict,
    )


def _tasked(row: TaskRow) -> _Tasked:
    found = row.found
    name = inline(f"{found.task} ({found.metric})")
    return _Tasked(inline(row.level), name, f"{found.n_items:,}", row.source, row.score, row.difference, row.verdict)


def _mix_commands(levels: Sequence[ReportLevel]) -> Markdown:
    """The commands with which llama-quantize makes the mixes; without those that name no file of types, which are too long."""
    shown = [
        level.command for level in levels if level.mix is not None and level.mix.tensor_types is not None and level.command
    ]
    return fenced("\n".join(shown), "sh") if shown else Markdown("")


def _commands(steps: Sequence[ReportStep]) -> Markdown:
    shown = [f"# {safe_text.shown(step.what)}, {human_seconds(step.seconds)}\n{step.command}" for step in steps if step.command]
    return fenced("\n\n".join(shown), "sh") if shown else Markdown("")
