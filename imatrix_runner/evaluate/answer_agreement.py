"""Greedy answers of a level beside its source's, on somebody's own prompts: how long they agree, and where they part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import fmean, median

from imatrix_runner.engines.measures import Completion
from imatrix_runner.writing_systems import character_class

SHOWN = 200
"""Pairs that are kept of a level, the first ones: as many as somebody reads."""

_LONGEST = 4000
"""Characters kept of a prompt or an answer."""

_ROOM = 1 << 20
"""Bytes of text kept of a level's pairs, as they go into the journal and into reports."""

# Controls, which a terminal might obey, and marks that turn the direction of what follows.
_UNFIT = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class AnswerPair:
    """One prompt. ``agreement``: tokens until the two part; ``parted``: None where one whole answer equals the other.

    ``shared``: share of identical tokens, 2 M / T (M tokens in common, in order; T of both together).
    """

    prompt: str
    source: str
    level: str
    n_source: int
    n_level: int
    agreement: int
    shared: float
    parted: int | None


@dataclass(frozen=True)
class DomainResult:
    """A level on all prompts, answers of at most ``n_predict`` tokens. ``same``: share of answers that are the same to the last
    token; ``agreement``: mean and median number of tokens until they part (a whole answer counts as its length).

    The figures are of all ``n_prompts``; of the ``pairs`` the first :data:`SHOWN` are kept, long texts cut.
    """

    level: str
    n_prompts: int
    n_predict: int
    same: float
    shared: float
    agreement_mean: float
    agreement_median: float
    pairs: tuple[AnswerPair, ...]


def empty_answers(source: Sequence[Completion]) -> int:
    """How many answers of the source have no token: whoever says nothing, too, agrees with them completely."""
    return sum(not completion.ids for completion in source)


def compare_answers(
    level: str, prompts: Sequence[str], source: Sequence[Completion], answers: Sequence[Completion], n_predict: int
) -> DomainResult:
    """``prompts`` (at least one) as people know them, ``source`` and ``answers`` to each of them, in the same order."""
    pairs = [_pair(*each) for each in zip(prompts, source, answers, strict=True)]
    return DomainResult(
        level=level,
        n_prompts=len(pairs),
        n_predict=n_predict,
        same=fmean(pair.parted is None for pair in pairs),
        shared=fmean(pair.shared for pair in pairs),
        agreement_mean=fmean(pair.agreement for pair in pairs),
        agreement_median=float(median(pair.agreement for pair in pairs)),
        pairs=_kept(pairs),
    )


def _pair(prompt: str, source: Completion, answer: Completion) -> AnswerPair:
    mine, theirs = source.ids, answer.ids
    shorter = min(len(mine), len(theirs))
    agreement = next((at for at in range(shorter) if mine[at] != theirs[at]), shorter)
    both = len(mine) + len(theirs)
    return AnswerPair(
        prompt=_shown(prompt),
        source=_shown(source.text),
        level=_shown(answer.text),
        n_source=len(mine),
        n_level=len(theirs),
        agreement=agreement,
        shared=2 * common_tokens(mine, theirs) / both if both else 1.0,
        parted=None if mine == theirs else agreement,
    )


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common subsequence, exactly.

    Hyyrö's bit-parallel row (2004, "Bit-parallel LCS-length computation revisited"): bit i of ``row`` is 0 where token i of
    ``one`` adds to the length. One step for each token of ``other``, each of len(one) / 64 machine words: for answers of 4096
    tokens a few milliseconds.
    """
    places: dict[int, int] = {}
    for at, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << at
    full = (1 << len(one)) - 1
    row = full
    for token in other:
        matches = row & places.get(token, 0)
        row = (row + matches | row - matches) & full
    return len(one) - row.bit_count()


def _kept(pairs: Sequence[AnswerPair]) -> tuple[AnswerPair, ...]:
    kept, room = [], _ROOM
    for pair in pairs[:SHOWN]:
        room -= sum(len(text.encode()) for text in (pair.prompt, pair.source, pair.level))
        if room < 0:
            break
        kept.append(pair)
    return tuple(kept)


def _shown(text: str) -> str:
    """A model's or a stranger's words, harmless to whoever shows them."""
    return _UNFIT.sub("\ufffd", text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


_COMPARED = 1500
"""Words and spaces of each answer that are compared where neither beginning nor end is the same: the time can grow with their
square."""

_UNSPACED = character_class()
"""A script without spaces between words: each of its characters is compared as a word."""

_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Run:
    """A stretch of an answer; ``differs``: the other answer has something else here, or nothing."""

    text: str
    differs: bool


def words(text: str) -> list[str]:
    """A text's words, spaces and signs, which together are the text."""
    return _WORDS.findall(text)


def differences(source: str, level: str) -> tuple[list[Run], list[Run]]:
    """Both answers in runs. What both begin and end with is the same; between, difflib's longest matching blocks are, as far as
    :data:`_COMPARED` words: the rest counts as different."""
    mine, theirs = words(source), words(level)
    start = _alike(mine, theirs)
    end = _alike(mine[start:][::-1], theirs[start:][::-1])
    one, other = (each[start : len(each) - end][:_COMPARED] for each in (mine, theirs))
    same_mine = {*range(start), *range(len(mine) - end, len(mine))}
    same_theirs = {*range(start), *range(len(theirs) - end, len(theirs))}
    for block in SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks():
        # A space alone in common is no agreement.
        if one[block.a : block.a + block.size] != [" "]:
            same_mine.update(range(start + block.a, start + block.a + block.size))
            same_theirs.update(range(start + block.b, start + block.b + block.size))
    return _runs(mine, same_mine), _runs(theirs, same_theirs)


def _alike(mine: Sequence[str], theirs: Sequence[str]) -> int:
    """How many words both begin with."""
    return next((at for at, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))


def _runs(words: Sequence[str], same: set[int]) -> list[Run]:
    """Neighbours joined; a space counts as different only between two words that are."""
    edges = {*same, -1, len(words)}
    found: list[Run] = []
    for at, word in enumerate(words):
        differs = at not in same and not (word.isspace() and (at - 1 in edges or at + 1 in edges))
        if found and found[-1].differs == differs:
            found[-1] = Run(found[-1].text + word, differs)
        else:
            found.append(Run(word, differs))
    return found
