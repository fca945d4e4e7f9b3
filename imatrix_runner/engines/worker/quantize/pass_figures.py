"""Where the time of a pass went, by types and by levels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from imatrix_runner.engines.jobs import PassFigures, TypeCost
from imatrix_runner.engines.worker.quantize.slabs import Spent
from imatrix_runner.engines.worker.quantize.work_list import Work


def pass_figures(seconds: float, threads: int, tables: float, spent: Spent, works: Sequence[Work]) -> PassFigures:
    """Return the figures of a pass over ``works``."""
    pairs = _pairs(works)
    types = tuple(TypeCost(name, *figures, round(spent.types[name], 4)) for name, figures in sorted(pairs.items()))
    return PassFigures(
        seconds, threads, types, tables, spent.reading, spent.widening, spent.checking, spent.writing, _shares(works, types)
    )


def _pairs(works: Sequence[Work]) -> dict[str, tuple[int, int, int]]:
    """Type -> number of pairs to compute, of outputs that want them, and of elements."""
    pairs: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for work in works:
        for part in work.parts:
            if work.computes(part):
                pairs[part.kind.name] += 1
                wanted[part.kind.name] += len(part.targets)
                elements[part.kind.name] += work.tensor.n_elements
    return {name: (pairs[name], wanted[name], elements[name]) for name in pairs}


def _shares(works: Sequence[Work], types: Sequence[TypeCost]) -> dict[str, float]:
    """Level -> its share of the time spent on types, 0 to 1."""
    total = sum(cost.seconds for cost in types)
    each = {cost.type: cost.seconds / cost.elements for cost in types if cost.elements}
    spent: dict[str, float] = {}
    for work in works:
        for part in work.parts:
            seconds = each.get(part.kind.name, 0.0) * work.tensor.n_elements if work.computes(part) else 0.0
            for output, _ in part.targets:
                spent[output.level.name] = spent.get(output.level.name, 0.0) + seconds / len(part.targets)
    return {name: round(seconds / total, 4) if total else 0.0 for name, seconds in spent.items()}
