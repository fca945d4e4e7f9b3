"""Which of the levels that fit to take, before anything is measured. Pure.

Levels are told apart by others' measurements (:data:`~imatrix_runner.quantize.benefit.KLDS`), because size alone does not tell:
legacy types are larger than K-quants of the same divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from imatrix_runner.evaluate import picks
from imatrix_runner.files import human_bytes
from imatrix_runner.quantize.benefit import KLD_SOURCE, closeness
from imatrix_runner.quantize.memory import Budget, Fit

POOR = 0.5
"""KLD in nats above which a level is called poor: from there on (IQ2_XS, IQ2_XXS, IQ1_M, IQ1_S) Llama-3-8B's perplexity was 1.7
to 10 times the source's (llama.cpp PR 6936)."""


Place = Literal["GPU", "GPU and RAM", "RAM", "smaller"]


@dataclass(frozen=True)
class Candidate:
    """A level that can be made: its bytes and where it runs."""

    level: str
    n_bytes: int
    fit: Fit

    @property
    def kld(self) -> float | None:
        """What others measured for it."""
        return closeness(self.level)

    @property
    def poor(self) -> bool:
        return self.kld is not None and self.kld > POOR


@dataclass(frozen=True)
class Recommendation:
    """A level for a place to run it in, or a smaller one, and why that one. ``poor``: beyond :data:`POOR`."""

    place: Place
    level: str
    reason: str
    poor: bool = False


def recommend(levels: Sequence[Candidate], budget: Budget) -> tuple[Recommendation, ...]:
    """The best that fits wholly on the GPU; the best that fits in memory; the best that needs both, if it is better than those;
    and of all that run somewhere the one at the bend of the curve of sizes and divergences, if that is another."""
    groups: tuple[tuple[Place, str, list[Candidate]], ...] = (
        ("GPU", "wholly on the GPU", [each for each in levels if each.fit.place == "GPU"]),
        ("RAM", "in memory", [each for each in levels if each.fit.n_bytes <= budget.ram]),
        ("GPU and RAM", "on the GPU in part", [each for each in levels if each.fit.place == "GPU and RAM"]),
    )
    found: list[Recommendation] = []
    taken: list[Candidate] = []
    for place, where, group in groups:
        best = _best(group) if group else None
        if best is None or (place == "GPU and RAM" and _best([best, *taken]) in taken):
            continue
        taken.append(best)
        found.append(Recommendation(place, best.level, _why(group, where, _figures(best, place, budget)), best.poor))
    bend = _bend(levels)
    if bend is not None and bend not in taken and bend.fit.place != "nowhere":
        told = f"{human_bytes(bend.n_bytes)}, KLD {bend.kld:.4f} elsewhere: smaller ones lose quickly, larger ones gain slowly"
        found.append(Recommendation("smaller", bend.level, told, bend.poor))
    return tuple(found)


def _best(levels: Sequence[Candidate]) -> Candidate:
    """The closest to its source; among levels that nobody measured, the largest."""
    measured = [(each.kld, each.n_bytes, each) for each in levels if each.kld is not None]
    if measured:
        return min(measured, key=lambda item: item[:2])[2]
    return max(levels, key=lambda each: each.n_bytes)


def _why(levels: Sequence[Candidate], where: str, figures: str) -> str:
    best = _best(levels)
    what = "the largest" if best.kld is None else f"the closest to its source (KLD {best.kld:.4f} elsewhere, {KLD_SOURCE})"
    many = "and the only one that fits" if len(levels) == 1 else f"of the {len(levels)} that fit"
    poor = ". Poor all the same: elsewhere such levels had 1.7 to 10 times the source's perplexity"
    return f"{what} {many} {where}: {figures}{poor if best.poor else ''}"


def _figures(best: Candidate, place: Place, budget: Budget) -> str:
    fit = best.fit
    if place != "RAM":
        return fit.reason
    helped = f"; -ngl {fit.n_gpu_layers} puts as many of its {fit.n_layers} layers on the GPU"
    return f"{human_bytes(fit.n_bytes)} of {human_bytes(budget.ram)}{helped if fit.place == 'GPU and RAM' else ''}"


def _bend(levels: Sequence[Candidate]) -> Candidate | None:
    """What :func:`~imatrix_runner.evaluate.picks.recommend` calls balanced, with this model's sizes and others' divergences."""
    measures = [picks.Measure(each.level, each.n_bytes, each.kld, None) for each in levels if each.kld is not None]
    found = {pick.why: pick.level for pick in picks.recommend(measures)}
    wanted = found.get("balanced") or found.get("quality")
    return next((each for each in levels if each.level == wanted), None)
