"""Greedy answers of a level beside its source's, on somebody's own prompts: how long they agree, and where they part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from imatrix_runner.engines.measures import Completion

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
