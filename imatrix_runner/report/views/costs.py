"""The chart of what rounding each tensor costs: which layers and kinds of tensors are fragile."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from imatrix_runner import safe_text
from imatrix_runner.report.document import Report, ReportTensorCost
from imatrix_runner.report.views import wording
from imatrix_runner.report.views.charts import Spec, tip
from imatrix_runner.report.views.heat import MOST_CELLS, OUTSIDE, grid, layer_name

_LABEL: Final = "format(pow(10, datum.value), datum.value < -4 ? '.1e' : '.2~r')"


def cost_heat(report: Report) -> Spec | None:
    """A heat map of the cost of each tensor, layers by kinds of tensors; tensors that were not measured are crossed out."""
    if report.costs is None or not report.costs.tensors or len(report.costs.tensors) > MOST_CELLS:
        return None
    tensors = report.costs.tensors
    measured = [tensor for tensor in tensors if _is_drawn(tensor)]
    return grid(
        [_cell(tensor) | {"value": math.log10(tensor.cost), "cost": wording.cost(tensor.cost)} for tensor in measured],
        [_cell(tensor) for tensor in tensors if not _is_drawn(tensor)],
        label=_LABEL,
        cell_tip=tip(layer="Layer", kind="Tensor", cost="Cost"),
        lacking_tip=tip(layer="Layer", kind="Not measured"),
        description=_describe(tensors, measured),
    )


def _is_drawn(tensor: ReportTensorCost) -> bool:
    return tensor.measured and tensor.cost > 0


def _cell(tensor: ReportTensorCost) -> dict[str, Any]:
    return {"layer": layer_name(tensor.layer), "kind": safe_text.shown(tensor.kind, 40)}


def _describe(tensors: Sequence[ReportTensorCost], measured: Sequence[ReportTensorCost]) -> str:
    found = f"What rounding costs, for {wording.many(len(measured), 'tensor')}: KLD in nats at the same relative error of each."
    if measured:
        least, most = (choose(measured, key=lambda tensor: tensor.cost) for choose in (min, max))
        found += f" From {_named(least)} to {_named(most)}."
    by_layer: dict[int, float] = defaultdict(float)
    for tensor in measured:
        if tensor.layer is not None:
            by_layer[tensor.layer] += tensor.cost
    if len(by_layer) > 1:
        most_fragile = max(by_layer, key=lambda layer: by_layer[layer])
        share = by_layer[most_fragile] / sum(by_layer.values())
        found += f" Layer {most_fragile} has {wording.percent(share, 0)} of the cost of all layers."
    if any(tensor.layer is None for tensor in tensors):
        found += f" The column {OUTSIDE} is outside the layers."
    lacking = len(tensors) - len(measured)
    return found + (f" Crossed out: {wording.many(lacking, 'tensor')} that the text did not reach." if lacking else "")


def _named(tensor: ReportTensorCost) -> str:
    where = f" of layer {tensor.layer}" if tensor.layer is not None else ""
    return f"{wording.cost(tensor.cost)} ({safe_text.shown(tensor.kind, 40)}{where})"
