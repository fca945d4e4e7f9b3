"""The KLD that any change of a tensor brings, however small. Pure.

A model that computes with 16-bit activations rounds them anew after each change, so that the smallest one moves the logits: in
the demo model by 1.4e-5 nats where a tensor of the first layer changes, and by 5e-6 in the last (docs/measurements.md). It is
not what a rounding costs, because a file whose tensors all change has it once. So it is subtracted from trials.

It is the intercept of KLD over error: for small errors KLD is proportional to the error, so that two trials of one tensor give
it. Insensitive tensors give it best. A layer may have few of those, so its background is moved towards the model's.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from imatrix_runner.engines.measures import Estimate

_LAYER = re.compile(r"blk\.\d+\.")
_APART = 2.0  # least ratio of the errors of two trials
_FEWEST = 3  # intercepts
_UNLIKE = 0.1
"""How far KLD is from being proportional to the error, as a share of it."""
_BETWEEN = 0.5
"""How far layers are apart, as a share of the model's background."""


@dataclass(frozen=True)
class TrialPoint:
    """What one trial measured: the names of its tensors, their mean relative error, and the KLD."""

    names: tuple[str, ...]
    error: float
    kld: Estimate


@dataclass(frozen=True)
class Background:
    """In nats: ``typical`` of the model, 0 if the trials do not show it."""

    typical: float
    _layers: Mapping[str, float] = field(repr=False)

    @classmethod
    def of(cls, points: Iterable[TrialPoint]) -> Background:
        """From all trials. Without two of one tensor, for a few tensors, there is none."""
        by_tensors: dict[tuple[str, ...], list[TrialPoint]] = defaultdict(list)
        for point in points:
            by_tensors[point.names].append(point)
        intercepts = {names: found for names, each in by_tensors.items() if (found := _intercept(each)) is not None}
        if len(intercepts) < _FEWEST:
            return cls(0.0, {})
        typical = max(0.0, _weighted_median([*intercepts.values()]))
        if not typical:
            return cls(0.0, {})
        by_layer = defaultdict(list)
        for names, intercept in intercepts.items():
            by_layer[_layer(names[0])].append(intercept)
        prior = Estimate(typical, _BETWEEN * typical)
        return cls(typical, {layer: max(0.0, _mean([prior, *each])) for layer, each in by_layer.items()})

    def at(self, name: str) -> float:
        """The background of trials of this tensor: its layer's, else the model's."""
        return self._layers.get(_layer(name), self.typical)

    @property
    def of_file(self) -> float:
        """The background of a file whose tensors all change: the largest, because the change passes most layers."""
        return max(self._layers.values(), default=self.typical)


def _layer(name: str) -> str:
    """``blk.3.``; the whole name of a tensor outside of the layers."""
    match = _LAYER.match(name)
    return match[0] if match else name


def _intercept(points: Sequence[TrialPoint]) -> Estimate | None:
    """KLD without error, on the line through the two trials with the least errors that are apart."""
    ordered = sorted(points, key=lambda point: point.error)
    first = ordered[0]
    second = next((point for point in ordered if point.error > _APART * first.error), None)
    if second is None or not first.error:
        return None
    share = first.error / (second.error - first.error)
    value = first.kld.value - share * (second.kld.value - first.kld.value)
    known = [error for error in (first.kld.error, share * second.kld.error) if math.isfinite(error)]
    return Estimate(value, math.hypot(_UNLIKE * first.kld.value, *known))


def _weighted_median(estimates: Sequence[Estimate]) -> float:
    """The middle of the values, each counted by its precision."""
    ordered = sorted(estimates, key=lambda each: each.value)
    half = math.fsum(_precision(each) for each in ordered) / 2
    below = 0.0
    for each in ordered:
        below += _precision(each)
        if below >= half:
            break
    return each.value


def _mean(estimates: Sequence[Estimate]) -> float:
    weights = [_precision(each) for each in estimates]
    return math.fsum(w * each.value for w, each in zip(weights, estimates, strict=True)) / math.fsum(weights)


def _precision(estimate: Estimate) -> float:
    return estimate.error**-2 if estimate.error else 0.0
