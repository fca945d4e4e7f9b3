"""A level's scores on tasks next to its source's, item by item: differences with their errors, and verdicts. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Literal

from imatrix_runner.engines.measures import Estimate

Verdict = Literal["alarm", "worse", "better", "no difference seen"]

ALARM = 0.05
"""A drop of more than this raises the alarm: five points of a share, or five percent of other figures."""

SIGNIFICANT = 0.05
"""Two-sided probability of a difference as large by chance, below which it counts as seen."""

_POWER = (1.959964 + 0.841621) ** 2
"""(z of 97.5 % + z of 80 %)²: a difference is seen at the 5 % level in four of five tries."""

_RESAMPLES = 4000
_SEED = 20_261_201

TASK_RULE = (
    "Alarm: the score dropped by more than 5 points (5 % of scores that are no shares), and by more than chance explains "
    "(p < 5 %: exact McNemar test where items are right or wrong, else paired bootstrap). A difference that chance explains "
    "is not seen; the items needed would show one of 5 points in four of five tries."
)


@dataclass(frozen=True)
class TaskItems:
    """The scores of one metric on the same items, in order, of the source and of a level. ``values``: a number for each;
    ``weights``: what it counts (tokens, words), 1 if empty. ``higher``: more is better. ``log``: values are sums of ln p, and
    the figure is the perplexity."""

    task: str
    metric: str
    source: tuple[float, ...]
    level: tuple[float, ...]
    weights: tuple[float, ...] = ()
    higher: bool = True
    log: bool = False

    @property
    def is_binary(self) -> bool:
        """Whether every item is right or wrong."""
        return not self.weights and {*self.source, *self.level} <= {0.0, 1.0}

    @property
    def is_share(self) -> bool:
        """Whether every score is between 0 and 1."""
        return not self.log and all(0.0 <= value <= 1.0 for value in (*self.source, *self.level))


@dataclass(frozen=True)
class TaskComparison:
    """A level on one task. ``source``, ``score``: mean scores; ``difference``: level - source; ``p``: two-sided probability of
    a difference as large by chance, by ``test``. ``lost``, ``gained``: items that only the source, only the level got right
    (None where scores are no such thing). ``needed``: items that would show a difference of 5 points. ``remark``: what else
    must be known, such as answers without text. ``part``: the task is a part of the one before it that is none."""

    task: str
    metric: str
    n_items: int
    source: Estimate
    score: Estimate
    difference: Estimate
    p: float
    test: Literal["McNemar", "bootstrap"]
    verdict: Verdict
    needed: int
    lost: int | None = None
    gained: int | None = None
    remark: str = ""
    part: bool = False

    @property
    def is_alarm(self) -> bool:
        return self.verdict == "alarm"


@dataclass(frozen=True)
class TaskScores:
    """A level on all tasks. ``ran_code``: programs that it wrote were run in a sandbox; ``harness``: lm-eval's version."""

    level: str
    comparisons: tuple[TaskComparison, ...]
    ran_code: bool = False
    limit: int | None = None
    harness: str = ""


def compare_scores(items: TaskItems, remark: str = "", *, part: bool = False) -> TaskComparison:
    """Compare a level with its source on at least one item."""
    if items.log or items.weights:
        return _compare_sums(items, remark, part)
    n = len(items.source)
    differences = [level - source for source, level in zip(items.source, items.level, strict=True)]
    found = fmean(differences)
    error = _standard_error(differences)
    lost = gained = None
    if items.is_binary:
        lost, gained = differences.count(-1.0), differences.count(1.0)
        p, test = mcnemar(lost, gained), "McNemar"
    else:
        p, test = bootstrap_p(differences), "bootstrap"
    source = fmean(items.source)
    if items.is_share and items.higher and source <= ALARM:
        remark = "; ".join(filter(None, (f"the source itself scores {100 * source:.1f} %, and has nothing to lose", remark)))
    scale = 1.0 if items.is_share else abs(source) or 1.0
    return TaskComparison(
        task=items.task,
        metric=items.metric,
        n_items=n,
        source=Estimate(source, _standard_error(items.source)),
        score=Estimate(fmean(items.level), _standard_error(items.level)),
        difference=Estimate(found, error),
        p=p,
        test=test,  # type: ignore[arg-type]
        verdict=verdict_of(-found if items.higher else found, p, scale),
        needed=items_needed([each / scale for each in differences], binary=items.is_binary),
        lost=lost,
        gained=gained,
        remark=remark,
        part=part,
    )


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p: how likely ``lost`` of ``lost + gained`` differing items, or a more uneven split, is by chance."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**n) if n else 1.0


def bootstrap_p(differences: Sequence[float]) -> float:
    """Two-sided p of a mean difference, from means of seeded resamples: always the same for the same items."""
    return _two_sided([fmean(sample) for sample in _resamples(differences)])


def verdict_of(drop: float, p: float, scale: float) -> Verdict:
    """``drop``: by how much the level is worse (negative: better); ``scale``: of what five percent are taken."""
    if p >= SIGNIFICANT or drop == 0:
        return "no difference seen"
    if drop < 0:
        return "better"
    return "alarm" if drop > ALARM * scale else "worse"


def items_needed(differences: Sequence[float], *, binary: bool) -> int:
    """Items that would show a true difference of :data:`ALARM` in four of five tries, given how much these differ.

    At least the share :data:`ALARM` of right-or-wrong items must differ for such a difference.
    """
    spread = variance(differences) if len(differences) > 1 else 1.0
    least = ALARM - ALARM**2 if binary else ALARM**2 / _POWER
    return max(2, math.ceil(_POWER * max(spread, least) / ALARM**2))


def _compare_sums(items: TaskItems, remark: str, part: bool) -> TaskComparison:
    """Perplexities (``log``) or weighted means: ratios of sums, which are resampled item by item."""
    weights = items.weights or (1.0,) * len(items.source)
    rows = list(zip(items.source, items.level, weights, strict=True))
    sign = -1.0 if items.log else 1.0

    def means(sample: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
        total = sum(weight for _, _, weight in sample) or 1.0
        return sign * sum(row[0] for row in sample) / total, sign * sum(row[1] for row in sample) / total

    source, level = means(rows)
    resampled = [means(sample) for sample in _resamples(rows)]
    moves = [after - before for before, after in resampled]
    errors = [_spread([each[at] for each in resampled]) for at in (0, 1)]
    p = _two_sided(moves)
    # Means of -ln p: their difference is the relative change of the perplexity.
    scale = 1.0 if items.log else abs(source) or 1.0
    drop = level - source if items.log else (source - level if items.higher else level - source)
    error = _spread(moves)
    figure = (lambda value: math.exp(min(value, 700.0))) if items.log else (lambda value: value)
    needed = max(2, math.ceil(_POWER * (error / scale) ** 2 * len(rows) / ALARM**2))
    before, after = figure(source), figure(level)
    factors = (before, after) if items.log else (1.0, 1.0)
    return TaskComparison(
        task=items.task,
        metric=items.metric,
        n_items=len(rows),
        source=Estimate(before, errors[0] * factors[0]),
        score=Estimate(after, errors[1] * factors[1]),
        difference=Estimate(after - before, error * factors[0]),
        p=p,
        test="bootstrap",
        verdict=verdict_of(drop, p, scale),
        needed=needed,
        remark=remark,
        part=part,
    )


def _two_sided(means: Sequence[float]) -> float:
    below, above = sum(mean <= 0 for mean in means), sum(mean >= 0 for mean in means)
    return min(1.0, 2 * min(below, above) / len(means))


def _resamples(items: Sequence) -> list[list]:  # type: ignore[type-arg]
    draw = random.Random(_SEED)  # noqa: S311 - statistics
    return [draw.choices(items, k=len(items)) for _ in range(_RESAMPLES if len(items) <= 2000 else _RESAMPLES // 8)]


def _standard_error(values: Sequence[float]) -> float:
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else 0.0


def _spread(values: Sequence[float]) -> float:
    return math.sqrt(variance(values))
