"""Whether a calibration text suits a model and its intended use. Pure. Findings about the text by itself are in
:mod:`imatrix_runner.calibration.inspect.findings`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from imatrix_runner.calibration.inspect.findings import TextFinding
from imatrix_runner.calibration.inspect.inspection import LanguageShare
from imatrix_runner.calibration.inspect.languages import CODE, SHORT, UNKNOWN
from imatrix_runner.imatrix.coverage import FEW_TOKENS

Use = Literal["general", "chat", "code", "multilingual"]
USES: Final = ("general", "chat", "code", "multilingual")

LEAST_SHARE = 0.2
"""Smallest share of a text that should be of the intended use. A convention, as for parts of a text
(:mod:`~imatrix_runner.calibration.inspect.findings`): there is no published measurement of it."""


@dataclass(frozen=True)
class Suitability:
    """Facts about the model and the text. ``model``: as it was typed; ``n_used`` of ``n_experts`` process each token (0: a
    dense model); ``rendered``: the text's control tokens are parsed, like those of a chat template; ``languages``: empty if
    they were not checked."""

    model: str
    use: Use
    has_template: bool
    rendered: bool
    languages: tuple[LanguageShare, ...]
    n_tokens: int
    n_experts: int = 0
    n_used: int = 0


def suits(facts: Suitability) -> tuple[TextFinding, ...]:
    """Findings about the text for this model and use, with remedies."""
    return (*_use(facts), *_experts(facts))


def tokens_per_expert(n_tokens: int, n_experts: int, n_used: int) -> int:
    """Tokens that each expert of a layer would see if all were used equally often."""
    return n_tokens * n_used // n_experts if 0 < n_used <= n_experts else 0


def _use(facts: Suitability) -> Iterator[TextFinding]:
    if facts.use == "chat":
        yield from _chat(facts)
    elif not facts.languages:
        return
    elif facts.use == "code":
        share = sum(each.share for each in facts.languages if each.code == CODE)
        finding = f"{_percent(share)} of the text is code or data"
        yield _share(facts, "code-share", share, finding, "SOURCES/=2 shipped=1 -o code.txt")
    elif facts.use == "multilingual":
        spoken = sorted(
            (each for each in facts.languages if each.code not in (CODE, SHORT, UNKNOWN)), key=lambda each: -each.share
        )
        others = spoken[1:]
        share = sum(each.share for each in others)
        most = f" than {spoken[0].name}" if spoken else ""
        finding = f"{_percent(share)} of the text is in {len(others)} languages other{most}"
        yield _share(facts, "language-share", share, finding, "YOURS.txt=2 shipped=1 -o languages.txt")


def _share(facts: Suitability, kind: str, share: float, finding: str, build: str) -> TextFinding:
    todo = f"For more: {_build(facts, build)}"
    if share < LEAST_SHARE:
        few = f"{finding}, less than {_percent(LEAST_SHARE)}: little of it resembles the intended use"
        return TextFinding("warning", kind, share, few, todo)
    return TextFinding("info", kind, share, finding, todo)


def _chat(facts: Suitability) -> Iterator[TextFinding]:
    if not facts.has_template:
        yield TextFinding(
            "warning",
            "no-template",
            0,
            "The model has no chat template: it may be a base model, and programs will guess its conversation format",
            "If you know the template: imatrix-runner calibration build DIALOGUES --chat-template-file FILE -o chat.txt",
        )
    elif not facts.rendered:
        yield TextFinding(
            "info",
            "not-rendered",
            0,
            "The model has a chat template, but the text is not rendered with it; whether such a text helps is not proven",
            f"To try: {_build(facts, 'DIALOGUES=2 shipped=1 -o chat.txt')} --chunks 200",
        )
    else:
        yield TextFinding("info", "rendered", 1, "The text's control tokens are parsed, as a chat model sees them in use", "")


def _experts(facts: Suitability) -> Iterator[TextFinding]:
    if facts.n_experts < 1:
        return
    each = tokens_per_expert(facts.n_tokens, facts.n_experts, facts.n_used)
    if not each:
        return
    used = f"{facts.n_used} of {facts.n_experts} process each of the {facts.n_tokens:,} tokens"
    finding = f"An expert sees {each:,} tokens if all are used equally often ({used}), and some see far fewer"
    after = "After the run, imatrix-runner imatrix check IMATRIX --model MODEL shows what each saw."
    if each < FEW_TOKENS:
        few = f"{finding}: with fewer than {FEW_TOKENS} its weights are noise"
        yield TextFinding("warning", "few-expert-tokens", each, few, f"Give a longer text. {after}")
    else:
        yield TextFinding("info", "expert-tokens", each, finding, after)


def _build(facts: Suitability, rest: str) -> str:
    return f"imatrix-runner calibration build {rest} --model {shlex.quote(facts.model)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace(".0 %", " %")
