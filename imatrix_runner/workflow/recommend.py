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

Candidate = tuple[str, int, Fit]
"""A level, its bytes, and where it runs."""


@dataclass(frozen=True)
class Recommendation:
    """A level for a place to run it in, or a smaller one, and why that one."""

    place: Literal["GPU", "GPU and RAM", "RAM", "smaller"]
    level: str
    reason: str


def recommend(levels: Sequence[Candidate], budget: Budget) -> tuple[Recommendation, ...]:
    """For the GPU the best that fits wholly, or else with the most layers there; for memory the best that fits; and of all that
    run somewhere the one at the bend of the curve of sizes and divergences, if that is another."""
    found = []
    wholly = [each for each in levels if each[2].place == "GPU"]
    partly = [each for each in levels if each[2].place == "GPU and RAM"]
    in_ram = [each for each in levels if each[2].n_bytes <= budget.ram]
    if wholly:
        level, fit, why = _best(wholly)
        found.append(Recommendation("GPU", level, f"{why} {_of(wholly)} wholly on the GPU: {fit.reason}"))
    elif partly:
        most = max(fit.n_gpu_layers for _, _, fit in partly)
        level, fit, why = _best([each for each in partly if each[2].n_gpu_layers == most])
        reason = f"{why} with the most layers on the GPU, for none fits there wholly: {fit.reason}"
        found.append(Recommendation("GPU and RAM", level, reason))
    if in_ram:
        level, fit, why = _best(in_ram)
        figures = f"{human_bytes(fit.n_bytes)} of {human_bytes(budget.ram)}"
        found.append(Recommendation("RAM", level, f"{why} {_of(in_ram)} in memory: {figures}"))
    running = [each for each in levels if each[2].place != "nowhere"]
    bend = _bend(running)
    if bend is not None and bend.level not in [each.level for each in found]:
        reason = (
            f"{human_bytes(bend.n_bytes)}, KLD {bend.kld:.4f} elsewhere: smaller ones lose quickly, larger ones gain slowly"
        )
        found.append(Recommendation("smaller", bend.level, reason))
    return tuple(found)


def _bend(levels: Sequence[Candidate]) -> picks.Measure | None:
    """What :func:`~imatrix_runner.evaluate.picks.recommend` calls balanced, with this model's sizes and others' divergences."""
    measures = [
        picks.Measure(level, n_bytes, kld, 0.0) for level, n_bytes, _ in levels if (kld := closeness(level)) is not None
    ]
    found = {pick.why: pick.level for pick in picks.recommend(measures)}
    wanted = found.get("balanced") or found.get("quality")
    return next((measure for measure in measures if measure.level == wanted), None)


def _best(levels: Sequence[Candidate]) -> tuple[str, Fit, str]:
    measured = [(kld, n_bytes, level, fit) for level, n_bytes, fit in levels if (kld := closeness(level)) is not None]
    if measured:
        kld, _, level, fit = min(measured, key=lambda each: each[:2])
        return level, fit, f"the closest to its source (KLD {kld:.4f} elsewhere, {KLD_SOURCE})"
    level, _, fit = max(levels, key=lambda each: each[1])
    return level, fit, "the largest"


def _of(levels: Sequence[Candidate]) -> str:
    return "and the only one that fits" if len(levels) == 1 else f"of the {len(levels)} that fit"
