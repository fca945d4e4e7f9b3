"""Shingles: 64-bit hashes of all overlapping sequences of characters or words of a text, computed at once with NumPy.

A hash comes from prefix sums of a polynomial modulo 2**64, so sequences may differ in length. The hashes are the same in every
process and on every machine.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from imatrix_runner.writing_systems import UNSPACED

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

CHARACTERS = 9
"""Length, in characters, of the shingles that near duplicates are found by."""
WORDS, LETTERS = 13, 40
"""Lengths of the shingles that overlap is measured by: in words, or in characters for scripts without spaces.

GPT-3's authors looked for 13 common words between training and test data (arXiv:2005.14165, appendix C). 40 characters of
Chinese or Japanese carry about as much information.
"""

_BASE = 0x9E3779B97F4A7C15
_UNBASE = pow(_BASE, -1, 1 << 64)
_KNOWN = 0x20000  # planes 0 and 1 have tables; above are only ideographs and characters that belong to no word
_IDEOGRAPHS = 0x40000
_SEPARATOR, _WORD, _ALONE = 0, 1, 2


@dataclass(frozen=True)
class Shingles:
    """Shingles in the order of the text. ``hashes`` [n]; ``starts`` and ``ends`` [n]: in characters from the text's
    beginning."""

    hashes: U64
    starts: I64
    ends: I64


@dataclass(frozen=True)
class Units:
    """The units of shingles: words in lower case without punctuation, and single characters of scripts without spaces.

    ``hashes`` [n]; ``weights`` [n]: 40 for a word, 13 for a character, so 520 is 13 words, 40 characters or a mixture.
    """

    hashes: U64
    weights: I64
    starts: I64
    ends: I64


def codepoints(text: str) -> npt.NDArray[np.uint32]:
    """The code points of a text: uint32 [n]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4")).astype(np.uint32, copy=False)


def mixed(values: U64) -> U64:
    """MurmurHash3's finaliser: a bijection in which every output bit depends on every input bit."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


def character_shingles(text: str) -> U64:
    """Sorted hashes of the distinct 9-character sequences of a text; runs of white space count as one space, case is
    ignored."""
    letters = codepoints(" ".join(text.casefold().split())).astype(np.uint64)
    n = len(letters) - CHARACTERS + 1
    if n <= 0:
        return np.empty(0, np.uint64)
    hashes = np.zeros(n, np.uint64)
    for place in range(CHARACTERS):
        hashes = hashes * np.uint64(_BASE) + letters[place : place + n]
    return np.unique(mixed(hashes))


def units(text: str) -> Units:
    """The words, and the single characters of scripts without spaces, of a text in order."""
    letters = codepoints(text)
    kinds_of, folded_of = _tables()
    known = np.minimum(letters, _KNOWN - 1)
    kinds = np.where(letters < _KNOWN, kinds_of[known], np.where(letters < _IDEOGRAPHS, _ALONE, _SEPARATOR)).astype(np.int8)
    folded = np.where(letters < _KNOWN, folded_of[known], letters).astype(np.uint64)
    in_word = np.concatenate(([False], kinds == _WORD, [False]))
    starts = np.flatnonzero(in_word[1:] & ~in_word[:-1])
    ends = np.flatnonzero(~in_word[1:] & in_word[:-1])
    alone = np.flatnonzero(kinds == _ALONE)
    starts, ends = np.concatenate((starts, alone)), np.concatenate((ends, alone + 1))
    weights = np.where(np.arange(len(starts)) < len(starts) - len(alone), LETTERS, WORDS).astype(np.int64)
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order].astype(np.int64), ends[order].astype(np.int64)
    return Units(_range_hashes(mixed(folded + np.uint64(1)), starts, ends), weights[order], starts, ends)


def overlap_shingles(blocks: Iterable[str]) -> Iterator[Shingles]:
    """All shingles of 13 words (or 40 characters of scripts without spaces) of a text that comes in blocks.

    Blocks must end between words. Shingles that cross the end of a block are yielded with the later block.
    """
    kept = Units(np.empty(0, np.uint64), *(np.empty(0, np.int64) for _ in range(3)))
    read = 0
    for text in blocks:
        new = units(text)
        joined = Units(
            np.concatenate((kept.hashes, new.hashes)),
            np.concatenate((kept.weights, new.weights)),
            np.concatenate((kept.starts, new.starts + read)),
            np.concatenate((kept.ends, new.ends + read)),
        )
        read += len(text)
        total = np.concatenate(([0], np.cumsum(joined.weights)))
        # last[i]: the first position at which the units since i weigh enough; units without one are kept for the next block.
        last = np.searchsorted(total, total[:-1] + WORDS * LETTERS)
        n = int(np.searchsorted(last, len(total)))
        last = last[:n]
        first = np.arange(n, dtype=np.int64)
        yield Shingles(_range_hashes(joined.hashes, first, last), joined.starts[:n], joined.ends[last - 1])
        kept = Units(joined.hashes[n:], joined.weights[n:], joined.starts[n:], joined.ends[n:])


def _range_hashes(values: U64, starts: I64, ends: I64) -> U64:
    """A hash of ``values[start:end]`` for each pair of start and end."""
    powers, unpowers = _powers(1 << max(10, len(values).bit_length()))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(values * powers[: len(values)], dtype=np.uint64)))
    return mixed((sums[ends] - sums[starts]) * unpowers[starts])


@lru_cache(maxsize=2)
def _powers(n: int) -> tuple[U64, U64]:
    """``base**i`` and ``base**-i`` modulo 2**64 for i < n."""
    made = []
    for base in (_BASE, _UNBASE):
        steps = np.full(n, base, np.uint64)
        steps[0] = 1
        made.append(np.cumprod(steps, dtype=np.uint64))
    return made[0], made[1]


@lru_cache(maxsize=1)
def _tables() -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint32]]:
    """For each character of planes 0 and 1, its class (separator, part of a word, alone) and its lower case."""
    kinds = np.zeros(_KNOWN, np.int8)
    folded = np.arange(_KNOWN, dtype=np.uint32)
    for number in range(_KNOWN):
        character = chr(number)
        if unicodedata.category(character)[0] in "LMN":
            kinds[number] = _WORD
            lower = character.lower()
            if len(lower) == 1:
                folded[number] = ord(lower)
    for start, end in UNSPACED:
        kinds[start:end] = np.where(kinds[start:end] == _WORD, _ALONE, _SEPARATOR)
    return kinds, folded
