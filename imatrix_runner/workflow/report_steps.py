"""How everything in a workspace came to be, step by step: what, how long it took, and the command that does it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from imatrix_runner.journal import Journal, Record
from imatrix_runner.models.bounded import printable
from imatrix_runner.report.document import ReportModel, ReportStep
from imatrix_runner.workflow.collected import CollectedFacts
from imatrix_runner.workflow.measured import ANSWER, COMPARE, EVALUATE, REFER
from imatrix_runner.workflow.report_source import PROJECTOR, last_part

_FILE = re.compile(r".+\.(gguf|dat|imatrix|txt|jsonl?|csv|parquet|toml)", re.IGNORECASE)
_ABSOLUTE = re.compile(r"[/~]|\.{1,2}[/\\]|[A-Za-z]:[\\/]|\\\\")
_BEYOND_LLAMA = ("--until-converged", "--min-expert-tokens")
"""What llama-imatrix cannot do: then the command is ours."""


def describe_steps(
    journal: Journal, levels: Mapping[str, Record], imatrix: Record | None, model: ReportModel, location: str
) -> tuple[ReportStep, ...]:
    """``levels`` and ``imatrix``: the records of what the report tells of; ``location``: the model's path where it was named by
    one, else empty. In the order in which they were finished."""
    return tuple(sorted(_steps(journal, levels, imatrix, model, location), key=lambda step: step.finished))


def _steps(
    journal: Journal, levels: Mapping[str, Record], imatrix: Record | None, model: ReportModel, location: str
) -> Iterator[ReportStep]:
    source = next((file.name for file in model.files if not file.name.startswith(PROJECTOR)), "MODEL")
    for step, record in journal.steps().items():
        if step.startswith("convert ") and any(output.name == source for output in record.outputs):
            yield _step("conversion", record, _conversion(record, model))
    if imatrix is not None:
        yield _step("imatrix", imatrix, _collection(imatrix, source))
    for name, record in levels.items():
        yield _step(name, record, bare_command(record.command, location))
    for what, title in ((EVALUATE, "evaluation"), (COMPARE, "comparison without imatrix"), (ANSWER, "answers")):
        steps = [found for name in levels if (found := journal.get(f"{what} {name}")) is not None]
        steps += _references(journal, steps) if what == EVALUATE else []
        if any(found.seconds for found in steps):
            last = max(steps, key=lambda found: found.finished)
            seconds = sum(found.seconds for found in steps)
            yield ReportStep(title, seconds, last.finished, bare_command(last.command, location))


def _references(journal: Journal, measured: Sequence[Record]) -> list[Record]:
    """The passes of the source that these were measured with."""
    found = [record for step, record in journal.steps().items() if step.startswith(f"{REFER} ")]
    return [each for each in found if any(each.inputs.items() <= record.inputs.items() for record in measured)]


def _step(what: str, record: Record, command: str) -> ReportStep:
    return ReportStep(what, record.seconds, record.finished, command)


def _conversion(record: Record, model: ReportModel) -> str:
    directory, out = last_part(model.repo or model.origin) or "MODEL", record.output.name
    return shlex.join(["convert_hf_to_gguf.py", directory, "--outfile", out, "--outtype", record.inputs["outtype"]])


def _collection(record: Record, source: str) -> str:
    """From the inputs, which are spelt as llama-imatrix's options; how often it saved on the way decides nothing."""
    dataset, inputs = record.facts_as(CollectedFacts).dataset, record.inputs
    limit, _, rest = inputs["chunks"].partition(" from ")
    first, *flags = rest.split() or ["0"]
    options = inputs["options"].removesuffix(f"name {dataset}").split()
    files = ["-f", dataset, "-o", last_part(record.output.name), "-c", inputs["context"]]
    files += ["--chunks", limit] if limit != "all" else []
    files += ["--chunk", first] if first != "0" else []
    ours = any(flag in _BEYOND_LLAMA for flag in flags)
    program = ["imatrix-runner", "imatrix", "generate", source] if ours else ["llama-imatrix", "-m", source]
    return shlex.join([printable(word) for word in (*program, *files, *(flags if ours else ()), *options)])


def bare_command(command: str, source: str = "") -> str:
    """A command without anybody's folders: files by name, as if they lay where it is typed. ``source``: what else is a path.

    A hub id stays as it is. Empty if the line is not one a shell would take.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    if words[:1] == ["cd"] and words[2:3] == ["&&"]:
        words = words[3:]
    return shlex.join([printable(_bare(word, source)) for word in words])


def _bare(word: str, source: str) -> str:
    option, equals, value = word.partition("=")
    if word.startswith("-") and equals:
        return f"{option}={_bare(value, source)}"
    deep = word.count("/") > 1 and not set(word) & set("@:=()[]*|")
    path = word == source or _ABSOLUTE.match(word) or deep or ("/" in word and ":" not in word and _FILE.fullmatch(word))
    return last_part(word) or word if path else word
