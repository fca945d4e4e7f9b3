"""Recommends levels among those that fit, before anything is measured. Pure.

Levels are ranked by published measurements (:data:`~imatrix_runner.quantize.imatrix_benefit.KLDS`), because size alone is
misleading: legacy types are larger than K-quants of the same divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from imatrix_runner.advise.memory import Budget, MemoryFit
from imatrix_runner.evaluate import recommendations
from imatrix_runner.files import human_bytes
from imatrix_runner.quantize.imatrix_benefit import KLD_SOURCE, closeness

POOR = 0.5
"""KLD in nats above which a level is called poor: with such levels (IQ2_XS, IQ2_XXS, IQ1_M, IQ1_S) Llama-3-8B's perplexity was
1.7 to 10 times the source's (llama.cpp PR 6936)."""


Place = Literal["GPU", "GPU and RAM", "RAM", "smaller"]


@dataclass(frozen=True)
class LevelCandidate:
    """A level that can be made, with its bytes and where it runs."""

    level: str
    n_bytes: int
    fit: MemoryFit

    @property
    def kld(self) -> float | None:
        """The published KLD of this level in nats; None if there is none."""
        return closeness(self.level)

    @property
    def poor(self) -> bool:
        return self.kld is not None and self.kld > POOR


@dataclass(frozen=True)
class Recommendation:
    """A level for a place to run it in, or a smaller one, and the reason. ``poor``: its KLD is above :data:`POOR`."""

    place: Place
    level: str
    reason: str
    poor: bool = False


def recommend(levels: Sequence[LevelCandidate], budget: Budget) -> tuple[Recommendation, ...]:
    """The best level that fits wholly on the GPU; the best that fits in memory; the best that needs both, if it is better than
    those; and the one at the bend of the curve of sizes and divergences, if it runs somewhere and is none of the former."""
    groups: tuple[tuple[Place, str, list[LevelCandidate]], ...] = (
        ("GPU", "wholly on the GPU", [each for each in levels if each.fit.place == "GPU"]),
        ("RAM", "in memory", [each for each in levels if each.fit.n_bytes <= budget.ram]),
        ("GPU and RAM", "on the GPU in part", [each for each in levels if each.fit.place == "GPU and RAM"]),
    )
    found: list[Recommendation] = []
    taken: list[LevelCandidate] = []
    for place, where, group in groups:
        best = _best(group) if group else None
        if best is None or (place == "GPU and RAM" and _best([best, *taken]) in taken):
            continue
        taken.append(best)
        found.append(Recommendation(place, best.level, _why(group, where, _figures(best, place, budget)), best.poor))
    bend = _bend(levels)
    if bend is not None and bend not in taken and bend.fit.place != "nowhere":
        why = f"{human_bytes(bend.n_bytes)}, KLD {bend.kld:.4f} elsewhere: smaller ones lose quickly, larger ones gain slowly"
        found.append(Recommendation("smaller", bend.level, why, bend.poor))
    return tuple(found)


def _best(levels: Sequence[LevelCandidate]) -> LevelCandidate:
    """The level closest to its source; if none has a published KLD, the largest."""
    measured = [(each.kld, each.n_bytes, each) for each in levels if each.kld is not None]
    if measured:
        return min(measured, key=lambda item: item[:2])[2]
    return max(levels, key=lambda each: each.n_bytes)


def _why(levels: Sequence[LevelCandidate], where: str, figures: str) -> str:
    best = _best(levels)
    what = "the largest" if best.kld is None else f"the closest to its source (KLD {best.kld:.4f} elsewhere, {KLD_SOURCE})"
    many = "and the only one that fits" if len(levels) == 1 else f"of the {len(levels)} that fit"
    poor = ". Still poor: elsewhere such levels had 1.7 to 10 times the source's perplexity"
    return f"{what} {many} {where}: {figures}{poor if best.poor else ''}"


def _figures(best: LevelCandidate, place: Place, budget: Budget) -> str:
    fit = best.fit
    if place != "RAM":
        return fit.reason
    helped = f"; -ngl {fit.n_gpu_layers} puts as many of its {fit.n_layers} layers on the GPU"
    return f"{human_bytes(fit.n_bytes)} of {human_bytes(budget.ram)}{helped if fit.place == 'GPU and RAM' else ''}"


def _bend(levels: Sequence[LevelCandidate]) -> LevelCandidate | None:
    """The level that :func:`~imatrix_runner.evaluate.recommendations.recommend` calls balanced, from this model's sizes and
    published divergences."""
    measures = [recommendations.Measure(each.level, each.n_bytes, each.kld, None) for each in levels if each.kld is not None]
    found = {pick.why: pick.level for pick in recommendations.recommend(measures)}
    wanted = found.get("balanced") or found.get("quality")
    return next((each for each in levels if each.level == wanted), None)
