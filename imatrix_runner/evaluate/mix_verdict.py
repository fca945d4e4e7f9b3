"""Is a mix better than stock on the held-out text? Compares its KLD with that of the stock levels around its size. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.measures import Estimate
from imatrix_runner.evaluate.recommendations import SAME_SIZE, Measure, front
from imatrix_runner.files import human_bytes
from imatrix_runner.mixes.compare_recipes import SURE

ChunkMeans = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredSize:
    """A measured level: its bytes, its mean KLD, and the mean of every chunk of the text (None: not known)."""

    level: str
    n_bytes: int
    kld: Estimate
    chunks: ChunkMeans | None = None


@dataclass(frozen=True)
class StockFigure:
    """A stock level that a mix is compared with."""

    level: str
    n_bytes: int
    kld: Estimate


@dataclass(frozen=True)
class MixVerdict:
    """A mix compared with stock levels on the same text.

    ``stock``: the two levels between which its size lies, the smaller first, or one. ``ratio``: its KLD relative to theirs at
    its size, over all tokens. A few chunks can decide that, so ``typical`` is the geometric mean of the chunks' own ratios
    (None: chunks are not known). ``nearest``: the stock level nearest in size.
    """

    level: str
    kld: Estimate
    stock: tuple[StockFigure, ...]
    ratio: Estimate
    nearest: str
    typical: Estimate | None = None

    @property
    def is_better(self) -> bool:
        """Whether its KLD is lower, and by two standard errors over all tokens or in the typical chunk: the rule by which its
        types were chosen (:class:`~imatrix_runner.mixes.compare_recipes.RecipeComparison`)."""
        over_all = self.ratio.value + SURE * self.ratio.error < 1
        typical = self.typical
        typically = typical is not None and math.log(typical.value) + SURE * typical.error / typical.value < 0
        return self.ratio.value < 1 and (over_all or typically)

    @property
    def nearest_figure(self) -> StockFigure:
        return next(each for each in self.stock if each.level == self.nearest)

    @property
    def against(self) -> str:
        """What it is compared with, in words: ``Q4_K_M``, ``stock between IQ3_XXS and Q4_K_M``."""
        names = " and ".join(each.level for each in self.stock)
        return names if len(self.stock) == 1 else f"stock between {names}"

    @property
    def figure(self) -> str:
        """The ratio with its error: ``0.48 ± 0.07``."""
        return f"{self.ratio.value:.2f} ± {self.ratio.error:.2f}"


def describe(verdict: MixVerdict, text: str) -> str:
    """The verdict in a sentence or two. ``text``: the name of the held-out text."""
    typical = f", {verdict.typical.value:.2f} in the typical chunk" if verdict.typical is not None else ""
    figure = f"its KLD is {verdict.figure} of that of {verdict.against}{typical}"
    if verdict.is_better:
        return f"{verdict.level} is better than stock on {text}: {figure}."
    nearest = verdict.nearest_figure
    return (
        f"{verdict.level} is not better than stock on {text} by {SURE:g} standard errors: {figure}. "
        f"Take {nearest.level} ({human_bytes(nearest.n_bytes)}) instead."
    )


def against_stock(mix: MeasuredSize, stock: Sequence[MeasuredSize], chosen_against: str) -> MixVerdict | None:
    """Compare a mix with the best stock levels of its size; None if none was measured.

    Stock levels that another beats in both size and KLD do not count. Between the two whose sizes enclose the mix's, log KLD
    is linear in log bytes. Beyond the smallest and the largest the mix is compared with ``chosen_against``, the level that it
    was compared with when its types were chosen. The error is that of paired chunks where all are known, else an upper bound.
    Where levels were measured on different numbers of chunks, the ratio is that on the chunks that all of them have.
    """
    known = {each.level: each for each in stock if each.kld.value > 0}
    around = _around(mix.n_bytes, known) or tuple(filter(None, [known.get(chosen_against)]))
    if not around or mix.kld.value <= 0:
        return None
    weights = _weights(mix.n_bytes, around)
    own, *theirs = _means((mix, *around))
    if min(own, *theirs) <= 0:
        return None
    expected = math.exp(sum(weight * math.log(mean) for mean, weight in zip(theirs, weights, strict=True)))
    ratio = own / expected
    nearest = min(around, key=lambda each: abs(math.log(each.n_bytes / mix.n_bytes)))
    return MixVerdict(
        mix.level,
        mix.kld,
        tuple(StockFigure(each.level, each.n_bytes, each.kld) for each in around),
        Estimate(ratio, ratio * _relative_error(mix, around, weights)),
        nearest.level,
        _typical(mix, around, weights),
    )


def _means(levels: Sequence[MeasuredSize]) -> list[float]:
    """The mean KLD of each level, on the chunks that all of them have where their numbers differ."""
    counts = {len(each.chunks) for each in levels if each.chunks is not None}
    if len(counts) < 2 or any(each.chunks is None for each in levels):
        return [each.kld.value for each in levels]
    return [float(each.chunks[: min(counts)].mean()) for each in levels if each.chunks is not None]


def _around(n_bytes: int, stock: dict[str, MeasuredSize]) -> tuple[MeasuredSize, ...]:
    """The levels whose sizes enclose ``n_bytes``: two, or one of that size; none beyond the ends."""
    best = [
        stock[each.level] for each in front([Measure(name, each.n_bytes, each.kld.value, None) for name, each in stock.items()])
    ]
    if same := [each for each in best if abs(math.log(each.n_bytes / n_bytes)) < SAME_SIZE]:
        return (min(same, key=lambda each: abs(each.n_bytes - n_bytes)),)
    below = [each for each in best if each.n_bytes < n_bytes]
    above = [each for each in best if each.n_bytes > n_bytes]
    return (below[-1], above[0]) if below and above else ()


def _weights(n_bytes: int, around: Sequence[MeasuredSize]) -> tuple[float, ...]:
    """The share of each level's log KLD in the interpolated one."""
    if len(around) == 1:
        return (1.0,)
    small, large = around
    upper = math.log(n_bytes / small.n_bytes) / math.log(large.n_bytes / small.n_bytes)
    return (1 - upper, upper)


def _relative_error(mix: MeasuredSize, around: Sequence[MeasuredSize], weights: Sequence[float]) -> float:
    """Standard error of the log of the ratio, a sum of log means. Each is linearised: a chunk's mean relative to the whole.
    Chunks are paired, because those that are hard for one level are hard for the others."""
    chunks = _paired(mix, around)
    if chunks is None:
        levels = zip((mix, *around), (1.0, *weights), strict=True)
        return math.hypot(*(weight * each.kld.error / each.kld.value for each, weight in levels))
    return _error(np.sum([sign * means / means.mean() for sign, means in zip(_signs(weights), chunks, strict=True)], axis=0))


def _typical(mix: MeasuredSize, around: Sequence[MeasuredSize], weights: Sequence[float]) -> Estimate | None:
    """The geometric mean of the chunks' ratios."""
    chunks = _paired(mix, around)
    if chunks is None or any((means <= 0).any() for means in chunks):
        return None
    logs = np.sum([sign * np.log(means) for sign, means in zip(_signs(weights), chunks, strict=True)], axis=0)
    value = math.exp(float(logs.mean()))
    return Estimate(value, value * _error(logs))


def _paired(mix: MeasuredSize, around: Sequence[MeasuredSize]) -> list[ChunkMeans] | None:
    """The chunks that the mix and each stock level have; None if some are not known, or if there is only one."""
    chunks = [each.chunks for each in (mix, *around) if each.chunks is not None]
    shared = min(map(len, chunks), default=0)
    return [means[:shared] for means in chunks] if len(chunks) == 1 + len(around) and shared > 1 else None


def _signs(weights: Sequence[float]) -> tuple[float, ...]:
    """What the logs of the mix and of each stock level are multiplied with in the log of the ratio."""
    return (1.0, *(-weight for weight in weights))


def _error(values: npt.NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))
