"""Compares recipes by their trials on the same chunks: which is better, and how sure that is. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, hypot, inf, isfinite, log, sqrt

import numpy as np

from imatrix_runner.engines.cost_jobs import TrialResult

SURE = 2.0
"""A mix is taken if its divergence is lower than the stock level's by this many standard errors."""

_LEAST_RATIO = 1e-3

_APART = 0.15
"""How far the typical chunk's ratio is from the whole text's, in logs, where both are known well: of the demo model's levels on
its held-out texts 0.02 to 0.2 (docs/measurements.md)."""


@dataclass(frozen=True)
class RecipeComparison:
    """``ratio``: divergence of a recipe relative to another's, over all tokens, with its standard ``error`` over chunks. A few
    chunks can decide it (a text in a script that the model hardly knows), so ``typical`` is the geometric mean of the chunks'
    own ratios, and ``log_error`` the standard error of its logarithm. ``same_top``: difference of the shares of tokens with the
    source's top token, above 0 is better."""

    ratio: float
    error: float
    typical: float
    log_error: float
    same_top: float

    @property
    def score(self) -> float:
        """Lower is better: what is expected of another text. The ratio of the whole is what counts, but a few chunks may decide
        it; the typical chunk is known better, and is another thing. So each counts by its precision (their mean in logs)."""
        whole, typical = self.error / self.ratio, hypot(self.log_error, _APART)
        if not (self.ratio > 0 and isfinite(whole) and isfinite(typical)):
            return self.ratio
        share = typical**2 / (whole**2 + typical**2)
        return exp(share * log(self.ratio) + (1 - share) * log(self.typical))

    @property
    def is_better(self) -> bool:
        """Whether the recipe is surely better: over all tokens, or in the typical chunk while all tokens do not say otherwise.
        A few chunks may leave the error of the ratio so large that it says nothing."""
        over_all = self.ratio + SURE * self.error < 1
        typically = log(self.typical) + SURE * self.log_error < 0 and self.ratio - self.error < 1
        return self.score < 1 and (over_all or typically)


def kld_per_token(result: TrialResult) -> float:
    """Mean divergence per token, in nats."""
    return sum(result.kld) / sum(result.tokens)


def compare(mine: TrialResult, other: TrialResult) -> RecipeComparison:
    """Compare two trials that computed the same chunks. The error of the ratio of two sums of pairs is linearised
    (Cochran, Sampling Techniques, 2.11): it is small where the chunks that are hard for one recipe are hard for the other."""
    assert mine.chunks == other.chunks
    same_top = (sum(mine.same) - sum(other.same)) / sum(mine.tokens)
    a, b = np.array(mine.kld), np.array(other.kld)
    n = len(a)
    if n < 2 or not (b > 0).all():
        return RecipeComparison(1.0, inf, 1.0, inf, same_top)
    ratio = float(a.sum() / b.sum())
    error = sqrt(float(((a - ratio * b) ** 2).sum()) / (n * (n - 1))) / float(b.mean())
    logs = np.log(np.maximum(a / b, _LEAST_RATIO))
    return RecipeComparison(ratio, error, exp(float(logs.mean())), float(logs.std(ddof=1)) / sqrt(n), same_top)
