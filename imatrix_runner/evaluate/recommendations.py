"""Recommends levels: those that no other beats in both size and divergence, and of them up to three with a reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from imatrix_runner.engines.measures import Divergence
from imatrix_runner.files import human_bytes

Why = Literal["quality", "balanced", "small", "target", "speed"]

NEAR_SOURCE = 0.01
"""Mean KLD in nats below which a level is called near its source: about what Q6_K and Q5_K_M of 7B models have."""
FAR = 0.1
"""Mean KLD in nats above which no level is recommended. Llama-3-8B (llama.cpp PR 6936): Q3_K_M 0.102 without and 0.084 with an
imatrix; Q2_K 0.445 and 0.332."""
USABLE = 0.9
"""Share of tokens for which level and source put the same one first, below which no level is recommended. Llama-3-8B: Q4_K_M
91.9 %, Q2_K 71.1 % (llama.cpp, tools/perplexity/README.md)."""
PRECISE = 0.05
"""Standard error of a mean KLD, as a share of it, above which the text is too short to recommend anything from."""

_ROUNDING = 1e-4
"""Mean KLD that rounding of a reference to 16 bits can cause: a level this close equals the source, whatever its error."""
_FEWEST = 11
"""Number of scored tokens from which on a standard error means something."""


SAME_SIZE = 1e-3
"""Relative difference of bytes below which two levels have the same size: one may say more about itself in its metadata."""


@dataclass(frozen=True)
class Measure:
    """A level as a point: bytes, mean KLD in nats with its standard error, share of the same top token (None: not measured).

    ``error`` is infinite where there are too few tokens for one. ``eligible``: False for the source itself and for what is not
    smaller than it.
    """

    level: str
    n_bytes: int
    kld: float
    same_top: float | None
    error: float = 0.0
    eligible: bool = True

    @classmethod
    def of(cls, level: str, n_bytes: int, found: Divergence, *, eligible: bool = True) -> Measure:
        """The point of a measured level."""
        error = found.kld.error if found.n_tokens >= _FEWEST else math.inf
        return cls(level, n_bytes, found.kld.value, found.same_top.value, error, eligible)

    @property
    def precise(self) -> bool:
        """Whether enough tokens were scored for the KLD to mean something."""
        return self.error <= PRECISE * self.kld or (self.kld <= _ROUNDING and self.error <= _ROUNDING)

    @property
    def close(self) -> bool:
        """Whether it agrees with the source well enough to be recommended."""
        return self.kld <= FAR and (self.same_top is None or self.same_top >= USABLE)


@dataclass(frozen=True)
class Pick:
    """A recommended level, and the rule that chose it as words."""

    why: Why
    level: str
    rule: str


def front(measures: Sequence[Measure]) -> list[Measure]:
    """The Pareto front, smallest first: those for which no other is at most as large (or larger by :data:`SAME_SIZE`) and
    closer to the source."""
    best: list[Measure] = []
    for measure in sorted(measures, key=lambda each: (each.n_bytes, each.kld)):
        if best and measure.kld >= best[-1].kld:
            continue
        if best and measure.n_bytes < best[-1].n_bytes * (1 + SAME_SIZE):
            best.pop()
        best.append(measure)
    return best


def recommend(measures: Sequence[Measure]) -> tuple[Pick, ...]:
    """At most three picks, all from the front; one level is named once, for the first reason that holds.

    None where every level is beyond :data:`FAR` or :data:`USABLE`, or was measured on too few tokens (:func:`unfit` says so).
    """
    best = [each for each in front([each for each in measures if each.eligible]) if each.close and each.precise]
    if not best:
        return ()
    near = next((each for each in best if each.kld <= NEAR_SOURCE), None)
    usable = next((each for each in best if each.same_top is not None), None)
    found: list[Pick] = []
    largest = (near or best[-1]).n_bytes  # what is larger gains nothing
    knee = _knee([each for each in best if each.n_bytes <= largest])
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


def unfit(measures: Sequence[Measure]) -> str:
    """Why none of these is recommended, as a sentence; empty where one is, or where nothing was measured."""
    if not measures or recommend(measures):
        return ""
    candidates = [each for each in measures if each.eligible]
    if not candidates:
        return "No level is recommended: none is smaller than the source."
    best = min(candidates, key=lambda each: (not each.close, each.kld))
    if best.close:
        error = f"{100 * best.error / best.kld:.0f} %" if best.kld > 0 and math.isfinite(best.error) else "unknown"
        return (
            f"No level is recommended: too few tokens were scored. The standard error of {best.level}'s mean KLD is {error}, "
            f"and at most {100 * PRECISE:g} % is accepted; measure more --chunks or a longer --text."
        )
    agreement = f" and the source's top token in {100 * best.same_top:.1f} % of cases" if best.same_top is not None else ""
    return (
        f"No level is recommended: the closest, {best.level}, has a mean KLD of {best.kld:.3g}{agreement}. A recommendation "
        f"takes at most {FAR:g} and at least {100 * USABLE:g} %."
    )


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
    ``n_bytes``; with both, the closest that meets both. None: no level does. The floors of :func:`recommend` do not apply, for
    the target is the user's own; a figure from too few tokens is named as one."""
    fit = [
        each
        for each in measures
        if each.eligible and (kld is None or each.kld <= kld) and (n_bytes is None or each.n_bytes <= n_bytes)
    ]
    if not fit:
        return None
    if n_bytes is None:
        pick = min(fit, key=lambda each: (each.n_bytes, each.kld))
        rule = f"the smallest with a mean KLD of at most {kld:g}"
    else:
        pick = min(fit, key=lambda each: (each.kld, each.n_bytes))
        also = f" and a mean KLD of at most {kld:g}" if kld is not None else ""
        rule = f"the closest to the source with at most {human_bytes(n_bytes)}{also}"
    if not pick.precise:
        rule += f"; measured on few tokens, ± {pick.error:.2g}" if math.isfinite(pick.error) else "; measured on too few tokens"
    return Pick("target", pick.level, rule)
