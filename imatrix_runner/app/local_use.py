"""Writes what other programs need to run a finished level where it is: a Modelfile for Ollama next to each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from imatrix_runner.chat.linear_format import LinearFormat, linear_format
from imatrix_runner.chat.templates import ChatTemplate, load_template
from imatrix_runner.errors import InvalidDataError, NoSpaceError, from_os_error
from imatrix_runner.evaluate.measurements import levels_made
from imatrix_runner.events import Sink, detail, warning
from imatrix_runner.files import discard, part_path, stamp
from imatrix_runner.journal import Journal, StepOutput, StepRecord, differences, is_intact, outputs_intact
from imatrix_runner.models.gguf_file import GgufHeader, LongArray, long_array, read_header
from imatrix_runner.process import Runner
from imatrix_runner.report.views.modelfile import ModelfileFacts, render_modelfile, stops_of
from imatrix_runner.report.views.running import ollama_name
from imatrix_runner.steps import Inputs, step_id
from imatrix_runner.workspace import Workspace

FORM = "1"
"""Version of the Modelfiles' form: another one writes them anew."""

_TOKENS = "tokenizer.ggml.tokens"
_ENDS = ("eos", "eot", "eom")


class ModelfileInputs(Inputs, frozen=True):
    """``level_file``: the SHA-256 of the level's first file; ``form``: :data:`FORM`."""

    level_file: str
    form: str


class _Spoken(NamedTuple):
    """What the levels of one model have in common."""

    template: bool
    format: LinearFormat | None
    bos: str


def write_modelfiles(workspace: Workspace, journal: Journal, runner: Runner, sink: Sink) -> dict[str, Path]:
    """Write the missing Modelfiles of finished levels; return all by level. The caller holds the workspace's lock.

    Ollama takes no level in shards. A file that was edited, or is somebody's, stays as it is; one of a level that is gone goes,
    too. Nothing that goes wrong here is an error of the run.
    """
    _remove_orphans(workspace, journal)
    found: dict[str, Path] = {}
    spoken: _Spoken | None = None
    for name in levels_made(journal):
        level, path = journal.get(step_id("level", name)), workspace.modelfile(name)
        if level is None or len(level.outputs) != 1 or not is_intact(level.outputs[0], workspace.root):
            continue
        file = workspace.root / level.outputs[0].name
        inputs = ModelfileInputs(level_file=level.outputs[0].sha256, form=FORM).named()
        record = journal.get(step_id("modelfile", name))
        if path.exists():
            found[name] = path
            if record is None or not _is_ours(path, record, workspace) or not differences(record, inputs):
                continue
        try:
            header = read_header(file)
            spoken = spoken or _spoken(file, header, runner, sink)
            text = render_modelfile(_facts(file, header, workspace.model, name, spoken), path.name)
            _write(journal, step_id("modelfile", name), path, text, inputs)
            found[name] = path
        except (InvalidDataError, NoSpaceError) as error:
            sink(warning(f"No Modelfile for {name}: {error.sentence()}"))
    return found


def _remove_orphans(workspace: Workspace, journal: Journal) -> None:
    """Remove Modelfiles, as they were written here, whose levels were removed."""
    for name, record in journal.of_kind("modelfile").items():
        level = journal.get(step_id("level", name))
        gone = level is not None and not any((workspace.root / output.name).exists() for output in level.outputs)
        if gone and _is_ours(workspace.modelfile(name), record, workspace):
            discard(workspace.modelfile(name))


def _is_ours(path: Path, record: StepRecord, workspace: Workspace) -> bool:
    """Whether a file is the record's, unchanged, and lies in the workspace itself. Journals may come from elsewhere."""
    named = [output.name for output in record.outputs] == [path.name] and path.parent == workspace.root
    return named and outputs_intact(record, workspace.root)


def _write(journal: Journal, step: str, path: Path, text: str, inputs: dict[str, str]) -> None:
    began, part, content = time.monotonic(), part_path(path), text.encode()
    try:
        part.write_bytes(content)
        output = StepOutput(path.name, stamp(part), hashlib.sha256(content).hexdigest())
        record = StepRecord.now(inputs, [output], "there was none, or the level changed", time.monotonic() - began)
        journal.conclude(step, record, [(part, path)])
    except OSError as error:
        raise from_os_error(error, "writing a Modelfile", path) from error
    finally:
        discard(part)


def _spoken(file: Path, header: GgufHeader, runner: Runner, sink: Sink) -> _Spoken:
    """What the file's chat template says, as far as it can be said elsewhere."""
    if not any(key.startswith("tokenizer.chat_template") for key in header.metadata):
        return _Spoken(False, None, "")
    try:
        template = load_template(file)
    except InvalidDataError as error:
        sink(detail(f"The Modelfiles have no TEMPLATE: {error}."))
        return _Spoken(True, None, "")
    return _Spoken(True, linear_format(template, runner), template.bos if _begins_itself(header, template) else "")


def _begins_itself(header: GgufHeader, template: ChatTemplate) -> bool:
    """Whether llama.cpp puts BOS before a prompt of this vocabulary by itself."""
    said = header.metadata.get("tokenizer.ggml.add_bos_token")
    if isinstance(said, bool):
        return said
    pre = header.text("tokenizer.ggml.pre") or ""
    return bool(template.bos) and (header.text("tokenizer.ggml.model") == "llama" or pre.startswith("llama"))


def _facts(file: Path, header: GgufHeader, model: str, level: str, spoken: _Spoken) -> ModelfileFacts:
    if not file.name.isprintable():
        raise InvalidDataError(f"{file.name} cannot be named in a Modelfile", "its name has control characters", "Rename it.")
    architecture = header.text("general.architecture") or ""
    return ModelfileFacts(
        file=file.name,
        name=ollama_name(model, level),
        context=header.integer(f"{architecture}.context_length"),
        stops=stops_of([*_ending_tokens(header)]),
        has_template=spoken.template,
        format=spoken.format,
        drops_begin=spoken.bos,
    )


def _ending_tokens(header: GgufHeader) -> Iterator[str]:
    """The texts of the tokens with which the vocabulary says that an answer ends."""
    ids = [header.integer(f"tokenizer.ggml.{end}_token_id") for end in _ENDS]
    kept = header.metadata.get(_TOKENS)
    tokens: Sequence[object] | None = None
    if any(number is not None for number in ids):
        found = long_array(header.path, _TOKENS) if isinstance(kept, LongArray) else kept
        tokens = found if isinstance(found, tuple) else None
    for number in ids:
        if tokens is not None and number is not None and 0 <= number < len(tokens) and isinstance(tokens[number], str):
            yield str(tokens[number])
