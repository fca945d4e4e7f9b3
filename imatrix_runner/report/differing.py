"""Two answers side by side: which words the one has and the other has not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_COMPARED = 1500
"""Words and spaces of each answer that are compared where neither beginning nor end is the same: the time can grow with their
square."""

_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
"""Thai, kana, Han and Hangul: a word for itself is each character, for spaces tell nothing of words."""
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
    one, other = (pieces[start : len(pieces) - end][:_COMPARED] for pieces in (mine, theirs))
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


def _runs(pieces: Sequence[str], same: set[int]) -> list[Run]:
    """Neighbours joined; a space counts as different only between two words that are."""
    edges = {*same, -1, len(pieces)}
    found: list[Run] = []
    for at, piece in enumerate(pieces):
        differs = at not in same and not (piece.isspace() and (at - 1 in edges or at + 1 in edges))
        if found and found[-1].differs == differs:
            found[-1] = Run(found[-1].text + piece, differs)
        else:
            found.append(Run(piece, differs))
    return found
