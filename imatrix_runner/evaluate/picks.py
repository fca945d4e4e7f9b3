"""Which file to take: the levels that no other beats in both size and divergence, and three of them with a reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from imatrix_runner.files import human_bytes

Why = Literal["quality", "balanced", "small", "target"]

NEAR_SOURCE = 0.01
"""Mean KLD in nats below which a level is called near its source: about what Q6_K and Q5_K_M of 7B models have."""
USABLE = 0.9
"""Share of tokens for which level and source put the same one first, below which no level is recommended for its size."""


@dataclass(frozen=True)
class Measure:
    """A level as a point: bytes, mean KLD in nats, share of the same top token (None: nobody measured that)."""

    level: str
    n_bytes: int
    kld: float
    same_top: float | None


@dataclass(frozen=True)
class Pick:
    """A recommended level and in words by what rule."""

    why: Why
    level: str
    rule: str


def front(measures: Sequence[Measure]) -> list[Measure]:
    """The Pareto front, smallest first: those for which no other is at most as large and closer to the source."""
    best: list[Measure] = []
    for measure in sorted(measures, key=lambda each: (each.n_bytes, each.kld)):
        if not best or measure.kld < best[-1].kld:
            best.append(measure)
    return best


def recommend(measures: Sequence[Measure]) -> tuple[Pick, ...]:
    """At most three picks, all from the front; one level is named once, for the first reason that holds."""
    best = front(measures)
    if not best:
        return ()
    near = next((each for each in best if each.kld <= NEAR_SOURCE), None)
    usable = next((each for each in best if each.same_top is not None and each.same_top >= USABLE), None)
    found: list[Pick] = []
    largest = (near or best[-1]).n_bytes  # what is larger gains nothing
    knee = _knee([each for each in best if each.n_bytes <= largest and (each.same_top is None or each.same_top >= USABLE)])
    if near is not None:
        found.append(Pick("quality", near.level, f"the smallest with a mean KLD of at most {NEAR_SOURCE:g}"))
    else:
        found.append(
            Pick("quality", best[-1].level, f"the closest to the source; none has a mean KLD of at most {NEAR_SOURCE:g}")
        )
    if knee is not None and knee.n_bytes < largest:
        found.append(Pick("balanced", knee.level, "the bend of the curve: smaller ones lose quickly, larger ones gain slowly"))
    if usable is not None and usable.n_bytes < largest:
        found.append(
            Pick("small", usable.level, f"the smallest that agrees with the source on {100 * USABLE:g} % of the top tokens")
        )
    named: dict[str, Pick] = {}
    for pick in found:
        named.setdefault(pick.level, pick)
    return tuple(named.values())


def _knee(best: Sequence[Measure]) -> Measure | None:
    """The point of the front farthest below the line between its ends, sizes and ln KLD both stretched to 0..1."""
    if len(best) < 3 or best[-1].kld <= 0:
        return None
    (x0, y0), (x1, y1) = ((each.n_bytes, math.log(each.kld)) for each in (best[0], best[-1]))

    def below(each: Measure) -> float:
        return 1 - (each.n_bytes - x0) / (x1 - x0) - (math.log(each.kld) - y1) / (y0 - y1)

    knee = max(best, key=below)
    return knee if below(knee) > 0 else None


def target(measures: Sequence[Measure], kld: float | None, n_bytes: int | None) -> Pick | None:
    """The level that meets a target: the smallest with a mean KLD of at most ``kld``, else the closest to the source of at most
    ``n_bytes``; with both, the closest that meets both. None: no level does."""
    fit = [each for each in measures if (kld is None or each.kld <= kld) and (n_bytes is None or each.n_bytes <= n_bytes)]
    if not fit:
        return None
    if n_bytes is None:
        small = min(fit, key=lambda each: (each.n_bytes, each.kld))
        return Pick("target", small.level, f"the smallest with a mean KLD of at most {kld:g}")
    close = min(fit, key=lambda each: (each.kld, each.n_bytes))
    beside = f" and a mean KLD of at most {kld:g}" if kld is not None else ""
    return Pick("target", close.level, f"the closest to the source with at most {human_bytes(n_bytes)}{beside}")
