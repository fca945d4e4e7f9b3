"""``--domain``: source and levels answer somebody's own prompts, and how far the answers agree."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from imatrix_runner.chat.templates import ChatTemplate
from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.documents.documents import DocumentRecord as Asked
from imatrix_runner.documents.manifest import find_manifest
from imatrix_runner.engines.abilities import Answerer
from imatrix_runner.engines.files.completions import read_completions
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.measures import AnswerJob, Completion
from imatrix_runner.errors import InterruptedRunError, InvalidDataError, NoSpaceError, RunnerError, UsageError
from imatrix_runner.evaluate.answer_agreement import DomainResult, compare_answers, empty_answers
from imatrix_runner.evaluate.held_out import calibrations_of
from imatrix_runner.evaluate.measure import once
from imatrix_runner.evaluate.measurements import answered
from imatrix_runner.evaluate.prompts import describe, read_prompts, template_of, write_prompts
from imatrix_runner.events import Finished, Progress, Started, info, warning
from imatrix_runner.files import atomic_writer, encode_json, sha256
from imatrix_runner.fingerprints import counted_apart, fingerprint_of, harmless, spelt
from imatrix_runner.journal import StepRecord, differences
from imatrix_runner.models.model import Model
from imatrix_runner.steps import LEVEL_INPUT, MODEL_INPUT, step_id

_SOURCE = "source"


@dataclass(frozen=True)
class DomainRequest:
    """``prompts``: a file of them; answers of at most ``n_predict`` tokens. ``chat_template``: a file in place of the model's
    own. ``again``: levels answer anew, whatever is known."""

    prompts: Path = field(metadata=counted_apart("the input 'prompts'"))
    n_predict: int = field(default=128, metadata=spelt("--predict", always=True))
    options: CollectOptions = field(default_factory=CollectOptions, metadata=counted_apart("the words after --predict"))
    chat_template: Path | None = field(default=None, metadata=counted_apart("the input 'template'"))
    again: bool = field(default=False, metadata=harmless("the same answers come again"))


def answer_levels(
    request: DomainRequest, frozen: Frozen, levels: Sequence[tuple[str, Path, str]], session: Session, folder: Path
) -> dict[str, DomainResult | RunnerError]:
    """How far each level's answers are its source's, or why there is no telling; ``levels`` are name, first file and content
    (``sha256:…``). Answers lie in ``folder``, and what is recorded in the journal and still holds is not computed again.

    Raises :class:`UsageError` without the embedded engine, ``InvalidDataError`` for prompts that are none, and whatever keeps
    the source from answering.
    """
    answerer, asked = check_answerable(request, session)
    template = template_of(frozen.model, request.chat_template)
    return _Answering(request, asked, template, frozen, session, answerer, folder).run(levels)


def check_answerable(request: DomainRequest, session: Session) -> tuple[Answerer, list[Asked]]:
    """What answers and the prompts, or why there can be no answers: known before anything else is measured."""
    engine = session.engine
    if engine.answerer is None:
        raise UsageError(
            "Answers can only be compared by the embedded engine",
            f"this is the {engine.name} engine, and llama.cpp's programs do not tell the tokens of an answer",
            "Leave --engine out, or --domain.",
        )
    return engine.answerer, read_prompts(request.prompts)


def check_prompts(request: DomainRequest, model: Model, session: Session) -> None:
    """Write the prompts down for ``model`` and count their tokens, before anything is made or measured.

    Raises what :func:`check_answerable` raises, and :class:`InvalidDataError` for a template that does not work or a prompt for
    which the model's context is too short.
    """
    answerer, asked = check_answerable(request, session)
    _refuse_calibrated(request, asked, session)
    template = template_of(model, request.chat_template)
    prompts = write_prompts(asked, template, session.runner)
    texts = [prompt.text for prompt in prompts]
    found = answerer.tokenise(model.path, texts, parse_special=template is not None, log=session.log("tokenize"))
    context = model.header.integer(f"{model.architecture}.context_length")
    for record, length in zip(asked, found.lengths.tolist(), strict=True):
        if context is not None and length + request.n_predict > context:
            raise InvalidDataError(
                f"{record.where} is too long for {model.name}",
                f"it has {length} tokens, the answer may have {request.n_predict}, "
                f"and the model was made for {context} together",
                "Shorten or remove it, or ask for shorter answers with --predict.",
            )


def _refuse_calibrated(request: DomainRequest, asked: Sequence[Asked], session: Session) -> None:
    """Raise :class:`InvalidDataError` for a prompt that the model itself answered for a calibration text of this workspace."""
    for path in calibrations_of(session):
        manifest = find_manifest(path)
        if manifest is None or manifest.self_made is None:
            continue
        text = _plain(path.read_text(encoding="utf-8", errors="replace"))
        same = [record.where for record in asked if isinstance(record.content, str) and _plain(record.content) in text]
        if same:
            more = f" (and {len(same) - 1} more)" if len(same) > 1 else ""
            raise InvalidDataError(
                f"{request.prompts.name} cannot be compared on",
                f"{same[0]} is in {path.name}, which the imatrix was collected from{more}",
                "Leave these prompts out, or build the calibration text from others (--evaluation names those to keep apart).",
            )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class _Answering:
    request: DomainRequest
    asked: list[Asked]
    template: ChatTemplate | None
    frozen: Frozen
    session: Session
    answerer: Answerer
    folder: Path

    def run(self, levels: Sequence[tuple[str, Path, str]]) -> dict[str, DomainResult | RunnerError]:
        known = answered(self.session.journal)
        reasons = {name: self._reason(name, content) for name, _, content in levels}
        todo = [level for level in levels if reasons[level[0]] or level[0] not in known]
        found: dict[str, DomainResult | RunnerError] = {}
        source = self._source() if todo else []
        said: set[str] = set()
        for name, file, content in levels:
            if (name, file, content) not in todo:
                found[name] = known[name]
            else:
                outcome = self._level(name, file, content, source, reasons[name] or "not answered yet", said)
                found[name] = outcome
        return found

    @cached_property
    def _inputs(self) -> dict[str, str]:
        return {
            MODEL_INPUT: self.frozen.fingerprint,
            "prompts": f"sha256:{sha256(self.request.prompts)}",
            "template": f"sha256:{self.template.sha256}" if self.template is not None else "none",
            "options": " ".join((fingerprint_of(self.request, "answers"), fingerprint_of(self.request.options, "answers"))),
            "engine": self.session.engine.arithmetic(),
        }

    def _reason(self, name: str, content: str) -> str:
        """Why a level must answer; empty if what is recorded holds."""
        before = self.session.journal.get(step_id("answer", name))
        if before is None:
            return "not answered yet"
        changed = differences(before, {**self._inputs, LEVEL_INPUT: content})
        return f"changed: {', '.join(changed)}" if changed else ("asked for" if self.request.again else "")

    def _source(self) -> list[Completion]:
        model, sink = self.frozen.model, self.session.sink
        if self.template is None:
            sink(info(f"{model.name} has no chat template: it goes on from each prompt as plain text."))
        self._write()
        step = step_id("answer", _SOURCE)
        completions = self._complete(step, f"{_SOURCE} answers", model.path, self.frozen.fingerprint, _SOURCE)
        self.frozen.check_unchanged()
        sink(Finished(step, "done", f"{len(completions)} answers"))
        self._check_answers(completions)
        return completions

    def _check_answers(self, completions: list[Completion]) -> None:
        """Raise :class:`InvalidDataError` where the source says nothing, which every level would match."""
        empty, name = empty_answers(completions), self.frozen.model.name
        if empty == len(completions):
            raise InvalidDataError(
                f"Answers of {name} cannot be compared",
                "the source ends every answer at once, so any level that does so would agree completely",
                "Check the prompts and the chat template (--chat-template-file).",
            )
        if empty:
            self.session.sink(warning(f"{name} answers nothing to {empty} of {len(completions)} prompts."))

    def _level(
        self, name: str, file: Path, content: str, source: list[Completion], reason: str, said: set[str]
    ) -> DomainResult | RunnerError:
        """The answers of one level, or why there are none; ``said`` are the reasons that levels before gave."""
        step, sink, began = step_id("answer", name), self.session.sink, time.monotonic()
        try:
            answers = self._complete(step, f"{name} answers", file, content, name)
        except (InterruptedRunError, NoSpaceError):
            raise
        except RunnerError as error:
            sink(Finished(step, "failed", once(error.why, said), time.monotonic() - began))
            return error
        shown = [describe(record) for record in self.asked]
        result = compare_answers(name, shown, source, answers, self.request.n_predict)
        sink(Finished(step, "done", summary(result), time.monotonic() - began))
        inputs = {**self._inputs, LEVEL_INPUT: content}
        record = StepRecord.now(inputs, [], reason, time.monotonic() - began, commands=[self._command()], facts=result)
        self.session.journal.record(step, record)
        return result

    def _command(self) -> list[str]:
        """The words of the command that asks all levels again."""
        request = self.request
        words = ["imatrix-runner", "evaluate", self.frozen.model.source.location, "--domain", str(request.prompts)]
        words += ["--predict", str(request.n_predict)]
        words += ["--chat-template-file", str(request.chat_template)] if request.chat_template is not None else []
        return words

    @property
    def _prompts(self) -> Path:
        return self.folder / "prompts.jsonl"

    def _write(self) -> None:
        """The prompts as the models read them, for the worker."""
        total, sink = len(self.asked), self.session.sink
        sink(Started("prompts", f"writing down {total} prompts", total))
        heard = write_prompts(
            self.asked, self.template, self.session.runner, lambda done: sink(Progress("prompts", done, total))
        )
        with atomic_writer(self._prompts) as handle:
            handle.writelines(encode_json(prompt) + b"\n" for prompt in heard)
        sink(Finished("prompts", "done"))

    def _complete(self, step: str, title: str, model: Path, content: str, name: str) -> list[Completion]:
        """A model's answers to all prompts, from where they lie already or the engine."""
        out = self.folder / f"{name}.answers"
        whole = {**self._inputs, MODEL_INPUT: content, "prompts": sha256(self._prompts)}
        fingerprint = encode_json(whole).decode()
        if self.request.again:
            out.unlink(missing_ok=True)
        completions = read_completions(out, fingerprint)
        self.session.sink(Started(step, title, len(self.asked), "prompts"))
        if len(completions) < len(self.asked):
            log = self.session.log(step.replace(" ", "-"))
            options, n_predict = self.request.options, self.request.n_predict
            self.answerer.answer(
                AnswerJob(step, model, self._prompts, out, n_predict, options, fingerprint, log), self.session.sink
            )
            completions = read_completions(out, fingerprint)
        return completions


def summary(result: DomainResult) -> str:
    """One line for people."""
    return (
        f"{result.same:.0%} of the answers are the source's, {result.shared:.0%} of their tokens, "
        f"and half of them for at least {result.agreement_median:g} tokens"
    )
