"""What rounding a tensor costs: predictions for all types from trials of a few. Pure.

The KLD of a trial, less the background that any change has (:mod:`.background`), follows a power of the tensor's error,
``KLD = S * e^alpha``, with e the rounding error as a share of the tensor (both weighted by the imatrix). For small errors alpha
is 1, because KLD is quadratic in what moves the logits. It is lower where a tensor is so damaged that KLD saturates, and higher
where its errors amplify each other. So it is fitted: log KLD is linear in log e between the trials of a tensor. Beyond them it
continues with an exponent from the tensor's own trials, as far as they determine it, else with the model's.

A tensor without a trial is taken for the median of its kind (the same name in other layers), else of the model.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingError, Trial, TrialResult
from imatrix_runner.engines.measures import Estimate
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.mixes.background import Background, TrialPoint
from imatrix_runner.models.tensor_patterns import component

EXPONENTS = (0.5, 2.0)
"""Least and largest exponent: KLD between linear and quartic in the size of an error. Fits outside are noise: between Q2_K and
Q6_K the demo model's tensors have 0.96 to 1.04, between neighbouring types 0.7 to 1.3 (docs/measurements.md)."""

COMMON_ERROR = 1 / 256
"""The relative error at which sensitivities are compared: about what Q4_K does to most tensors."""

_COMMON = math.log(COMMON_ERROR)
_EXPECTED = 1.0  # exponent where too few tensors have one
_LEAST_FLOOR = 1e-9  # nats: rounding errors of float32 log-probabilities (1e-7), averaged over some hundred tokens
_LEAST_LEFT = 0.1  # what a trial keeps at least, as a share of the background: about the error of that
_APART = math.log(2)  # how far errors of two trials must be apart for an exponent
_SURE = 2.0  # standard errors
_FEW = 3  # tensors from which on a median and a spread mean something
_SPREAD, _LEAST_SPREAD = 0.25, 0.05  # of exponents between tensors: assumed, and at least


@dataclass(frozen=True)
class Sensitivity:
    """``kld``: what rounding this tensor with :data:`COMMON_ERROR` costs, in nats, with its standard error (infinite: unknown).
    ``exponent``: of KLD over error there. ``measured``: by a trial of this tensor."""

    kld: Estimate
    exponent: float
    measured: bool


@dataclass(frozen=True)
class _Point:
    """A trial's part for one tensor: log of error and KLD, and the trial it comes from. ``sure``: significantly above zero;
    ``spread``: standard error of ``log_kld``."""

    log_error: float
    log_kld: float
    spread: float
    sure: bool
    result: TrialResult


@dataclass(frozen=True)
class _Curve:
    """log KLD over log error: linear between ``knots`` (rising in both), with the exponents ``low`` and ``high`` beyond."""

    knots: tuple[tuple[float, float], ...]
    low: float
    high: float
    spread: float = math.inf

    def at(self, log_error: float) -> float:
        place = bisect_right(self.knots, log_error, key=lambda knot: knot[0])
        if place == 0:
            first, level = self.knots[0]
            return level + self.low * (log_error - first)
        if place == len(self.knots):
            last, level = self.knots[-1]
            return level + self.high * (log_error - last)
        (left, below), (right, above) = self.knots[place - 1 : place + 1]
        return below + (above - below) * (log_error - left) / (right - left)

    def exponent(self, log_error: float) -> float:
        place = bisect_right(self.knots, log_error, key=lambda knot: knot[0])
        if place in (0, len(self.knots)):
            return self.high if place else self.low
        (left, below), (right, above) = self.knots[place - 1 : place + 1]
        return (above - below) / (right - left)


@dataclass(frozen=True)
class _Exponents:
    """What the tensors' exponents have in common: their median, and how far they are spread around it."""

    centre: float
    spread: float

    @classmethod
    def of(cls, slopes: Sequence[Estimate]) -> _Exponents:
        if len(slopes) < _FEW:
            return cls(_EXPECTED, _SPREAD)
        centre = median(slope.value for slope in slopes)
        scatter = 1.4826 * median(abs(slope.value - centre) for slope in slopes)  # of a normal distribution
        own = scatter**2 - median(slope.error**2 for slope in slopes)
        return cls(_clamped(centre), max(math.sqrt(max(0.0, own)), _LEAST_SPREAD))

    def shrunk(self, slope: Estimate | None) -> float:
        """A tensor's slope, moved towards the centre as far as it is uncertain: the mean of both by their precision."""
        if slope is None:
            return self.centre
        share = self.spread**2 / (self.spread**2 + slope.error**2)
        return _clamped(share * slope.value + (1 - share) * self.centre)


@dataclass(frozen=True)
class CostModel:
    """Costs of all candidate types of all tensors. A cost is what the type adds to the KLD of a file, before that is scaled;
    costs of different tensors are added. Of two types of one tensor (both with the imatrix, or both without) the one with the
    larger error never costs less, unless trials measured that it does. ``floor``: see :func:`noise_floor`."""

    floor: float
    background: Background
    _errors: Mapping[RoundedTensor, float] = field(repr=False)
    _measured: Mapping[RoundedTensor, float] = field(repr=False)
    _curves: Mapping[tuple[str, bool], _Curve] = field(repr=False)
    _kinds: Mapping[str, _Curve] = field(repr=False)
    _any: _Curve = field(repr=False)

    @classmethod
    def of(cls, errors: Iterable[RoundingError], trials: Iterable[Trial], results: Iterable[TrialResult]) -> CostModel:
        """``errors`` of all candidates; ``trials`` each of one tensor, or of a few that are rounded together, and their
        ``results`` as far as there are any (those of other trials are left out). A trial's KLD, less the background, is divided
        among its tensors in proportion to their relative errors.

        Raises :class:`InvalidDataError` for numbers that are not finite, and if there is no result at all.
        """
        relative = {error.tensor: _relative(error) for error in errors}
        known = {trial.name: trial.tensors for trial in trials}
        used = [result for result in results if result.trial in known]
        errors_of = {name: {tensor: relative[tensor] for tensor in known[name]} for name in {each.trial for each in used}}
        floor, background = noise_floor(used), Background.of(_trial_points(used, errors_of))
        points: dict[RoundedTensor, _Point] = {}
        for result in sorted(used, key=lambda result: sum(result.tokens)):  # of two, the one with more tokens stays
            points.update(_points(errors_of[result.trial], result, floor, background))
        if not points:
            raise InvalidDataError(
                "The costs of rounding cannot be predicted",
                "no trial of a tensor has a result",
                "Run the same command again; it measures what is missing.",
            )
        measured = {tensor: math.exp(point.log_kld) for tensor, point in points.items()}
        return cls(floor, background, relative, measured, *_curves(points))

    def cost(self, tensor: RoundedTensor) -> float:
        """What rounding this tensor to this type costs: where there was a trial, its KLD less the background. Raises KeyError
        for a candidate whose error is not known."""
        error = self._errors[tensor]
        if not error:
            return 0.0
        return self._measured.get(tensor) or math.exp(self._curve(tensor.name, tensor.weighted).at(math.log(error)))

    def sensitivity(self, name: str, weighted: bool = True) -> Sensitivity:
        """How sensitive a tensor is: for comparing tensors, not types."""
        curve = self._curve(name, weighted)
        kld = math.exp(curve.at(_COMMON))
        measured = (name, True) in self._curves or (name, False) in self._curves
        return Sensitivity(Estimate(kld, kld * curve.spread), curve.exponent(_COMMON), measured)

    def _curve(self, name: str, weighted: bool) -> _Curve:
        own = self._curves.get((name, weighted)) or self._curves.get((name, not weighted))
        return own or self._kinds.get(component(name), self._any)


def mean_kld(result: TrialResult) -> Estimate:
    """The mean KLD of a trial over its tokens, in nats. Its standard error is that of a ratio of sums over chunks
    (W. G. Cochran, Sampling Techniques, 2.11); infinite for a single chunk. Raises :class:`InvalidDataError` for a mean that is
    not finite.
    """
    tokens, n_chunks = sum(result.tokens), len(result.chunks)
    if tokens <= 0 or not all(map(math.isfinite, result.kld)):
        raise InvalidDataError(
            f"The trial {result.trial} has no usable result",
            "its KLD is not a finite number" if tokens else "it scored no token",
            "Check the model and the calibration text with 'imatrix-runner doctor', then run the same command again.",
        )
    mean = math.fsum(result.kld) / tokens
    if n_chunks < 2:
        return Estimate(mean, math.inf)
    squares = math.fsum((each - mean * count) ** 2 for each, count in zip(result.kld, result.tokens, strict=True))
    return Estimate(mean, math.sqrt(squares * n_chunks / (n_chunks - 1)) / tokens)


def noise_floor(results: Iterable[TrialResult]) -> float:
    """The KLD below which a trial cannot be told from no change, in nats. A KLD is never negative, so that negative chunks show
    how large rounding errors of the computation are."""
    means = [kld / count for result in results for kld, count in zip(result.kld, result.tokens, strict=True) if count]
    return max(_LEAST_FLOOR, _SURE * max((-mean for mean in means if math.isfinite(mean)), default=0.0))


def _relative(error: RoundingError) -> float:
    if not (math.isfinite(error.weighted) and math.isfinite(error.norm)):
        raise InvalidDataError(
            f"The rounding error of {error.tensor.name} as {error.tensor.type} is not a finite number",
            "the tensor or its entry in the imatrix holds numbers that are infinite or not numbers",
            "Check both with 'imatrix-runner imatrix check', and convert the model or generate the imatrix again.",
        )
    return error.weighted / error.norm if error.norm > 0 else 0.0


def _trial_points(
    results: Iterable[TrialResult], errors_of: Mapping[str, Mapping[RoundedTensor, float]]
) -> Iterator[TrialPoint]:
    for result in results:
        errors = errors_of[result.trial]
        if errors:
            yield TrialPoint(tuple(tensor.name for tensor in errors), fmean(errors.values()), mean_kld(result))


def _points(
    errors: Mapping[RoundedTensor, float], result: TrialResult, floor: float, background: Background
) -> Iterator[tuple[RoundedTensor, _Point]]:
    """What a trial says about each of its tensors that is rounded at all."""
    kld, whole = mean_kld(result), math.fsum(errors.values())
    common = max((background.at(tensor.name) for tensor in errors), default=0.0)
    value = max(kld.value - common, _LEAST_LEFT * common, floor)
    sure = kld.value - common > max(floor, common, _SURE * kld.error)
    for tensor, error in errors.items():
        if error:
            yield tensor, _Point(math.log(error), math.log(value * error / whole), kld.error / value, sure, result)


def _curves(points: Mapping[RoundedTensor, _Point]) -> tuple[dict[tuple[str, bool], _Curve], dict[str, _Curve], _Curve]:
    """The curves of tensors with trials, those of kinds, and that of any tensor."""
    own: dict[tuple[str, bool], list[_Point]] = defaultdict(list)
    for tensor, point in points.items():
        own[tensor.name, tensor.weighted].append(point)
    exponents = _Exponents.of([slope for each in own.values() if (slope := _widest_slope(each)) is not None])
    curves = {key: _fitted(each, exponents) for key, each in own.items()}
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, weighted in curves:
        if weighted or (name, True) not in curves:
            kinds[component(name)].append(curves[name, weighted].at(_COMMON))
    levels = [level for each in kinds.values() for level in each]
    return curves, {kind: _typical(each, exponents) for kind, each in kinds.items()}, _typical(levels, exponents)


def _fitted(points: Sequence[_Point], exponents: _Exponents) -> _Curve:
    """The curve through a tensor's points. Beyond them it continues with the exponent of the two nearest, else of all."""
    ordered = sorted(points, key=lambda point: point.log_error)
    widest = _widest_slope(ordered)
    low, high = (exponents.shrunk(_slope(pair[0], pair[-1]) or widest) for pair in (ordered[:2], ordered[-2:]))
    return _Curve(_rising(ordered), low, high, min(point.spread for point in ordered))


def _typical(levels: Sequence[float], exponents: _Exponents) -> _Curve:
    """The curve of a tensor without trials, from the levels of others at the common error."""
    return _Curve(((_COMMON, median(levels)),), exponents.centre, exponents.centre)


def _rising(points: Sequence[_Point]) -> tuple[tuple[float, float], ...]:
    """Knots through the points, which are in order of their errors. Points that fall, and points of one error, are replaced by
    their mean (isotonic regression: pool adjacent violators), at the outer errors of the pool."""
    pools: list[list[_Point]] = []
    for point in points:
        pools.append([point])
        while len(pools) > 1 and (_level(pools[-1]) < _level(pools[-2]) or pools[-1][0].log_error == pools[-2][-1].log_error):
            last = pools.pop()
            pools[-1] += last
    return tuple((error, _level(pool)) for pool in pools for error in dict.fromkeys((pool[0].log_error, pool[-1].log_error)))


def _level(pool: Sequence[_Point]) -> float:
    """The mean of the points' log KLD, weighted by precision; all the same where none is known."""
    known = [max(point.spread, _LEAST_SPREAD) ** -2 for point in pool]
    precision = known if any(known) else [1.0] * len(pool)
    return math.fsum(w * point.log_kld for w, point in zip(precision, pool, strict=True)) / math.fsum(precision)


def _widest_slope(points: Sequence[_Point]) -> Estimate | None:
    """The exponent between the points with the least and the largest error, of those that are sure."""
    sure = sorted((point for point in points if point.sure), key=lambda point: point.log_error)
    return _slope(sure[0], sure[-1]) if sure else None


def _slope(one: _Point, other: _Point) -> Estimate | None:
    """The exponent between two points, with its standard error; None if they do not determine one."""
    apart = other.log_error - one.log_error
    if apart < _APART or not (one.sure and other.sure):
        return None
    return Estimate((other.log_kld - one.log_kld) / apart, _spread_of_ratio(one, other) / apart)


def _spread_of_ratio(one: _Point, other: _Point) -> float:
    """The standard error of the log of two trials' ratio: paired over the chunks that both have, because a chunk that is hard
    for one is hard for the other."""
    first, second = (dict(zip(point.result.chunks, point.result.kld, strict=True)) for point in (one, other))
    shared = [chunk for chunk in first if chunk in second]
    sums = [math.fsum(each[chunk] for chunk in shared) for each in (first, second)]
    if len(shared) < 2 or min(sums) <= 0:
        return math.hypot(one.spread, other.spread)
    squares = math.fsum((first[chunk] / sums[0] - second[chunk] / sums[1]) ** 2 for chunk in shared)
    return math.sqrt(squares * len(shared) / (len(shared) - 1))


def _clamped(exponent: float) -> float:
    return min(max(exponent, EXPONENTS[0]), EXPONENTS[1])
