"""Weighs the chunks of probes, so that a few do not decide what every tensor costs. Pure.

A few chunks of a text (a script that the model hardly knows) can have a hundred times the divergence of the others. In a plain
mean they outvote all others, although they are few and tell little about another text. So each chunk weighs in proportion to a
power of its usual divergence: with the power 0 a chunk that diverges more has more say, with -1 every chunk has the same say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.cost_jobs import TrialResult

Floats = npt.NDArray[np.float64]

POWER = -0.5
"""Half way (docs/measurements.md)."""

_FEWEST = 4
"""Probes with all chunks from which on the usual divergence of a chunk is known."""


def tempered(results: Sequence[TrialResult], power: float = POWER) -> tuple[TrialResult, ...]:
    """The same probes with the divergences of their chunks weighed, so that their means can be compared. A probe that ended
    early is compared with the others on the chunks that it has."""
    most = max((len(result.chunks) for result in results), default=0)
    whole = [np.array(result.kld) for result in results if len(result.chunks) == most and sum(result.kld) > 0]
    if len(whole) < _FEWEST or most < 2:
        return tuple(results)
    usual = np.mean([each / each.mean() for each in whole], axis=0)
    if not (usual > 0).all():
        return tuple(results)
    weights = usual**power
    return tuple(_weighed(result, weights[: len(result.chunks)], usual[: len(result.chunks)]) for result in results)


def _weighed(result: TrialResult, weights: Floats, usual: Floats) -> TrialResult:
    """A probe that diverges as usual in every chunk keeps its mean, whichever chunks it has."""
    scale = 1.0 / float((weights * usual).mean())
    return replace(result, kld=tuple((np.array(result.kld) * weights * scale).tolist()))
