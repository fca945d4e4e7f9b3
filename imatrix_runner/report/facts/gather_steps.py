"""Lists the steps that made a workspace's files: what was made, how long it took, and the command that repeats it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from imatrix_runner.imatrix.collection_facts import CollectedFacts, ImatrixInputs
from imatrix_runner.journal import Journal, StepRecord, command_line
from imatrix_runner.mixes.mix_facts import MixFacts
from imatrix_runner.report.document import ReportModel, ReportStep
from imatrix_runner.report.facts.gather_model import PROJECTOR, last_part
from imatrix_runner.safe_text import printable
from imatrix_runner.steps import Kind, step_id

_FILE = re.compile(r".+\.(gguf|dat|imatrix|txt|jsonl?|csv|parquet|toml)", re.IGNORECASE)
_ABSOLUTE = re.compile(r"[/~]|\.{1,2}[/\\]|[A-Za-z]:[\\/]|\\\\")
_MEASUREMENTS: dict[Kind, str] = {
    "evaluate": "evaluation",
    "compare": "comparison without imatrix",
    "answer": "answers",
    "tasks": "tasks",
}
_BEYOND_LLAMA = ("--until-converged", "--min-expert-tokens")
"""Options that llama-imatrix lacks: with them, the command shown is imatrix-runner's."""


def describe_steps(
    journal: Journal, levels: Mapping[str, StepRecord], imatrix: StepRecord | None, model: ReportModel, location: str
) -> tuple[ReportStep, ...]:
    """The steps in the order in which they were finished. ``levels`` and ``imatrix``: the records of what the report contains;
    ``location``: the model's path if it was named by one, else empty."""
    return tuple(sorted(_steps(journal, levels, imatrix, model, location), key=lambda step: step.finished))


def _steps(
    journal: Journal, levels: Mapping[str, StepRecord], imatrix: StepRecord | None, model: ReportModel, location: str
) -> Iterator[ReportStep]:
    source = next((file.name for file in model.files if not file.name.startswith(PROJECTOR)), "MODEL")
    for outtype, record in journal.of_kind("convert").items():
        if any(output.name == source for output in record.outputs):
            yield _step("conversion", record, _conversion(record, model, outtype))
    if imatrix is not None:
        command = bare_commands(imatrix.commands or [_collection(imatrix, source)], location)
        yield _step("imatrix", imatrix, command)
    for target, record in journal.of_kind("mix").items():
        if record.facts_as(MixFacts).level in levels:
            yield _step(f"types of {target}", record, "")
    for name, record in levels.items():
        yield _step(name, record, bare_commands(record.commands, location))
    for what, title in _MEASUREMENTS.items():
        steps = [found for name in levels if (found := journal.get(step_id(what, name))) is not None]
        steps += _references(journal, steps) if what == "evaluate" else []
        if any(found.seconds for found in steps):
            last = max(steps, key=lambda found: found.finished)
            seconds = sum(found.seconds for found in steps)
            yield ReportStep(title, seconds, last.finished, bare_commands(last.commands, location))


def _references(journal: Journal, measured: Sequence[StepRecord]) -> list[StepRecord]:
    """The records of the reference that these levels were measured with."""
    found = journal.of_kind("reference").values()
    return [each for each in found if any(each.inputs.items() <= record.inputs.items() for record in measured)]


def _step(what: str, record: StepRecord, command: str) -> ReportStep:
    return ReportStep(what, record.seconds, record.finished, command)


def _conversion(record: StepRecord, model: ReportModel, outtype: str) -> str:
    directory, out = last_part(model.repo or model.origin) or "MODEL", record.output.name
    return command_line([["convert_hf_to_gguf.py", directory, "--outfile", out, "--outtype", outtype]])


def _collection(record: StepRecord, source: str) -> list[str]:
    """The command of a record without one, which earlier versions wrote, rebuilt from its inputs. These are llama-imatrix's
    options in one string, so a value with spaces is split."""
    dataset, inputs = record.facts_as(CollectedFacts).dataset, record.inputs_as(ImatrixInputs)
    limit, _, rest = inputs.chunks.partition(" from ")
    first, *flags = rest.split() or ["0"]
    options = inputs.options.removesuffix(f"name {dataset}").split()
    files = ["-f", dataset, "-o", last_part(record.output.name), "-c", inputs.context]
    files += ["--chunks", limit] if limit != "all" else []
    files += ["--chunk", first] if first != "0" else []
    ours = any(flag in _BEYOND_LLAMA for flag in flags)
    program = ["imatrix-runner", "imatrix", "generate", source] if ours else ["llama-imatrix", "-m", source]
    return [*program, *files, *(flags if ours else ()), *options]


def bare_commands(commands: Sequence[Sequence[str]], source: str = "") -> str:
    """A command line without folders: files are given by name, as if all were in the current directory. ``source``: a further
    word that is a path. Hub ids stay as they are; ``cd`` commands are dropped.
    """
    shown = [words for words in commands if words and words[0] != "cd"]
    return command_line([[printable(_bare(word, source)) for word in words] for words in shown])


def _bare(word: str, source: str) -> str:
    option, equals, value = word.partition("=")
    if word.startswith("-") and equals:
        return f"{option}={_bare(value, source)}"
    deep = word.count("/") > 1 and not set(word) & set("@:=()[]*|")
    path = word == source or _ABSOLUTE.match(word) or deep or ("/" in word and ":" not in word and _FILE.fullmatch(word))
    return last_part(word) or word if path else word
