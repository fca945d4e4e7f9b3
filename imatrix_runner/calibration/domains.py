"""How alike the domains of a text are: its sources, or its labelled parts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from imatrix_runner.calibration.shingles import units

_BUCKETS_LOG2 = 16
_MOST_DOMAINS = 64
_MOST_BYTES = 4 << 20
_BUFFER = 1 << 16
_SHOWN = 12
_LEAST_SHARE = 0.02


@dataclass(frozen=True)
class Domain:
    """A source or a labelled part: its bytes and ``share`` of all bytes of domains."""

    name: str
    n_bytes: int
    share: float


@dataclass(frozen=True)
class Similarity:
    """Cosine of the two domains' word frequencies: words in lower case, each counted as often as it occurs, none left out.

    1 for the same distribution of words. It tells languages, code and prose apart, and kinds of text, more than subjects.
    """

    one: str
    other: str
    cosine: float


@dataclass
class _Words:
    n_bytes: int = 0
    taken: int = 0
    waiting: list[str] = field(default_factory=list)
    waiting_size: int = 0
    counts: npt.NDArray[np.int64] | None = None


@dataclass
class Domains:
    """Adds up the words of each domain in bounded memory: in 65,536 buckets by hash, of the first 64 domains, and of each the
    first 4 MiB."""

    _found: dict[str, _Words] = field(default_factory=dict)

    def add(self, name: str, text: str, n_bytes: int) -> None:
        words = self._found.setdefault(name, _Words())
        words.n_bytes += n_bytes
        if words.taken < _MOST_BYTES and (words.counts is not None or len(self._found) <= _MOST_DOMAINS):
            words.taken += n_bytes
            words.waiting.append(text)
            words.waiting_size += len(text)
            if words.waiting_size > _BUFFER:
                _count(words)

    def shares(self) -> tuple[Domain, ...]:
        """The domains in the order of the text."""
        total = sum(words.n_bytes for words in self._found.values())
        return tuple(Domain(name, words.n_bytes, words.n_bytes / total) for name, words in self._found.items())

    def similarities(self) -> tuple[Similarity, ...]:
        """Every pair of the 12 largest domains that hold at least 2 %, the least alike first."""
        vectors = []
        large = [domain for domain in self.shares() if domain.share >= _LEAST_SHARE]
        for domain in sorted(large, key=lambda domain: -domain.n_bytes)[:_SHOWN]:
            words = self._found[domain.name]
            _count(words)
            if words.counts is not None and words.counts.any():
                vectors.append((domain.name, words.counts / np.linalg.norm(words.counts)))
        pairs = [
            Similarity(one, other, float(first @ second))
            for place, (one, first) in enumerate(vectors)
            for other, second in vectors[place + 1 :]
        ]
        return tuple(sorted(pairs, key=lambda pair: pair.cosine))


def _count(words: _Words) -> None:
    if words.waiting:
        hashes = units("\n".join(words.waiting)).hashes >> np.uint64(64 - _BUCKETS_LOG2)
        found = np.bincount(hashes.astype(np.int64), minlength=1 << _BUCKETS_LOG2).astype(np.int64)
        words.counts = found if words.counts is None else words.counts + found
        words.waiting, words.waiting_size = [], 0
