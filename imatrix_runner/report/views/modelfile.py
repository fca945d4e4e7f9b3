"""``….Modelfile``: what Ollama makes a model of a level's file from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from imatrix_runner.chat.linear_format import LinearFormat

MOST_CONTEXT = 8192
"""Tokens of context: Ollama reserves the memory for all of it at once."""

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ModelfileFacts:
    """What a Modelfile depends on. ``file``: name of the GGUF next to it; ``name``: the model's in Ollama; ``context``: tokens
    that it was trained for, None if unknown; ``stops``: the tokens that end an answer; ``has_template``: the file has a chat
    template; ``format``: that template's, if it can be said in Ollama's language; ``drops_begin``: the text with which Ollama
    begins a prompt itself (BOS)."""

    file: str
    name: str
    context: int | None = None
    stops: tuple[str, ...] = ()
    has_template: bool = False
    format: LinearFormat | None = None
    drops_begin: str = ""


def render_modelfile(facts: ModelfileFacts, own_name: str) -> str:
    """The text of the Modelfile ``own_name``."""
    lines = [
        f"# For Ollama: ollama create {facts.name} -f {own_name}",
        f"FROM ./{facts.file}",
        "",
        *_template(facts),
        *_context(facts.context),
        *(f"PARAMETER stop {_quoted(stop)}" for stop in facts.stops),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def _template(facts: ModelfileFacts) -> list[str]:
    if facts.format is not None:
        text = _go_template(facts.format, facts.drops_begin)
        about = "# The file's chat template in Ollama's language, for system, user and assistant messages; tools are left out."
        return [about, f'TEMPLATE """{text}"""', ""]
    if facts.has_template:
        return [
            "# No TEMPLATE: the file's chat template cannot be said in Ollama's language with certainty. Ollama takes one of",
            "# its own if it recognises the file's, else it sends the prompt as it is.",
            "",
        ]
    return ["# No TEMPLATE: the file has no chat template, so Ollama sends the prompt as it is.", ""]


def _context(trained: int | None) -> list[str]:
    if trained is None:
        return []
    most = f"# The model was trained for {trained:,} tokens; more context takes more memory."
    return [most, f"PARAMETER num_ctx {min(trained, MOST_CONTEXT)}"]


def _go_template(form: LinearFormat, drops_begin: str) -> str:
    """The format as a template of Go. All texts stand in quotes: what stands outside of actions is trimmed away."""
    begin = form.begin.removeprefix(drops_begin) if drops_begin else form.begin
    unasked = ("{{- if not .System }}", _said(form.unasked), "{{- end }}") if form.unasked else ()
    parts = [
        _said(begin),
        *unasked,
        "{{- range $i, $_ := .Messages }}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
    ]
    for number, role in enumerate(_ROLES):
        parts.append(f'{{{{- {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}')
        parts += [_said(form.before[role]), "{{- .Content }}"]
        after = _said(form.after[role])
        # An answer that is begun already goes on.
        parts += ["{{- if not $last }}", after, "{{- end }}"] if role == "assistant" and after else [after]
    parts += ["{{- end }}", '{{- if and $last (ne .Role "assistant") }}', _said(form.answer), "{{- end }}", "{{- end }}"]
    return "\n".join(filter(None, parts))


def _said(text: str) -> str:
    return f"{{{{- {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    """A string of Go, which is one of JSON, too, but for characters beyond 16 bits: those stay as they are."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def stops_of(tokens: Sequence[str]) -> tuple[str, ...]:
    """The texts that end an answer, each once; without those that are blank or would end ordinary text."""
    return tuple(dict.fromkeys(token for token in tokens if len(token.strip()) > 2 and token.isprintable()))
