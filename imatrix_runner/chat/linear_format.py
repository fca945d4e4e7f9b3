"""Chat templates that write every message alike: a text before it, its content, a text after it.

Such a template can be said in another language with certainty, because what it writes follows from a few constant texts. They
are read off its output for one conversation, and hold only if they give its output for others, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imatrix_runner.chat.rendering import DATE, Limits, Unrendered, render
from imatrix_runner.chat.templates import ChatTemplate
from imatrix_runner.documents.documents import Conversation
from imatrix_runner.errors import EngineError, InvalidDataError
from imatrix_runner.process import Runner

_LIMITS = Limits(seconds=5.0, characters=1 << 20, failures=2)
_LONGEST = 4000
_OTHER = "2037-11-30"
_S, _U, _A, _V = "Zq1sys", "Zq2usr", "Zq3ans", "Zq4usr"


@dataclass(frozen=True)
class LinearFormat:
    """``begin``: the text before the first message, BOS included; ``unasked``: what stands there where a conversation has no
    system message; ``before`` and ``after``: the texts around a message, by its role; ``answer``: the text before an answer."""

    begin: str
    unasked: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    answer: str

    def text(self, messages: Sequence[tuple[str, str]], *, answering: bool = True) -> str:
        """What the template writes for messages, each a role and a content."""
        begin = self.begin + ("" if messages and messages[0][0] == "system" else self.unasked)
        body = "".join(self.before[role] + content + self.after[role] for role, content in messages)
        return begin + body + (self.answer if answering else "")


def linear_format(template: ChatTemplate, runner: Runner) -> LinearFormat | None:
    """The format of a template; None if it is not of this kind, has no place for a system message, writes the day's date, or
    cannot be rendered."""
    found = _format_on(template, runner, DATE)
    return (
        found
        if found is None or "strftime_now" not in template.source or found == _format_on(template, runner, _OTHER)
        else None
    )


def _format_on(template: ChatTemplate, runner: Runner, date: str) -> LinearFormat | None:
    asked = [*_PROBES, *_CHECKS]
    conversations = [Conversation(tuple({"role": role, "content": content} for role, content in each)) for each in asked]
    answering = [number != 1 for number in range(len(asked))]
    variables = [{"add_generation_prompt": each} for each in answering]
    try:
        texts = render(template, conversations, runner, date=date, limits=_LIMITS, variables=variables)
    except (InvalidDataError, EngineError):
        return None
    if any(isinstance(text, Unrendered) for text in texts):
        return None
    whole, unanswered, without_system, *_ = map(str, texts)
    found = _read_off(whole, unanswered, without_system)
    if found is None or any(
        found.text(each, answering=wanted) != text for each, wanted, text in zip(asked, answering, texts, strict=True)
    ):
        return None
    return found


_PROBES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("system", _S), ("user", _U), ("assistant", _A), ("user", _V)),
    (("system", _S), ("user", _U), ("assistant", _A), ("user", _V)),
    (("user", _U),),
)
_CHECKS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "One"), ("assistant", "Two"), ("user", "Three"), ("assistant", "Four"), ("user", "Five")),
    (("system", "Be brief.\nBe kind."), ("user", 'Lines\n\nand "marks" <b>{{ x }}</b> é 🙂')),
    (("system", "S"), ("user", "U")),
)


def _read_off(whole: str, unanswered: str, without_system: str) -> LinearFormat | None:
    """The constant texts, from the renderings of :data:`_PROBES`."""
    if any(whole.count(mark) != 1 for mark in (_S, _U, _A, _V)) or not whole.startswith(unanswered) or len(whole) > _LONGEST:
        return None
    answer = whole[len(unanswered) :]
    ahead, _, rest = unanswered.partition(_S)
    system_user, _, rest = rest.partition(_U)
    user_assistant, _, rest = rest.partition(_A)
    assistant_user, _, after_user = rest.partition(_V)
    if without_system.count(_U) != 1 or not without_system.endswith(after_user + answer) or not answer:
        return None
    if not user_assistant.startswith(after_user):
        return None
    before_assistant = user_assistant[len(after_user) :]
    # Between two contents stands the end of one message and the beginning of the next, and messages of users begin alike.
    first_user = without_system.partition(_U)[0]
    before_user = _common_end(system_user, assistant_user, first_user)
    if after_user and before_user.startswith(after_user):
        before_user = before_user[len(after_user) :]  # that is how the message ahead ends
    if not before_user:
        return None
    begin = _common_begin(ahead, first_user[: len(first_user) - len(before_user)])
    return LinearFormat(
        begin=begin,
        unasked=first_user[len(begin) : len(first_user) - len(before_user)],
        before={"system": ahead[len(begin) :], "user": before_user, "assistant": before_assistant},
        after={
            "system": system_user[: len(system_user) - len(before_user)],
            "user": after_user,
            "assistant": assistant_user[: len(assistant_user) - len(before_user)],
        },
        answer=answer,
    )


def _common_end(*texts: str) -> str:
    n = 0
    while n < min(map(len, texts)) and len({text[len(text) - 1 - n] for text in texts}) == 1:
        n += 1
    return texts[0][len(texts[0]) - n :]


def _common_begin(*texts: str) -> str:
    n = 0
    while n < min(map(len, texts)) and len({text[n] for text in texts}) == 1:
        n += 1
    return texts[0][:n]
