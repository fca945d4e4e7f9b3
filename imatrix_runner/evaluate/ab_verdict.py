"""Was the imatrix worth it? Compares a level with its baseline on the same text, and gives a verdict by a stated rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.measures import Divergence, Estimate

Verdict = Literal["not needed", "take it", "do not go without", "undecided"]

LITTLE, MUCH = 0.03, 0.10
RULE = (
    f"The rule: where the imatrix takes away less than {100 * LITTLE:g} % of the KLD it is not needed; "
    f"more than {100 * MUCH:g} %: do not go without; between: take it, it is free at inference."
)
_NOTHING = 1e-4
"""Mean KLD of a baseline up to which it is rounding alone, so that an imatrix cannot reduce it."""
_FEWEST = 11
"""Number of scored tokens from which on a standard error means something."""


@dataclass(frozen=True)
class Comparison:
    """``level`` with and without imatrix. ``saved``: the share of the baseline's KLD that the imatrix takes away (negative: it
    adds); ``kld``, ``ppl``, ``same_top``: with minus without. Errors are those of the paired difference where tokens are known.

    ``sure``: the saved share is more than two of its standard errors from 0. The verdict is ``undecided`` where it is not, and
    yet may be large.
    """

    level: str
    with_imatrix: Divergence
    without: Divergence
    saved: Estimate
    kld: Estimate
    ppl: Estimate
    same_top: Estimate
    verdict: Verdict
    sure: bool

    @property
    def remark(self) -> str:
        """What qualifies the verdict; empty if nothing does."""
        if self.verdict == "undecided":
            return "too few tokens"
        if not self.sure:
            return "within two standard errors"
        return "closer to the source without it" if self.saved.value < 0 else ""


def verdict_by_rule(saved: float) -> Verdict:
    """Apply :data:`RULE` to the saved share, without regard to its error."""
    if saved < LITTLE:
        return "not needed"
    return "do not go without" if saved > MUCH else "take it"


def compare(
    level: str,
    with_imatrix: Divergence,
    without: Divergence,
    tokens: tuple[npt.NDArray[np.void], npt.NDArray[np.void]] | None = None,
) -> Comparison:
    """Compare a level with its baseline. ``tokens``: the token scores of both, in the same order, for the errors of paired
    differences: both find the same words hard, so their difference is known better than either. Without them the two count
    as independent."""
    kld, ppl, same = _apart(with_imatrix, without) if tokens is None else _paired(with_imatrix, without, *tokens)
    saved = _saved(with_imatrix.kld, without.kld, tokens)
    sure = abs(saved.value) > 2 * saved.error and with_imatrix.n_tokens >= _FEWEST
    verdict = verdict_by_rule(saved.value)
    if without.kld.value <= _NOTHING:
        verdict = "not needed"
    elif not sure and (verdict != "not needed" or saved.value + 2 * saved.error >= MUCH or with_imatrix.n_tokens < _FEWEST):
        verdict = "undecided"
    return Comparison(level, with_imatrix, without, saved, kld, ppl, same, verdict, sure)


def _apart(one: Divergence, other: Divergence) -> tuple[Estimate, Estimate, Estimate]:
    pairs = ((one.kld, other.kld), (one.ppl, other.ppl), (one.same_top, other.same_top))
    kld, ppl, same = (Estimate(a.value - b.value, math.hypot(a.error, b.error)) for a, b in pairs)
    return kld, ppl, same


def _paired(
    one: Divergence, other: Divergence, mine: npt.NDArray[np.void], theirs: npt.NDArray[np.void]
) -> tuple[Estimate, Estimate, Estimate]:
    kld = _mean(mine["kld"] - theirs["kld"])
    same = _mean(mine["same"].astype(np.float64) - theirs["same"])
    # PPL = exp(mean nll): d(PPL - PPL') = PPL * d(nll) - PPL' * d(nll'), token by token.
    steps = one.ppl.value * mine["nll"].astype(np.float64) - other.ppl.value * theirs["nll"].astype(np.float64)
    return kld, Estimate(one.ppl.value - other.ppl.value, _mean(steps).error), same


def _saved(one: Estimate, other: Estimate, tokens: tuple[npt.NDArray[np.void], npt.NDArray[np.void]] | None) -> Estimate:
    """(without - with) / without, with the error of a ratio of means (W. G. Cochran, Sampling Techniques, 2.11)."""
    if other.value <= 0:
        return Estimate(0.0, 0.0)
    ratio = one.value / other.value
    if tokens is None:
        spread = math.hypot(one.error, ratio * other.error)
    else:
        spread = _mean(tokens[0]["kld"] - ratio * tokens[1]["kld"]).error
    return Estimate(1 - ratio, spread / other.value)


def _mean(values: npt.NDArray[np.float64]) -> Estimate:
    n = len(values)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0)
