"""Renders the chat template in a finished file over a set of conversations, and compares with the source's and llama.cpp's.

Templates are changed on the way to a GGUF, by accident or to work around a program; then the model is asked in another way
than it was trained on, and nothing says so. Templates run in the render child only (:mod:`~imatrix_runner.chat.rendering`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imatrix_runner.chat.rendering import Limits, Unrendered, render
from imatrix_runner.chat.templates import ChatTemplate, load_template
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.extras import PUBLISH
from imatrix_runner.models.gguf_file import GgufHeader, LongArray, long_array, read_header
from imatrix_runner.process import Runner
from imatrix_runner.publish.conversation_set import CONVERSATIONS
from imatrix_runner.safe_text import shown

TemplateFindingKind = Literal["broken", "difference", "token", "engine"]
"""``broken``: it cannot be used; ``difference``: from the source's; ``token``: it writes a special token that the vocabulary
lacks; ``engine``: llama.cpp does not render it, or renders it otherwise."""

_KEY = "tokenizer.chat_template"
_TOKENS = "tokenizer.ggml.tokens"
_LIMITS = Limits(seconds=10.0, characters=1 << 20, failures=2)
_MARK = re.compile(r"<\|[^<>|\s]{1,64}\|>|<｜[^<>｜]{1,64}｜>|<(?:start|end)_of_turn>|</?s>|<\|?[a-z]{1,16}_(?:start|end)\|?>")
_CONTEXT = 30
_Text = str | Unrendered


@dataclass(frozen=True)
class TemplateFinding:
    """``what``: a sentence for people; ``conversations``: names of those that it is about."""

    kind: TemplateFindingKind
    what: str
    conversations: tuple[str, ...] = ()

    def sentence(self) -> str:
        where = f" ({', '.join(self.conversations)})" if self.conversations else ""
        return f"{self.what}{where}."


@dataclass(frozen=True)
class TemplateCheck:
    """What was found. ``compared``: with what the file's template was compared; ``not_compared``: sentences about what could
    not be."""

    findings: tuple[TemplateFinding, ...] = ()
    compared: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()


def check_template(model: Path, source: Path | None, runner: Runner) -> TemplateCheck:
    """Check the template of the GGUF ``model`` against that of ``source``: the Hugging Face directory or the GGUF that it was
    made from; None if it is gone. A model without a template needs none, unless its source has one."""
    header = read_header(model)
    own, broken = _loaded(model)
    theirs, unreadable = _loaded(source) if source is not None else (None, "")
    if own is None:
        if broken:
            return TemplateCheck(
                (TemplateFinding("broken", f"The chat template of {shown(model.name)} cannot be used: {broken}"),)
            )
        if theirs is not None:
            return TemplateCheck(
                (TemplateFinding("difference", f"{shown(model.name)} has no chat template, and its source has one"),)
            )
        return TemplateCheck()
    try:
        texts = _rendered(own, runner)
    except InvalidDataError as error:
        return TemplateCheck((TemplateFinding("broken", error.sentence().rstrip(".")),))
    if refused := _refused(texts):
        return TemplateCheck((refused,))
    findings = _missing_tokens(header, texts)
    compared, not_compared = [], []
    if theirs is not None:
        compared.append(f"the source's chat template ({shown(theirs.origin)})")
        findings += _against_source(own, texts, theirs, runner)
    elif source is not None:
        not_compared.append(f"The source's chat template: {unreadable or 'it has none'}.")
    if PUBLISH.missing():
        not_compared.append(f"llama.cpp's template engine: it is not installed. Install it with: {PUBLISH.install}")
    else:
        compared.append("llama.cpp's template engine")
        findings += _against_llama_cpp(own, runner)
    return TemplateCheck(tuple(findings), tuple(compared), tuple(not_compared))


def _loaded(model: Path) -> tuple[ChatTemplate | None, str]:
    """The template of a model, or why there is no usable one; an empty reason if it has none at all."""
    try:
        return load_template(model), ""
    except InvalidDataError as error:
        has = model.is_file() and any(key == _KEY or key.startswith(f"{_KEY}.") for key in read_header(model).metadata)
        return None, error.why if has or "cannot be used" in error.what else ""


def _rendered(template: ChatTemplate, runner: Runner, *, in_llama_cpp: bool = False, **variables: object) -> list[_Text]:
    """The text of each of :data:`CONVERSATIONS`; ``variables``: those that a program gives where the conversation has none."""
    return render(
        template,
        [each.conversation for each in CONVERSATIONS],
        runner,
        limits=_LIMITS,
        variables=[{"add_generation_prompt": each.answering, **variables, **each.variables} for each in CONVERSATIONS],
        in_llama_cpp=in_llama_cpp,
    )


def _refused(texts: Sequence[_Text]) -> TemplateFinding | None:
    """A finding if it renders nothing at all. That it refuses some conversations may be meant."""
    whys = [text.why for text in texts if isinstance(text, Unrendered)]
    if len(whys) < len(texts):
        return None
    return TemplateFinding("broken", f"The chat template renders none of {len(texts)} conversations: {shown(whys[0])}")


def _missing_tokens(header: GgufHeader, texts: Sequence[_Text]) -> list[TemplateFinding]:
    """Marks like those of special tokens that the template writes and that are no tokens."""
    kept = header.metadata.get(_TOKENS)
    tokens = long_array(header.path, _TOKENS) if isinstance(kept, LongArray) else kept
    if not isinstance(tokens, tuple):
        return []
    known = frozenset(token for token in tokens if isinstance(token, str))
    lacking: dict[str, list[str]] = {}
    for each, text in zip(CONVERSATIONS, texts, strict=True):
        for mark in dict.fromkeys(_MARK.findall(text) if isinstance(text, str) else ()):
            if mark not in known:
                lacking.setdefault(mark, []).append(each.name)
    return [
        TemplateFinding(
            "token", f"The chat template writes {shown(mark, 80)}, which is no token of the vocabulary", tuple(names)
        )
        for mark, names in lacking.items()
    ]


def _against_source(own: ChatTemplate, texts: Sequence[_Text], theirs: ChatTemplate, runner: Runner) -> list[TemplateFinding]:
    if (own.source, own.with_tools, own.special) == (theirs.source, theirs.with_tools, theirs.special):
        return []
    try:
        expected = _rendered(theirs, runner)
    except InvalidDataError as error:
        return [TemplateFinding("difference", f"The source's chat template cannot be used: {shown(error.why)}")]
    return _differences(texts, expected, "difference", "the source's chat template")


def _against_llama_cpp(own: ChatTemplate, runner: Runner) -> list[TemplateFinding]:
    """Where llama.cpp gives another text than transformers, or none. It rewrites content in parts where a template wants text,
    so there only the latter counts. It turns thinking on where nothing else is said, so transformers is asked to, too."""
    try:
        others = _rendered(own, runner, in_llama_cpp=True)
    except InvalidDataError as error:
        return [TemplateFinding("engine", f"llama.cpp does not render the chat template: {shown(error.why)}")]
    expected = _rendered(own, runner, enable_thinking=True)
    for at, (each, text, other) in enumerate(zip(CONVERSATIONS, expected, others, strict=True)):
        if isinstance(text, Unrendered) or (each.typed and isinstance(other, str)):
            expected[at] = other  # what transformers does not render, llama.cpp may rewrite
    return _differences(others, expected, "engine", "transformers", "llama.cpp")


def _differences(
    texts: Sequence[_Text],
    expected: Sequence[_Text],
    kind: TemplateFindingKind,
    other: str,
    own: str = "The file's chat template",
) -> list[TemplateFinding]:
    """A finding for each different way in which texts differ from the expected ones."""
    found: dict[str, list[str]] = {}
    for each, text, wanted in zip(CONVERSATIONS, texts, expected, strict=True):
        if isinstance(text, Unrendered) and isinstance(wanted, Unrendered):
            continue
        if text != wanted:
            found.setdefault(_how(text, wanted, own, other), []).append(each.name)
    return [TemplateFinding(kind, how, tuple(names)) for how, names in found.items()]


def _how(text: _Text, wanted: _Text, own: str, other: str) -> str:
    if isinstance(text, Unrendered):
        return f"{own} does not render what {other} does: {shown(text.why)}"
    if isinstance(wanted, Unrendered):
        return f"{own} renders what {other} refuses: {shown(wanted.why)}"
    at = next((i for i, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b), min(len(text), len(wanted)))
    begin = max(0, at - 10)
    here, there = (repr(each[begin : at + _CONTEXT]) for each in (text, wanted))
    return f"{own} writes {shown(here)} where {other} has {shown(there)}"
