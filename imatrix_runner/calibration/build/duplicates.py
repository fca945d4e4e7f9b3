"""Finds texts that repeat earlier ones, exactly or nearly."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from imatrix_runner.calibration.shingles import I64, U64, character_shingles
from imatrix_runner.errors import from_os_error

if TYPE_CHECKING:
    from datasketch import MinHash

U32 = npt.NDArray[np.uint32]

THRESHOLD = 0.8
"""Jaccard similarity of shingles from which two texts count as near duplicates (the usual choice for training texts of
language models: Lee et al. 2022, arXiv:2107.06499)."""

_PERMUTATIONS, _SEED = 128, 1
_FEW = 32
"""Texts with fewer shingles are compared exactly: one changed word would already change half of them."""
_MOST_SHINGLES = 1 << 15
_BATCH = 1 << 12
_MISSED = 0.02
_MOST_IN_BAND, _MOST_COMPARED = 256, 64
"""Bounds on the texts of a band and on comparisons per text: filled-in forms share bands by the thousand."""
_MOST_EXAMPLES, _EXAMPLE = 1000, 200
_SLACK = 0.15
"""A sketch estimates a share of 0.8 with a standard error of 0.035."""


class NearDuplicates:
    """Finds texts that nearly equal an earlier one: the Jaccard similarity of their shingles (distinct sequences of 9
    characters, ignoring white space and case) is at least ``threshold``.

    MinHash (datasketch) finds the candidates. It misses at most 2 of 100 pairs exactly at the threshold, fewer of more similar
    pairs, and more where hundreds of texts share half of their wording (forms). The similarity is then computed: exactly for
    texts of up to 32,768 shingles, from the 32,768 smallest hashes of each (an unbiased sample) for longer ones. Texts with
    fewer than 32 shingles must be equal, ignoring white space and case. The result depends only on the texts and their order.

    Memory: about 3 KB for each remembered text; the shingles are kept in an unnamed temporary file. After ``most`` texts
    (``full``), later ones are compared with the first ``most`` only, not with each other.
    """

    def __init__(self, threshold: float = THRESHOLD, *, most: int = 100_000) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"a threshold of {threshold} is not in (0, 1]")
        self._threshold, self._most = threshold, most
        self._rows = _rows(threshold)
        self._n_bands = _PERMUTATIONS // self._rows
        self._salts = np.random.default_rng(_SEED).integers(0, 1 << 64, (self._n_bands, self._rows), np.uint64) | np.uint64(1)
        self._seen = 0
        self._exact: dict[bytes, int] = {}
        self._stored: list[tuple[int, int, int]] = []  # number of the text; offset and length of its shingles in the file
        self._sketches = np.empty((64, _PERMUTATIONS), np.uint32)
        self._bands: dict[int, int | list[int]] = {}  # hash of a band -> places in ``_stored``
        self._length = 0

    @property
    def full(self) -> bool:
        """Whether ``most`` texts are stored, so that no more are added."""
        return len(self._exact) >= self._most

    def add(self, text: str) -> int | None:
        """The number (from 0, counting every call) of the earliest text that this one nearly equals; None for a new one.

        Only new texts are remembered, so all near duplicates of a text get the same number.
        """
        number = self._seen
        self._seen += 1
        plain = " ".join(text.casefold().split())
        key = hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        if (same := self._exact.get(key)) is not None:
            return same
        shingles = character_shingles(text)[:_MOST_SHINGLES]
        if len(shingles) >= _FEW:
            sketch = self._sketch(shingles)
            bands = self._bands_of(sketch)
            if (near := self._nearly(shingles, sketch, bands)) is not None:
                return near
            if not self.full:
                self._remember(number, shingles, sketch, bands)
        if not self.full:
            self._exact[key] = number
        return None

    def _nearly(self, shingles: U64, sketch: U32, bands: list[int]) -> int | None:
        candidates: I64 = np.array(sorted({place for band in bands for place in self._in_band(band)}), np.int64)
        if not len(candidates):
            return None
        estimates = (self._sketches[candidates] == sketch).mean(axis=1)
        likeliest = np.argsort(-estimates, kind="stable")[:_MOST_COMPARED]
        likely: list[int] = candidates[likeliest[estimates[likeliest] >= self._threshold - _SLACK]].tolist()
        for place in sorted(likely):
            if likeness(shingles, self._read(place)) >= self._threshold:
                return self._stored[place][0]
        return None

    def _sketch(self, shingles: U64) -> U32:
        """The MinHash of a text: uint32 [128]."""
        sketch = self._empty.copy()
        low = shingles & np.uint64(0xFFFFFFFF)
        for start in range(0, len(low), _BATCH):  # datasketch allocates a matrix of [batch, 128]
            sketch.update_batch(low[start : start + _BATCH].tolist())
        return np.asarray(sketch.hashvalues).astype(np.uint32)

    def _bands_of(self, sketch: U32) -> list[int]:
        """One 64-bit hash for each band of a sketch."""
        rows = sketch[: self._rows * self._n_bands].reshape(self._n_bands, self._rows).astype(np.uint64)
        bands: list[int] = ((rows + np.uint64(1)) * self._salts).sum(axis=1, dtype=np.uint64).tolist()
        return bands

    @cached_property
    def _empty(self) -> MinHash:
        from datasketch import MinHash

        return MinHash(num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=int)

    @cached_property
    def _file(self) -> IO[bytes]:
        file = tempfile.TemporaryFile(prefix="imatrix-runner-")  # noqa: SIM115 - closed with this object
        weakref.finalize(self, file.close)
        return file

    # datasketch's own MinHashLSH keeps a set for each band and text: more than twice the memory, and no bound on a band.
    def _in_band(self, band: int) -> list[int]:
        found = self._bands.get(band)
        return [] if found is None else found if isinstance(found, list) else [found]

    def _remember(self, number: int, shingles: U64, sketch: U32, bands: list[int]) -> None:
        place, data = len(self._stored), shingles.tobytes()
        with _spooling():
            self._file.seek(self._length)
            self._file.write(data)
        self._stored.append((number, self._length, len(data)))
        self._length += len(data)
        if place >= len(self._sketches):
            self._sketches = np.resize(self._sketches, (2 * place, _PERMUTATIONS))
        self._sketches[place] = sketch
        for band in bands:
            there = self._bands.get(band)
            if there is None:
                self._bands[band] = place
            elif isinstance(there, int):
                self._bands[band] = [there, place]
            elif len(there) < _MOST_IN_BAND:
                there.append(place)

    def _read(self, place: int) -> U64:
        _, offset, length = self._stored[place]
        with _spooling():
            self._file.seek(offset)
            return np.frombuffer(self._file.read(length), np.uint64)


@contextmanager
def _spooling() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, "comparing texts", tempfile.gettempdir()) from error


def likeness(one: U64, other: U64) -> float:
    """Jaccard similarity of two sorted sets of hashes; an estimate if a set was cut to its smallest members."""
    both = np.union1d(one, other)
    if max(len(one), len(other)) >= _MOST_SHINGLES:
        both = both[:_MOST_SHINGLES]
        return float(np.isin(both, np.intersect1d(one, other, assume_unique=True), assume_unique=True).mean())
    return (len(one) + len(other) - len(both)) / len(both) if len(both) else 1.0


def _rows(threshold: float) -> int:
    """Rows of a band: the most with which at most 2 % of the pairs exactly at the threshold are missed."""
    best = 1
    for rows in range(1, 33):
        if (1 - threshold**rows) ** (_PERMUTATIONS // rows) <= _MISSED:
            best = rows
    return best


@dataclass
class Repeats:
    """Counts repeated texts in bounded memory. Beyond ``most`` distinct texts only a sample by hash is tracked, halved each
    time it fills up, and the number of distinct texts is estimated from it (``estimated``; within 1 %)."""

    most: int = 1 << 18
    n: int = 0
    """Texts added."""
    n_bytes: int = 0
    _counts: dict[int, int] = field(default_factory=dict)
    _texts: dict[int, str] = field(default_factory=dict)
    _mask: int = 0
    _distinct_bytes: int = 0

    def add(self, text: str, n_bytes: int) -> None:
        self.n += 1
        self.n_bytes += n_bytes
        key = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if key & self._mask:
            return
        before = self._counts.get(key, 0)
        self._counts[key] = before + 1
        if before == 0:
            self._distinct_bytes += n_bytes
            if len(self._counts) > self.most:
                self._narrow()
        elif before == 1 and len(self._texts) < _MOST_EXAMPLES:
            self._texts[key] = text[:_EXAMPLE]

    def _narrow(self) -> None:
        self._mask = 2 * self._mask + 1
        n = len(self._counts)
        self._counts = {key: count for key, count in self._counts.items() if not key & self._mask}
        self._texts = {key: text for key, text in self._texts.items() if not key & self._mask}
        self._distinct_bytes = round(self._distinct_bytes * len(self._counts) / n)

    @property
    def estimated(self) -> bool:
        return self._mask > 0

    @property
    def repeated(self) -> int:
        """Number of texts that repeat an earlier one."""
        return max(0, self.n - len(self._counts) * (self._mask + 1))

    @property
    def repeated_bytes(self) -> int:
        return max(0, self.n_bytes - self._distinct_bytes * (self._mask + 1))

    def examples(self, n: int) -> list[tuple[str, int]]:
        """Up to ``n`` of the repeated texts, the most frequent first, each with its number of occurrences."""
        found = [(text, self._counts[key]) for key, text in self._texts.items()]
        return sorted(found, key=lambda each: (-each[1], each[0]))[:n]
