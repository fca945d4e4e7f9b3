"""Files of one source compared at equal size: which to take, and what is not known. Pure.

Sizes of two files are never equal, so a file is compared with the program's own levels around its size: between two neighbours
log KLD is linear in log bytes, as in :mod:`~imatrix_runner.evaluate.mix_verdict`. Beyond the smallest and the largest own level
there is no honest comparison. Errors come from a bootstrap over the chunks of the text (B. Efron, R. J. Tibshirani, An
Introduction to the Bootstrap, 1993): all files are resampled with the same chunks, because those that are hard for one are hard
for the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from imatrix_runner.evaluate.mix_verdict import ChunkMeans, MeasuredSize
from imatrix_runner.evaluate.recommendations import SAME_SIZE, Measure, front
from imatrix_runner.files import human_bytes

Outcome = Literal["take it", "take ours", "no difference seen", "no honest comparison"]

EQUAL_SIZE_RULE = (
    "Equal size: the KLD relative to that of own levels of that size, between the two nearest (log KLD linear in log bytes), "
    "with the interval that holds 95 % of 4000 resamplings of the chunks. A file is better or worse where 1 lies outside it."
)

FEWEST_CHUNKS = 8
"""Fewest chunks from which an interval is computed."""

_SAMPLES = 4000
_SEED = 19
_TAIL = 2.5
"""Percent of the samples beyond either end of an interval: it holds 95 %."""


@dataclass(frozen=True)
class KldRatio:
    """The KLD of a file relative to another's, and the interval that holds 95 % of the resampled ratios."""

    value: float
    low: float
    high: float

    @property
    def figure(self) -> str:
        """``0.93 (0.88 to 0.97)``."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"

    @property
    def lower(self) -> bool:
        return self.high < 1

    @property
    def higher(self) -> bool:
        return self.low > 1


@dataclass(frozen=True)
class EqualSizeVerdict:
    """A file compared with the program's own levels at its size. ``between``: the levels, the smaller first, or the one of its
    size; ``instead``: the own level to take where the outcome is ``take ours``, the largest that is not larger than the file,
    if there is one. ``why``: what prevents a comparison."""

    name: str
    n_bytes: int
    outcome: Outcome
    between: tuple[str, ...] = ()
    ratio: KldRatio | None = None
    instead: str = ""
    why: str = ""

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        if self.outcome == "no honest comparison":
            return f"no honest comparison: {self.why}"
        if self.outcome == "take ours":
            return f"take {self.instead} instead" if self.instead else "own levels are better at its size"
        return f"{self.outcome} (against {' and '.join(self.between)})"


@dataclass(frozen=True)
class SizeChoice:
    """From ``n_bytes`` on, ``name`` is the file to take. ``ratio``: its KLD relative to that of the choice before, ``over``."""

    n_bytes: int
    name: str
    over: str = ""
    ratio: KldRatio | None = None


def at_equal_size(file: MeasuredSize, ladder: Sequence[MeasuredSize]) -> EqualSizeVerdict:
    """Compare a file with the ladder of own levels. Levels that another beats in both size and KLD do not count."""

    def none(why: str) -> EqualSizeVerdict:
        return EqualSizeVerdict(file.level, file.n_bytes, "no honest comparison", why=why)

    known = {each.level: each for each in ladder if each.kld.value > 0 and each.chunks is not None}
    best = [
        known[each.level] for each in front([Measure(name, each.n_bytes, each.kld.value, None) for name, each in known.items()])
    ]
    if not best:
        return none("no own level was measured on this text")
    if file.chunks is None or len(file.chunks) < FEWEST_CHUNKS:
        return none(f"at least {FEWEST_CHUNKS} chunks must be measured")
    same = [each for each in best if abs(math.log(each.n_bytes / file.n_bytes)) < SAME_SIZE]
    below = [each for each in best if each.n_bytes < file.n_bytes]
    above = [each for each in best if each.n_bytes > file.n_bytes]
    if same:
        around: tuple[MeasuredSize, ...] = (min(same, key=lambda each: abs(each.n_bytes - file.n_bytes)),)
        weights: tuple[float, ...] = (1.0,)
    elif not below:
        return none(f"it is smaller than {best[0].level} ({human_bytes(best[0].n_bytes)}), the smallest own level")
    elif not above:
        return none(f"it is larger than {best[-1].level} ({human_bytes(best[-1].n_bytes)}), the largest own level")
    else:
        around = (below[-1], above[0])
        upper = math.log(file.n_bytes / around[0].n_bytes) / math.log(around[1].n_bytes / around[0].n_bytes)
        weights = (1 - upper, upper)
    ratio = kld_ratio(file, around, weights)
    if ratio is None:
        return none("a mean KLD of 0 has no ratio")
    outcome: Outcome = "take it" if ratio.lower else "take ours" if ratio.higher else "no difference seen"
    instead = (same or below)[-1].level if ratio.higher else ""
    return EqualSizeVerdict(file.level, file.n_bytes, outcome, tuple(each.level for each in around), ratio, instead)


def size_choices(files: Sequence[MeasuredSize]) -> tuple[SizeChoice, ...]:
    """Which file to take at which size, from the smallest: a larger one only where its KLD is lower beyond doubt (the whole
    interval). Of files of the same size the closest to the source counts."""
    measured = {each.level: each for each in files if each.chunks is not None and len(each.chunks) >= FEWEST_CHUNKS}
    best = front([Measure(name, each.n_bytes, each.kld.value, None) for name, each in measured.items()])
    found: list[SizeChoice] = []
    for each in (measured[point.level] for point in best):
        if not found:
            found.append(SizeChoice(each.n_bytes, each.level))
            continue
        ratio = kld_ratio(each, (measured[found[-1].name],), (1.0,))
        if ratio is not None and ratio.lower:
            found.append(SizeChoice(each.n_bytes, each.level, found[-1].name, ratio))
    return tuple(found)


def kld_ratio(file: MeasuredSize, others: Sequence[MeasuredSize], weights: Sequence[float]) -> KldRatio | None:
    """The KLD of a file relative to the geometric mean of others, with these weights; None where a KLD is not above 0.

    All are compared on the chunks that all of them have.
    """
    chunks = [each.chunks for each in (file, *others) if each.chunks is not None]
    shared = min(map(len, chunks))
    own, *rest = (_resampled(means[:shared]) for means in chunks)
    if min(float(own.min()), *(float(means.min()) for means in rest)) <= 0:
        return None
    logs = np.log(own) - sum(weight * np.log(means) for weight, means in zip(weights, rest, strict=True))
    low, high = np.percentile(logs[1:], (_TAIL, 100 - _TAIL))
    return KldRatio(math.exp(float(logs[0])), math.exp(float(low)), math.exp(float(high)))


def _resampled(means: ChunkMeans) -> npt.NDArray[np.float64]:
    """The mean of the chunks, then those of the resampled ones."""
    found: npt.NDArray[np.float64] = np.concatenate(([means.mean()], means[_draws(len(means))].mean(axis=1)))
    return found


@lru_cache(maxsize=4)
def _draws(n_chunks: int) -> npt.NDArray[np.int64]:
    """The numbers of the chunks in each sample, [samples, n_chunks]: the same for all files."""
    return np.random.default_rng(_SEED).integers(0, n_chunks, (_SAMPLES, n_chunks))
