"""``report.html``: the report as one self-contained page, which needs neither network nor server.

Style, scripts, Vega-Lite and the charts' data are inlined. A Content-Security-Policy allows only these scripts and this style,
by their hashes, and no connections. jinja2 escapes every text; charts are embedded as JSON without ``<``, which could end their
element.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from imatrix_runner import safe_text
from imatrix_runner.errors import RunnerError
from imatrix_runner.evaluate.ab_verdict import RULE
from imatrix_runner.evaluate.answer_agreement import AnswerPair, DomainResult, Run, differences
from imatrix_runner.evaluate.equal_size import EQUAL_SIZE_RULE
from imatrix_runner.evaluate.recommendations import Pick
from imatrix_runner.evaluate.tasks.task_verdict import TASK_RULE
from imatrix_runner.files import atomic_writer, human_bytes, human_seconds
from imatrix_runner.models.origin import repository_in
from imatrix_runner.report.document import Report, ReportLevel, source_kind
from imatrix_runner.report.views import charts, heat, wording
from imatrix_runner.report.views.colours import variables
from imatrix_runner.report.views.costs import cost_heat
from imatrix_runner.report.views.descriptions import PICKED
from imatrix_runner.report.views.pareto import pareto
from imatrix_runner.report.views.provenance import provenance
from imatrix_runner.report.views.report_tables import level_table
from imatrix_runner.report.views.speeds import speed_chart
from imatrix_runner.report.views.task_lines import task_remarks, task_rows
from imatrix_runner.toolchain.store import cache_dir

if TYPE_CHECKING:
    import jinja2

TEMPLATES: Final = Path(__file__).parent / "templates"
ANSWERS: Final = 200
"""Most prompts per level whose answers are on the page; ``report.json`` has all."""
_TENSORS, _NAMES = 2_000, 60
"""Most rows of a chart's table; most names in a sentence."""
_STOPPED: Final = {
    "chunks": "after the chunks that were asked for",
    "converged": "when it had converged",
    "covered": "when every expert had seen enough",
    "text": "at the end of the text",
}


@dataclass(frozen=True)
class RecommendedLevel:
    """A pick with its level."""

    pick: Pick
    name: str
    level: ReportLevel


@dataclass(frozen=True)
class Chart:
    """A chart: the id of its element, its JSON, and its description in words."""

    id: str
    json: str
    description: str
    small: bool


@dataclass(frozen=True)
class Answer:
    """A prompt with both answers, each in runs that are equal or differ."""

    pair: AnswerPair
    prompt: str
    source: list[Run]
    level: list[Run]


@dataclass(frozen=True)
class Answers:
    """A level's answers; ``left_out``: how many more are not on the page."""

    result: DomainResult
    id: str
    answers: list[Answer]
    left_out: int


def render_html(report: Report) -> str:
    """The whole page. Pure: the same report gives the same page."""
    style, script, library = _style(), _source("report.js"), _library()
    heats = [(figure, _chart(f"heat-{figure.key}", heat.heat_map(report, figure.key))) for figure in heat.FIGURES]
    chosen = _chosen(report)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            hub=_hub_link(report.model.repo),
            stopped=_STOPPED,
            style=style,
            scripts=[library, script],
            policy=_policy([library, script], [style]),
            chosen=chosen,
            answer=next((each for each in chosen if each.pick.why in ("target", "speed")), chosen[0] if chosen else None),
            named={each.level.name: each.name for each in chosen},
            table=level_table(report.rows),
            pareto=_chart("pareto", pareto(report)),
            speeds=_chart("speeds", speed_chart(report)),
            saved=_chart("saved", charts.saved(report)),
            rule=RULE,
            costs=_chart("costs", cost_heat(report)),
            heats=[(figure, chart) for figure, chart in heats if chart is not None],
            curve=_chart("curve", charts.curve(report)),
            coverage=_chart("coverage", heat.coverage(report)),
            expert_groups=heat.expert_groups(report.imatrix.experts) if report.imatrix is not None else [],
            most_rows=_TENSORS,
            most_names=_NAMES,
            equal_size_rule=EQUAL_SIZE_RULE,
            domain=[_answers(result, at) for at, result in enumerate(report.domain)],
            tasks=task_rows(report.tasks),
            task_remarks=task_remarks(report.tasks),
            task_rule=TASK_RULE,
            provenance=provenance(report),
        )
    )


def _hub_link(text: str) -> str:
    """The address of a repository's page on the hub; empty if ``text`` is not a repository's name."""
    repo = repository_in(text)
    return f"https://huggingface.co/{repo}" if repo else ""


def embedded_json(value: Any) -> str:
    """JSON that cannot end the ``<script>`` element it is in."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _chosen(report: Report) -> list[RecommendedLevel]:
    levels = {level.name: level for level in report.levels}
    return [RecommendedLevel(pick, PICKED[pick.why], levels[pick.level]) for pick in report.picks if pick.level in levels]


def _chart(name: str, spec: charts.Spec | None) -> Chart | None:
    return Chart(name, embedded_json(spec), spec["description"], spec["usermeta"]["small"]) if spec is not None else None


def _answers(result: DomainResult, number: int) -> Answers:
    pairs = result.pairs[:ANSWERS]
    return Answers(result, f"answers-{number}", list(map(_answer, pairs)), len(result.pairs) - len(pairs))


def _answer(pair: AnswerPair) -> Answer:
    source, level = differences(safe_text.shown_text(pair.source), safe_text.shown_text(pair.level))
    return Answer(pair, safe_text.shown_text(pair.prompt), source, level)


def _policy(scripts: list[str], styles: list[str]) -> str:
    """The Content-Security-Policy: only these scripts and styles, and no connections."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(_hashes(scripts))}",
            f"style-src {' '.join(_hashes(styles))}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hashes(texts: list[str]) -> Iterator[str]:
    for text in texts:
        yield f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _style() -> str:
    """The style sheet: dark on screens in dark mode, always light in print."""
    light = f":root {{ color-scheme: light; {variables()} }}"
    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {variables(dark=True)} }} }}"
    return "\n".join([light, dark, _source("report.css")])


def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets ``vegaEmbed``. Bundling takes a second or two, so the result is
    kept in the cache, under the version of vl-convert and with a checksum."""
    import vl_convert

    kept = cache_dir() / "report" / f"vega-{version('vl-convert-python')}.js"
    if kept.is_file():
        seal, _, script = kept.read_text(encoding="utf-8").partition("\n")
        if seal == _seal(script):
            return script
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    script = f"(() => {{\n{bundle}\n}})();"
    # If the cache cannot be written, the next report only bundles again.
    with suppress(RunnerError), atomic_writer(kept) as handle:
        handle.write(f"{_seal(script)}\n{script}".encode())
    return script


def _seal(script: str) -> str:
    return f"// {hashlib.sha256(script.encode()).hexdigest()}"


def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=human_bytes,
        seconds=human_seconds,
        shown=safe_text.shown,
        one_line=wording.one_line,
        shown_text=safe_text.shown_text,
        kld=wording.kld,
        kld_error=wording.kld_error,
        figure=wording.figure,
        error=wording.error,
        percent=wording.percent,
        points=wording.points,
        difference=wording.difference,
        cost=wording.cost,
        count=wording.count,
        share_on_calibration=wording.share_on_calibration,
        share_on_held_out=wording.share_on_held_out,
        types_of=wording.types_of,
        moment=wording.moment,
        kind=source_kind,
        rate=wording.rate,
        setting=wording.speed_setting,
    )
    environment.globals.update(many=wording.many)
    return environment
