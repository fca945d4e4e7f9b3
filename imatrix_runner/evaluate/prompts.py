"""Somebody's own prompts: read from a file, and written down as the model is used to reading them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imatrix_runner.chat.rendering import Unrendered, render
from imatrix_runner.chat.templates import ChatTemplate, load_template
from imatrix_runner.documents.conversations import Unfit, content_of, text_flaw
from imatrix_runner.documents.documents import MAX_ROW, SHORTEN, TOO_LONG, BadRecord, Conversation, DocumentRecord
from imatrix_runner.documents.folders import DATA, suffix
from imatrix_runner.documents.json_rows import is_jsonl
from imatrix_runner.documents.records import read_source
from imatrix_runner.documents.streams import bad_source, byte_lines, opened
from imatrix_runner.engines.measures import Prompt
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.files import human_bytes
from imatrix_runner.models.model import Model
from imatrix_runner.process import Runner
from imatrix_runner.safe_text import printable

MAX_PROMPTS = 10_000
MAX_BYTES = 64 << 20
"""Of all prompts together."""

_FORMS = 'Write it as {"prompt": "…"}, {"messages": […]} or {"text": "…"}, or as a plain string.'
_TEMPLATE = "tokenizer.chat_template"


def read_prompts(path: Path) -> list[DocumentRecord]:
    """The prompts of a file, in order: what is asked as text, or a conversation that ends where an answer is wanted.

    JSON lines, JSON, CSV and Parquet hold a record for each (:func:`~imatrix_runner.documents.conversations.content_of`;
    answers in them are left out), any other text a prompt on each line. Raises :class:`InvalidDataError` for a record that is
    none, naming its line, and for more than :data:`MAX_PROMPTS` or :data:`MAX_BYTES`; :class:`UsageError` where there is no
    file.
    """
    shown = printable(path.name)
    if not path.is_file():
        why = "it is a folder" if path.is_dir() else "it was given as the file of prompts"
        raise UsageError(f"There is no file {printable(str(path))}", why, "Check the path.")
    records: list[DocumentRecord] = []
    n_bytes = 0
    for record in _readable(path, shown):
        if isinstance(record, BadRecord):
            raise InvalidDataError(f"{record.where} cannot be used as a prompt", record.why, record.todo)
        records.append(record)
        n_bytes += len(describe(record).encode())
        if len(records) > MAX_PROMPTS or n_bytes > MAX_BYTES:
            much = f"{MAX_PROMPTS} prompts" if len(records) > MAX_PROMPTS else human_bytes(MAX_BYTES)
            raise InvalidDataError(
                f"{shown} is too much for one comparison", f"it holds more than {much}", "A few hundred prompts tell enough."
            )
    if not records:
        raise InvalidDataError(f"{shown} holds no prompt", "nothing is written in it", _FORMS)
    return records


def describe(record: DocumentRecord) -> str:
    """A prompt for people: its text, or who said what."""
    if isinstance(record.content, str):
        return record.content
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in record.content.messages)


def template_of(model: Model, file: Path | None = None) -> ChatTemplate | None:
    """The template that the model's conversations are written with; None where it has none and ``file`` names none."""
    metadata = model.header.metadata
    if file is None and not any(key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.") for key in metadata):
        return None
    return load_template(model.path, file)


def write_prompts(
    records: Sequence[DocumentRecord],
    template: ChatTemplate | None,
    runner: Runner,
    on_progress: Callable[[int], None] | None = None,
) -> list[Prompt]:
    """What the model is given. With a template all are conversations, a mere text being what a user says in one; without, texts
    to go on from. Raises :class:`InvalidDataError` naming the first that cannot be written down."""
    if template is None:
        return [Prompt(_bare(record), parse_special=False) for record in records]
    conversations = [
        each.content if isinstance(each.content, Conversation) else Conversation(({"role": "user", "content": each.content},))
        for each in records
    ]
    texts = render(template, conversations, runner, generation_prompt=True, on_progress=on_progress)
    prompts = []
    for record, text in zip(records, texts, strict=True):
        if isinstance(text, Unrendered):
            raise InvalidDataError(f"{record.where} cannot be written down for this model", text.why, _FORMS)
        prompts.append(Prompt(text, parse_special=True))
    return prompts


def _bare(record: DocumentRecord) -> str:
    if isinstance(record.content, str):
        return record.content
    raise InvalidDataError(
        f"{record.where} is a conversation, and the model has no chat template to write it down with",
        "every model has its own, base models have none, and another one's would ask what it never saw",
        "Ask it for plain texts to go on from, or measure an instruct model.",
    )


def _readable(path: Path, shown: str) -> Iterator[DocumentRecord | BadRecord]:
    try:
        if suffix(path) in DATA:
            yield from read_source(path, _asked, name=shown, strings=True)
        else:
            yield from _lines(path, shown)
    except InvalidDataError as error:
        raise InvalidDataError(f"{shown} cannot be read as prompts", error.why, error.todo) from error


def _asked(fields: Mapping[str, Any]) -> str | Conversation | Unfit:
    """What a record asks."""
    found = content_of(fields, unanswered=True)
    if isinstance(found, Unfit):
        return Unfit(found.why, _FORMS)
    asked = found if isinstance(found, str) else _unanswered(found)
    return Unfit("it asks nothing", _FORMS) if not asked or (isinstance(asked, str) and not asked.strip()) else asked


def _unanswered(conversation: Conversation) -> str | Conversation:
    """A conversation without the answer at its end; what is left as text, where that is all that a user said."""
    messages = conversation.messages
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        return ""
    alone = len(messages) == 1 and messages[0].keys() == {"role", "content"} and not conversation.tools
    content = messages[0]["content"]
    if alone and messages[0]["role"] == "user" and isinstance(content, str):
        return content
    return Conversation(messages, conversation.tools)


def _lines(path: Path, shown: str) -> Iterator[DocumentRecord | BadRecord]:
    """A prompt on each line; blank ones are passed over."""
    with opened(path, shown, lambda _bytes: None) as stream:
        if is_jsonl(stream, least=1):
            raise bad_source(shown, "it holds JSON lines and is not called so", "Let its name end in .jsonl.")
    with opened(path, shown, lambda _bytes: None) as stream:
        for number, line in byte_lines(stream, MAX_ROW):
            if line != b"":
                yield _line(line, f"{shown}, line {number}")


def _line(line: bytes | None, where: str) -> DocumentRecord | BadRecord:
    if line is None:
        return BadRecord(where, TOO_LONG, SHORTEN)
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return BadRecord(where, "it is not valid UTF-8", "Convert the file to UTF-8, or mend that line.")
    flaw = text_flaw(text)
    return BadRecord(where, f"it {flaw}", "Mend that line.") if flaw else DocumentRecord(text, where)
