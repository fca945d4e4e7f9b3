"""Predicts the KLD of stock levels from the cost map of a workspace, scaled by what was measured of other levels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from imatrix_runner.context.context import Session
from imatrix_runner.engines.levels import Level, offered
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.evaluate.measurements import Measured, levels_made, measured
from imatrix_runner.events import warning
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.mixes.cost_map import CostMap, read_cost_map
from imatrix_runner.mixes.level_costs import FARTHEST, LevelCosts
from imatrix_runner.mixes.mix_facts import is_mix_level, klds_of_stock, text_input
from imatrix_runner.quantize.level_facts import LevelInputs, facts_of_level
from imatrix_runner.quantize.plan import PredictedKld
from imatrix_runner.quantize.planner import LevelPlanner
from imatrix_runner.quantize.recipe import Recipe
from imatrix_runner.safe_text import printable
from imatrix_runner.steps import imatrix_in

_HELD_OUT: Final = ((2.0, 1.25), (4.0, 1.35), (8.0, 1.5), (FARTHEST, 1.85))
_TRIED: Final = ((2.0, 1.3), (4.0, 1.5), (8.0, 1.65), (FARTHEST, 1.85))
"""How far nine of ten predictions are off at most, where the next measured level has up to so many times the costs or that part
of them, and was measured on the held-out text, or was tried on the calibration text (docs/measurements.md)."""

_FEW: Final = 3
"""Names of levels that a sentence has."""


_Place = tuple[str, str, float, int]
"""A held-out text by name and SHA-256, how much of it was used (chunks, or the error that ended it), and ``n_ctx``."""


@dataclass(frozen=True)
class _Known:
    """Levels that were measured: their KLD by name, and the text's name."""

    klds: dict[str, float]
    text: str


def predict_levels(
    planner: LevelPlanner, levels: Sequence[Level], matrix: MatrixFile | None, imatrix: str
) -> dict[str, PredictedKld]:
    """Predict the KLD of the stock levels among ``levels``; empty without a cost map of this model and imatrix.

    ``imatrix``: the levels' imatrix input. Left out are levels whose types the map has no costs of, levels far from all that
    was measured, and those that were measured themselves. Predictions are those of the held-out text if any level was measured
    on one, else of the calibration text.
    """
    session = planner.session
    costs = _cost_map(session, planner.frozen.fingerprint, imatrix)
    if costs is None:
        return {}
    stock = offered(session.engine.types)
    wanted = [level for level in levels if stock.get(level.name) == level]
    held_out, tried = _held_out(session, planner.frozen.fingerprint, imatrix), _tried(session, costs)
    others = [stock[name] for name in {**held_out, **tried.klds} if name in stock]
    recipes = planner.recipes(tuple({level.name: level for level in (*wanted, *others)}.values()), matrix, imatrix)
    sums = LevelCosts.of(costs, recipes.values())
    known = _on_one_text(session, held_out, recipes, sums)
    factors = _HELD_OUT if known.klds else _TRIED
    known = known if known.klds else _Known({name: kld for name, kld in tried.klds.items() if name in sums.sums}, tried.text)
    found, names = sums.predicted(known.klds), {level.name for level in wanted} - held_out.keys()
    return {
        name: PredictedKld(each.kld, _factor(each.apart, factors), known.text, tuple(known.klds))
        for name, each in found.items()
        if name in names
    }


def _factor(apart: float, factors: Sequence[tuple[float, float]]) -> float:
    return next(factor for most, factor in factors if apart <= most)


def describe_predictions(predicted: Mapping[str, PredictedKld]) -> str:
    """What predictions of one model are of, where they come from, and how far off they may be; at least one is given."""
    some = next(iter(predicted.values()))
    least, most = (function(each.factor for each in predicted.values()) for function in (min, max))
    far = f"{least:g}" if least == most else f"{least:g} to {most:g}, the more the farther from what was measured"
    names = ", ".join(some.scaled_by) if len(some.scaled_by) <= _FEW else f"{len(some.scaled_by)} levels"
    return (
        f"in nats on {printable(some.text)}, from what rounding each tensor costs (mix.json) and the KLD measured of {names}; "
        f"nine of ten are within a factor of {far}."
    )


def _cost_map(session: Session, model: str, imatrix: str) -> CostMap | None:
    """The map, if it is of this model and of this imatrix; None without one."""
    path = session.workspace.cost_map
    try:
        found = read_cost_map(path) if path.is_file() else None
    except InvalidDataError as error:
        session.sink(warning(f"No KLD is predicted: {error.sentence()}"))
        return None
    return found if found is not None and (found.model, _content(found.imatrix)) == (model, _content(imatrix)) else None


def _content(imatrix: str) -> str:
    """An imatrix input without the name of a file: it changes no numbers."""
    return imatrix_in(imatrix)[1] or imatrix


def _tried(session: Session, costs: CostMap) -> _Known:
    """What the choice of mixes measured of stock levels on the calibration text, in the loaded model."""
    text = text_input(costs.text_sha256, costs.n_ctx)
    return _Known(klds_of_stock(session.journal, model=costs.model, imatrix=costs.imatrix, text=text), costs.text)


def _held_out(session: Session, model: str, imatrix: str) -> dict[str, Measured]:
    """The measured levels, by name, that were made from this model with this imatrix."""
    made = levels_made(session.journal)
    found: dict[str, Measured] = {}
    for name, figures in measured(session.journal).items():
        inputs = made[name].inputs_as(LevelInputs)
        same = (inputs.model_file, _content(inputs.imatrix)) == (model, _content(imatrix))
        if same and not is_mix_level(made[name]):
            found[name] = figures
    return found


def _on_one_text(session: Session, figures: dict[str, Measured], recipes: dict[str, Recipe], sums: LevelCosts) -> _Known:
    """The measured levels with these recipes, on the text that most of them were measured on."""
    made = levels_made(session.journal)
    usable = {
        name: each
        for name, each in figures.items()
        if name in sums.sums and facts_of_level(made[name]).recipe == recipes[name].fingerprint
    }
    text = _most(_place(each) for each in usable.values())
    klds = {name: each.divergence.kld.value for name, each in usable.items() if _place(each) == text}
    return _Known(klds, text[0] if text is not None else "")


def _place(figures: Measured) -> _Place:
    evaluation = figures.evaluation
    amount = float(evaluation.n_chunks) if evaluation.until is None else evaluation.until
    return evaluation.text, evaluation.sha256, amount, evaluation.n_ctx


def _most(places: Iterable[_Place]) -> _Place | None:
    counted = Counter(places).most_common(1)
    return counted[0][0] if counted else None
