"""From scored tokens to the figures people compare, by llama-perplexity's definitions (tools/perplexity/perplexity.cpp)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.measures import DP_FRACTIONS, KLD_FRACTIONS, Divergence, Estimate

F32 = npt.NDArray[np.float32]


def summarise(tokens: npt.NDArray[np.void]) -> Divergence:
    """``tokens``: :data:`~imatrix_runner.engines.files.token_scores.TOKEN` [n], at least 2.

    Products are float32 where llama-perplexity's are and sums float64: errors of differences are what little is left of them.
    Tokens with NaN, infinity or numbers whose squares are infinite give figures that are not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return _summary(tokens)


def _summary(tokens: npt.NDArray[np.void]) -> Divergence:
    n = len(tokens)
    nll, base, kld, dp = (tokens[name] for name in ("nll", "base", "kld", "dp"))
    log_ppl, log_base = _mean(nll), _mean(base)
    together = float((nll * base).mean(dtype=np.float64))
    covariance = (together - log_ppl.value * log_base.value) / (n - 1) if n >= 10 else 0.0
    ppl, ppl_base = _exp(log_ppl), _exp(log_base)
    spread = math.sqrt(max(0.0, log_ppl.error**2 + log_base.error**2 - 2 * covariance))
    log_ratio = Estimate(log_ppl.value - log_base.value, spread)
    shared = ppl.value * ppl_base.value * covariance
    apart = math.sqrt(max(0.0, ppl.error**2 + ppl_base.error**2 - 2 * shared))
    both = log_ppl.error * log_base.error
    squares = _mean((dp * dp).astype(np.float64))
    rms = math.sqrt(squares.value)
    same = float(tokens["same"].astype(np.float64).mean())
    return Divergence(
        n_tokens=n,
        ppl=ppl,
        ppl_base=ppl_base,
        correlation=covariance / both if both else 1.0,
        log_ratio=log_ratio,
        ratio=_exp(log_ratio),
        difference=Estimate(ppl.value - ppl_base.value, apart),
        kld=_mean(kld),
        kld_at=_fractions(kld.astype(np.float32), KLD_FRACTIONS),
        dp=_mean(dp),
        dp_at=_fractions(dp, DP_FRACTIONS),
        dp_rms=Estimate(rms, 0.5 / rms * squares.error if rms else 0.0),
        same_top=Estimate(same, math.sqrt(same * (1 - same) / (n - 1))),
    )


def perplexity_ratio(nll: F32, source: F32) -> tuple[Estimate, Estimate]:
    """The source's perplexity, and the level's over it with the error of paired tokens; both from -ln p float32 [n]."""
    ours, theirs = nll.astype(np.float64), source.astype(np.float64)
    return _exp(_mean(theirs)), _exp(_mean(ours - theirs))


def _mean(values: npt.NDArray[np.floating[Any]]) -> Estimate:
    """The mean and its standard error; none for ten values or fewer."""
    n = len(values)
    mean = float(values.mean(dtype=np.float64))
    variance = float((values * values).mean(dtype=np.float64)) - mean * mean
    return Estimate(mean, math.sqrt(variance / (n - 1)) if variance > 0 and n > 10 else 0.0)


def _exp(log: Estimate) -> Estimate:
    value = math.exp(min(log.value, 700.0))
    return Estimate(value, value * log.error)


def _fractions(values: npt.NDArray[np.float32], fractions: tuple[float, ...]) -> dict[float, float]:
    """Linear between the two nearest of the sorted values."""
    ordered = np.sort(values)
    found: dict[float, float] = {}
    for fraction in fractions:
        place = np.float32(fraction) * np.float32(len(ordered) - 1)
        low = min(int(place), len(ordered) - 1)
        share = place - np.float32(low)
        high = min(low + 1, len(ordered) - 1)
        found[fraction] = float((np.float32(1) - share) * ordered[low] + share * ordered[high])
    return found
