"""``calibration build --self``: a model's own answers to prompts, as documents of a calibration text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from imatrix_runner.calibration.build.build_text import OpenedSource
from imatrix_runner.calibration.inspect.overlap import overlap, verdict
from imatrix_runner.chat.templates import ChatTemplate
from imatrix_runner.context.context import Context
from imatrix_runner.context.engine_choice import Machine, make_embedded
from imatrix_runner.documents.documents import Conversation, DocumentRecord
from imatrix_runner.documents.manifest import SelfFacts
from imatrix_runner.engines.abilities import Answerer
from imatrix_runner.engines.files.completions import read_completions
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.measures import AnswerJob, Completion, Prompt, Sampling
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.evaluate.prompts import describe, read_prompts, template_of, write_prompts
from imatrix_runner.events import Finished, Sink, Started, warning
from imatrix_runner.files import atomic_writer, encode_json, sha256
from imatrix_runner.fingerprints import fingerprint_of
from imatrix_runner.models.gguf_file import MAGIC
from imatrix_runner.models.model import Model, open_gguf
from imatrix_runner.process import Runner
from imatrix_runner.resources import HELD_OUT_TEXT, SELF_PROMPTS, resource

SHIPPED = "shipped"
"""The word for this program's own list of prompts."""

SOURCE = "self"


@dataclass(frozen=True)
class SelfRequest:
    """``prompts``: a file of them, or :data:`SHIPPED`. Each is answered once greedily, and ``sampled`` times at ``temperature``
    and ``top_p``, in ``n_predict`` tokens at most. ``evaluation``: prompts or texts to measure on later, with which nothing may
    be in common."""

    prompts: str
    n_predict: int = 256
    sampled: int = 1
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 1
    evaluation: tuple[Path, ...] = ()
    options: CollectOptions = field(default_factory=CollectOptions)

    @property
    def file(self) -> Path:
        return resource(SELF_PROMPTS) if self.prompts == SHIPPED else Path(self.prompts).expanduser()


@dataclass(frozen=True)
class SelfMade:
    """Answers as a source of documents. ``texts``: what the model read and wrote, by the place of its document; ``template``:
    that its conversations are rendered with; ``facts`` for the manifest; ``left``: files to remove once the text is written."""

    source: OpenedSource
    texts: Mapping[str, str]
    template: ChatTemplate
    facts: SelfFacts
    left: tuple[Path, ...]


def answer_prompts(request: SelfRequest, model: Path, chat_template: Path | None, out: Path, context: Context) -> SelfMade:
    """Let ``model``, a GGUF, answer the prompts. Answers lie next to ``out`` until the text is written; the same request
    continues after an interruption.

    Raises :class:`UsageError` for a model that is no GGUF; :class:`InvalidDataError` for prompts that cannot be used, for such
    as are to be measured on later, for a model without a chat template, and for one that answers nothing.
    """
    _check_model(model)
    asked = read_prompts(request.file)
    refuse_overlap(asked, (resource(HELD_OUT_TEXT), *request.evaluation))
    runner = Runner(context.stop)
    opened = open_gguf(model, allow_requantize=True)
    template = template_of(opened, chat_template)
    if template is None:
        raise InvalidDataError(
            f"{model.name} has no chat template",
            "its answers would be texts of a form that it is not used with",
            "Give its template with --chat-template-file, or calibrate a base model with texts.",
        )
    prompts = write_prompts(asked, template, runner)
    engine = make_embedded(Machine(None), runner, "--self")
    answering = _Answering(request, opened, prompts, template, engine.answerer, engine.arithmetic(), out, context.sink)
    return answering.made(asked)


def refuse_overlap(asked: Sequence[DocumentRecord], evaluation: Sequence[Path]) -> None:
    """Raise :class:`InvalidDataError` if a prompt is among those of an evaluation, or if what they have in common is more than
    set phrases: a fifth of its prompts, which may share a system message, or a hundredth of a text."""
    mine = {_plain(describe(record)): record.where for record in asked}
    joined = "\n\n".join(describe(record) for record in asked)
    for path in evaluation:
        if not path.is_file():
            raise UsageError(f"There is no file {path}", "it was given with --evaluation", "Check the path.")
        is_text = path.suffix.lower() == ".txt"
        if not is_text:
            same = [mine[text] for record in read_prompts(path) if (text := _plain(describe(record))) in mine]
            if same:
                raise _overlapping(f"{same[0]} is a prompt of {path.name}, too", len(same))
        found = overlap(joined, path.read_text(encoding="utf-8", errors="replace"))
        if verdict(found) in (("some", "void") if is_text else ("void",)):
            raise _overlapping(f"it has a passage of {path.name}: {found.example[:80]!r}", 1)


def _overlapping(why: str, number: int) -> InvalidDataError:
    return InvalidDataError(
        "Prompts for calibration may not be those of an evaluation",
        why + (f" (and {number - 1} more)" if number > 1 else ""),
        "Remove them from one of the files: levels look better than they are on what they were calibrated with.",
    )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _check_model(model: Path) -> None:
    is_gguf = False
    if model.is_file():
        with model.open("rb") as handle:
            is_gguf = handle.read(len(MAGIC)) == MAGIC
    if not is_gguf:
        raise UsageError(
            "--self needs a GGUF to answer",
            f"{model} is none" if model.exists() else f"there is no file {model}",
            "Convert it first (imatrix-runner run MODEL makes one), and give that with --model.",
        )


@dataclass(frozen=True)
class _Answering:
    request: SelfRequest
    model: Model
    prompts: Sequence[Prompt]
    template: ChatTemplate
    answerer: Answerer
    engine: str
    out: Path
    sink: Sink

    def made(self, asked: Sequence[DocumentRecord]) -> SelfMade:
        content = f"sha256:{sha256(self.model.path)}"
        file = self.out.with_name(f"{self.out.name}.prompts.jsonl")
        with atomic_writer(file) as handle:
            handle.writelines(encode_json(prompt) + b"\n" for prompt in self.prompts)
        rounds: list[tuple[str, list[Completion]]] = []
        left = [file]
        for number in range(1 + self.request.sampled):
            name = "greedy" if number == 0 else f"sampled {number}"
            path = self.out.with_name(f"{self.out.name}.answers-{number}")
            left.append(path)
            rounds.append((name, self._answers(name, number, path, file, content)))
        records, texts = self._documents(asked, rounds)
        n_all = len(self.prompts) * len(rounds)
        if not records:
            raise InvalidDataError(
                f"{self.model.name} answers nothing",
                f"it ends all {n_all} answers at once",
                "Check the model and its chat template (--chat-template-file), or calibrate with texts.",
            )
        if empty := n_all - len(records):
            self.sink(warning(f"{self.model.name} gives no answer {empty} of {n_all} times; these are left out."))
        request = self.request
        facts = SelfFacts(
            model=content,
            prompts=f"sha256:{sha256(request.file)}",
            engine=self.engine,
            answers=len(records),
            sampled=sum(not record.where.endswith("greedy") for record in records),
            empty=empty,
            seed=request.seed,
            temperature=request.temperature,
            top_p=request.top_p,
            n_predict=request.n_predict,
        )
        written = "".join(texts[record.where] for record in records).encode()

        def read(_on_bytes: object) -> Iterator[DocumentRecord]:
            yield from records

        source = OpenedSource(
            SOURCE, "answers of the model", "not stated", hashlib.sha256(written).hexdigest(), len(written), read
        )
        return SelfMade(source, texts, self.template, facts, tuple(left))

    def _answers(self, name: str, number: int, path: Path, file: Path, content: str) -> list[Completion]:
        """The answers of one round, from where they lie already or the engine."""
        request = self.request
        sampling = None
        if number:
            sampling = Sampling(request.temperature, request.top_p, _seed(request.seed, number))
        inputs = {
            "model": content,
            "prompts": sha256(file),
            "sampling": repr(sampling),
            "options": f"{request.n_predict} {fingerprint_of(request.options, 'answers')}",
            "engine": self.engine,
        }
        fingerprint = encode_json(inputs).decode()
        step = f"self {name}"
        self.sink(Started(step, f"{name} answers", len(self.prompts), "prompts"))
        found = read_completions(path, fingerprint)
        if len(found) < len(self.prompts):
            job = AnswerJob(step, self.model.path, file, path, request.n_predict, request.options, fingerprint, None, sampling)
            self.answerer.answer(job, self.sink)
            found = read_completions(path, fingerprint)
        self.sink(Finished(step, "done", f"{len(found)} answers"))
        return found

    def _documents(
        self, asked: Sequence[DocumentRecord], rounds: Sequence[tuple[str, Sequence[Completion]]]
    ) -> tuple[list[DocumentRecord], dict[str, str]]:
        """A conversation for each answer that is not empty, and its text as the model read and wrote it."""
        records: list[DocumentRecord] = []
        texts: dict[str, str] = {}
        for name, answers in rounds:
            for completion in answers:
                if not completion.text.strip():
                    continue
                record = asked[completion.prompt]
                where = f"{SOURCE}, prompt {completion.prompt + 1}, {name}"
                content = record.content
                before = content if isinstance(content, Conversation) else Conversation(({"role": "user", "content": content},))
                answered = replace(before, messages=(*before.messages, {"role": "assistant", "content": completion.text}))
                records.append(DocumentRecord(answered, where))
                texts[where] = self.prompts[completion.prompt].text + completion.text + completion.end
        return records, texts


def _seed(seed: int, number: int) -> int:
    """A seed for each round of sampling, 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "little")
