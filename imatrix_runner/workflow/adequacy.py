"""Whether a calibration text suits a model and what it is to be used for. Pure; what the text is worth by itself is told by
:mod:`imatrix_runner.calibration.judgements`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from imatrix_runner.calibration.inspection import LanguageShare
from imatrix_runner.calibration.judgements import Judgement
from imatrix_runner.calibration.languages import CODE, SHORT, UNKNOWN
from imatrix_runner.imatrix.coverage import FEW_TOKENS

Use = Literal["general", "chat", "code", "multilingual"]
USES: Final = ("general", "chat", "code", "multilingual")

LEAST_SHARE = 0.2
"""Of a text, for what it is to serve. A convention of ours, as for parts of a text
(:mod:`~imatrix_runner.calibration.judgements`): nobody published a measurement of it."""


@dataclass(frozen=True)
class Suitability:
    """What is known of model and text. ``model``: as it was typed; ``n_used`` of ``n_experts`` see each token (0: a dense
    model); ``rendered``: the text's control tokens are parsed, as those of a chat template are."""

    model: str
    use: Use
    has_template: bool
    rendered: bool
    languages: tuple[LanguageShare, ...]
    n_tokens: int
    n_experts: int = 0
    n_used: int = 0


def suits(facts: Suitability) -> tuple[Judgement, ...]:
    """What to know of the text for this model and use, with what to do about it."""
    return (*_use(facts), *_experts(facts))


def tokens_per_expert(n_tokens: int, n_experts: int, n_used: int) -> int:
    """What each expert of a layer would see if all were met alike."""
    return n_tokens * n_used // n_experts if 0 < n_used <= n_experts else 0


def _use(facts: Suitability) -> Iterator[Judgement]:
    if facts.use == "chat":
        yield from _chat(facts)
    elif facts.use == "code":
        share = sum(each.share for each in facts.languages if each.code == CODE)
        told = f"{_percent(share)} of the text is code or data"
        yield _share(facts, "code-share", share, told, "SOURCES/=2 shipped=1 -o code.txt")
    elif facts.use == "multilingual":
        spoken = sorted(
            (each for each in facts.languages if each.code not in (CODE, SHORT, UNKNOWN)), key=lambda each: -each.share
        )
        others = spoken[1:]
        share = sum(each.share for each in others)
        most = f" than {spoken[0].name}" if spoken else ""
        told = f"{_percent(share)} of the text is in {len(others)} languages other{most}"
        yield _share(facts, "language-share", share, told, "YOURS.txt=2 shipped=1 -o languages.txt")


def _share(facts: Suitability, kind: str, share: float, told: str, build: str) -> Judgement:
    todo = f"For more: {_build(facts, build)}"
    if share < LEAST_SHARE:
        few = f"{told}, less than {_percent(LEAST_SHARE)}: what the model is to be used for is hardly seen"
        return Judgement("warning", kind, share, few, todo)
    return Judgement("info", kind, share, told, todo)


def _chat(facts: Suitability) -> Iterator[Judgement]:
    if not facts.has_template:
        yield Judgement(
            "warning",
            "no-template",
            0,
            "The model has no chat template: it may be a base model, and programs will guess how its conversations are written",
            "If you know the template: imatrix-runner calibration build DIALOGUES --chat-template-file FILE -o chat.txt",
        )
    elif not facts.rendered:
        yield Judgement(
            "info",
            "not-rendered",
            0,
            "The model has a chat template, and the text is not written with it; that such a text helps is not proven",
            f"To try: {_build(facts, 'DIALOGUES=2 shipped=1 -o chat.txt')} --chunks 200",
        )
    else:
        yield Judgement("info", "rendered", 1, "The text's control tokens are parsed, as a chat model sees them in use", "")


def _experts(facts: Suitability) -> Iterator[Judgement]:
    if facts.n_experts < 1:
        return
    each = tokens_per_expert(facts.n_tokens, facts.n_experts, facts.n_used)
    if not each:
        return
    used = f"{facts.n_used} of {facts.n_experts} see each of the {facts.n_tokens:,} tokens"
    told = f"An expert sees {each:,} tokens if all are met alike ({used}), and some are met far less"
    after = "After the run: imatrix-runner imatrix check IMATRIX --model MODEL tells what each saw."
    if each < FEW_TOKENS:
        few = f"{told}: with fewer than {FEW_TOKENS} its weights are noise"
        yield Judgement("warning", "few-expert-tokens", each, few, f"Give a longer text. {after}")
    else:
        yield Judgement("info", "expert-tokens", each, told, after)


def _build(facts: Suitability, rest: str) -> str:
    return f"imatrix-runner calibration build {rest} --model {shlex.quote(facts.model)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace(".0 %", " %")
