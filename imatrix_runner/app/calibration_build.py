"""``calibration build``: open the sources, find the tokenizer and the template, build, and write the text and its manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from imatrix_runner.app.calibration_self import SelfMade, SelfRequest, answer_prompts
from imatrix_runner.calibration.build.build_text import Builder, BuildOptions, Built, Near, Rendered
from imatrix_runner.calibration.build.open_sources import SourceOpener
from imatrix_runner.calibration.tokenisers import find_tokeniser, tokenizer_files
from imatrix_runner.chat.rendering import DATE, Unrendered, render
from imatrix_runner.chat.templates import ChatTemplate, load_template
from imatrix_runner.context.context import Context
from imatrix_runner.documents.documents import BadRecord, Conversation, DocumentRecord
from imatrix_runner.documents.manifest import TemplateFacts, held_out_path, manifest_path
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.events import Saved
from imatrix_runner.extras import CALIBRATION
from imatrix_runner.files import atomic_writer, encode_json, require_space
from imatrix_runner.process import Runner
from imatrix_runner.scratch import scratch_folder


@dataclass(frozen=True)
class CalibrationRequest:
    """``model``: a GGUF, a Hugging Face directory or a hub id; its tokenizer counts tokens, its template renders conversations.

    ``options.tokens`` is the budget. ``field``: take this field of every record as plain text. ``force`` overwrites ``out``.
    ``own``: the model's own answers are a source, too.
    """

    sources: tuple[str, ...]
    out: Path
    options: BuildOptions
    model: str = ""
    chat_template: Path | None = None
    template_name: str = ""
    field: str = ""
    offline: bool = False
    force: bool = False
    own: SelfRequest | None = None


@dataclass(frozen=True)
class BuildResult:
    """The built text, and where it and its manifest are written (not in a dry run)."""

    built: Built
    path: Path
    manifest_path: Path

    @property
    def held_out_path(self) -> Path | None:
        """Path of the held-out text; None if no part was held out."""
        return held_out_path(self.path) if self.built.held_out else None


def build(request: CalibrationRequest, context: Context, *, dry_run: bool = False) -> BuildResult:
    """Build a calibration text and its manifest. Raises :class:`RunnerError`; nothing is written in that case."""
    CALIBRATION.require("Building a calibration text")
    _check(request)
    out = request.out.expanduser().absolute()
    _check_place(out, force=request.force, held_out=request.options.held_out > 0)
    runner = Runner(context.stop)
    with scratch_folder() as scratch:
        opener = SourceOpener(context, scratch, request.field, request.offline)
        sources = [opener.open(argument) for argument in request.sources]
        _check_inputs(out, opener.paths)
        own = (
            answer_prompts(request.own, Path(request.model).expanduser(), request.chat_template, out, context)
            if request.own
            else None
        )
        if own is not None:
            sources.append(own.source)
        model = tokenizer_files(request.model, context, offline=request.offline) if request.model else None
        builder = Builder(
            sources,
            request.options,
            tokeniser=find_tokeniser(model, runner) if model is not None else None,
            render=partial(_render, request, model, runner, own),
            near=_near(request.options.near_duplicates),
            sink=context.sink,
            stop=context.stop,
            model=Path(request.model).name,
        )
        built = builder.build()
    manifest = msgspec.structs.replace(built.manifest, text=out.name, self_made=own.facts if own is not None else None)
    result = BuildResult(replace(built, manifest=manifest), out, manifest_path(out))
    if not dry_run:
        _write(result)
        context.sink(Saved(str(out), "calibration text", manifest.bytes))
        for path in own.left if own is not None else ():
            path.unlink(missing_ok=True)
    return result


def _check(request: CalibrationRequest) -> None:
    options = request.options
    if not request.sources and request.own is None:
        raise UsageError("There is nothing to build a text from", "no SOURCE was given", "Name sources, or add --self.")
    if request.own is not None and not request.model:
        raise UsageError("--self needs a model", "its own answers are the text", "Add --model with its GGUF.")
    if not request.model and (options.tokens is not None or options.aligned):
        what = "--align" if options.aligned else "A budget of chunks or tokens"
        why, todo = "tokens are counted with the model's own tokenizer", "Add --model with its GGUF or directory."
        raise UsageError(f"{what} needs a model", why, todo)
    if request.chat_template is not None and not request.chat_template.is_file():
        raise UsageError(f"{request.chat_template} does not exist", "it was given as the chat template", "Check the path.")


def _check_place(out: Path, *, force: bool, held_out: bool) -> None:
    for path in (out, manifest_path(out), *([held_out_path(out)] if held_out else [])):
        if path.is_dir():
            raise InvalidDataError(f"{path} is a folder", "the text would be written there", "Choose another name with -o.")
        if path.exists() and not force:
            raise InvalidDataError(
                f"{path} already exists", "existing files are not overwritten", "Choose another name, or add --force."
            )


def _check_inputs(out: Path, paths: Sequence[Path]) -> None:
    for path in paths:
        inside = path.is_dir() and out.parent.resolve().is_relative_to(path.resolve())
        if inside or (out.exists() and path.exists() and out.samefile(path)):
            raise InvalidDataError(
                f"{out} is {'inside' if inside else 'itself'} one of the sources",
                "the text would become a source of the next one" if inside else "it would be overwritten while it is read",
                "Choose another place with -o.",
            )


def _near(threshold: float) -> Callable[[], Near] | None:
    """Return a factory of near-duplicate detectors, one for each attempt at choosing documents; None if ``threshold`` is 0."""

    def make() -> Near:
        from imatrix_runner.calibration.build.duplicates import NearDuplicates

        near = NearDuplicates(threshold)
        return lambda text: near.add(text) is not None

    return make if threshold > 0 else None


def _render(
    request: CalibrationRequest,
    model: Path | None,
    runner: Runner,
    own: SelfMade | None,
    records: Sequence[DocumentRecord],
    on_progress: Callable[[int], None],
) -> Rendered:
    """The model's own answers keep the text that it read and wrote; other conversations are rendered."""
    template = _template(request, model, records[0]) if own is None else own.template
    ready = own.texts if own is not None else {}
    others = [record for record in records if record.where not in ready]
    conversations = [record.content for record in others if isinstance(record.content, Conversation)]
    found = render(template, conversations, runner, date=DATE, on_progress=on_progress)
    texts: dict[str, str | BadRecord] = dict(ready)
    for record, text in zip(others, found, strict=True):
        texts[record.where] = BadRecord(record.where, text.why, text.todo) if isinstance(text, Unrendered) else text
    return Rendered([texts[record.where] for record in records], TemplateFacts(template.sha256, template.origin, DATE))


def _template(request: CalibrationRequest, model: Path | None, record: DocumentRecord) -> ChatTemplate:
    if model is None:
        raise UsageError(
            f"{record.where} is a conversation, and no model was given to render it",
            "every model has its own chat template; with another one, the text would hold what the model never sees",
            "Give the model with --model, or take one field as plain text with --field.",
        )
    return load_template(model, request.chat_template, request.template_name)


def _write(result: BuildResult) -> None:
    """Write the manifest first: without it, the text's special tokens would not be parsed."""
    data = result.built.text.encode()
    require_space(result.path, 2 * len(data) + len(result.built.held_out) + (1 << 20), "the calibration text")
    with atomic_writer(result.manifest_path) as handle:
        handle.write(msgspec.json.format(encode_json(result.built.manifest, order="deterministic"), indent=1) + b"\n")
    if result.held_out_path is not None:
        with atomic_writer(result.held_out_path) as handle:
            handle.write(result.built.held_out.encode())
    with atomic_writer(result.path) as handle:
        handle.write(data)
