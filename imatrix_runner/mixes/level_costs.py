"""Predicts the mean KLD of levels from a cost map, before they are made. Pure.

The costs of a level's tensors are added up. Costs are measured one tensor at a time, and their sum ranks levels well but is not
the KLD of one: damages overlap, and a file computes with rounded activations, too. So levels that were measured give the scale
from sums to KLD: its log is linear in the log of the sum between them, and stays the same beyond. The farther the next measured
level, the less sure is a prediction; how far they are off was measured on the demo model (docs/measurements.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from imatrix_runner.mixes.cost_map import CostMap
from imatrix_runner.quantize.recipe import Recipe

FARTHEST = 16.0
"""Ratio of the sum of a level to that of the next measured one up to which it is predicted."""


@dataclass(frozen=True)
class ScaledKld:
    """A predicted ``kld`` in nats; ``apart``: ratio (at least 1) of the level's sum to that of the next measured one."""

    kld: float
    apart: float


@dataclass(frozen=True)
class LevelCosts:
    """``sums``: the costs of each level's tensors together, in nats, by the level's name; ``background``: what any change of
    the model adds to a KLD."""

    sums: Mapping[str, float]
    background: float = 0.0

    @classmethod
    def of(cls, costs: CostMap, recipes: Iterable[Recipe]) -> LevelCosts:
        """Add up the costs of every recipe whose types the map knows; others are left out."""
        known = {(tensor.name, kind): cost for tensor in costs.tensors for kind, cost in tensor.costs.items()}
        sums = {recipe.level.name: _sum(recipe, known) for recipe in recipes if not recipe.failures}
        return cls({name: total for name, total in sums.items() if total is not None}, costs.background)

    def predicted(self, measured: Mapping[str, float]) -> dict[str, ScaledKld]:
        """Predict the levels near those whose KLD was ``measured``. Levels that cost nothing, or whose KLD is background, say
        nothing about the scale and get no prediction."""
        scales: dict[float, list[float]] = {}
        for name, kld in measured.items():
            if (total := self.sums.get(name, 0.0)) > 0 and kld > self.background:
                scales.setdefault(math.log(total), []).append(math.log((kld - self.background) / total))
        places = sorted(scales)
        found: dict[str, ScaledKld] = {}
        for name, total in self.sums.items():
            if total > 0 and places:
                at = math.log(total)
                apart = math.exp(min(abs(at - place) for place in places))
                scale = math.exp(float(np.interp(at, places, [fmean(scales[place]) for place in places])))
                if apart <= FARTHEST:
                    found[name] = ScaledKld(scale * total + self.background, apart)
        return found


def _sum(recipe: Recipe, known: Mapping[tuple[str, str], float]) -> float | None:
    costs = [known.get((tensor.original, tensor.type)) for tensor in recipe.tensors if tensor.changes]
    return math.fsum(cost for cost in costs if cost is not None) if None not in costs else None
