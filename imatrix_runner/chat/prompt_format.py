"""The prompt format of a model: its chat template, rendered with placeholders for the messages."""

from __future__ import annotations

from pathlib import Path

from imatrix_runner.chat.rendering import Limits, Unrendered, render
from imatrix_runner.chat.templates import load_template
from imatrix_runner.documents.documents import Conversation
from imatrix_runner.errors import EngineError, InvalidDataError
from imatrix_runner.events import Sink, detail
from imatrix_runner.models.gguf_file import GgufHeader
from imatrix_runner.process import Runner
from imatrix_runner.safe_text import shown_text

SYSTEM, PROMPT = "{system_prompt}", "{prompt}"

_TEMPLATE = "tokenizer.chat_template"
_LONGEST = 20_000
_LIMITS = Limits(seconds=5.0, characters=1 << 20, failures=2)


def prompt_format(header: GgufHeader, runner: Runner, sink: Sink) -> str:
    """The chat template of a GGUF rendered with the system message :data:`SYSTEM` and the user's :data:`PROMPT`, up to the
    beginning of the answer; without the system message if the template refuses one.

    Empty if there is no usable template. That is only reported, because nothing but the report uses it.
    """
    if not any(key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.") for key in header.metadata):
        return ""
    user = {"role": "user", "content": PROMPT}
    asked = (Conversation(({"role": "system", "content": SYSTEM}, user)), Conversation((user,)))
    try:
        template = load_template(header.path)
        rendered = render(template, asked, runner, generation_prompt=True, limits=_LIMITS)
    except (InvalidDataError, EngineError) as error:
        sink(detail(f"The report has no prompt format: {error}."))
        return ""
    usable = [text for text in rendered if isinstance(text, str) and PROMPT in text and len(text) <= _LONGEST]
    if not usable:
        why = [each.why for each in rendered if isinstance(each, Unrendered)] or ["its output does not contain the prompt"]
        sink(detail(f"The report has no prompt format: the chat template of {Path(header.path).name} gives none, {why[-1]}."))
        return ""
    return shown_text(usable[0], _LONGEST)
