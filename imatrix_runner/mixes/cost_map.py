"""The cost map of a model, ``mix.json``: what rounding each tensor to each type costs. One map serves every size."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import msgspec
import numpy as np

from imatrix_runner.engines.cost_jobs import RoundingError, Trial, TrialResult
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import read_json, write_json
from imatrix_runner.mixes.mix_tensors import MixTensor
from imatrix_runner.mixes.sensitivity import CostModel

VERSION = 1


class RoundingSums(msgspec.Struct, frozen=True):
    """Errors of a tensor rounded to a type: sums over its elements, ``weighted`` by the mean square of the column's input
    (:class:`~imatrix_runner.engines.cost_jobs.RoundingError`), ``squared`` without."""

    weighted: float
    squared: float


class ProbeFigures(msgspec.Struct, frozen=True):
    """How far the model's predictions move when only this tensor is rounded: ``kld`` in nats per token with its standard
    ``error`` over chunks, ``same_top`` the share of ``tokens`` with the source's top token."""

    kld: float
    error: float | None
    same_top: float
    tokens: int


class TensorCosts(msgspec.Struct, frozen=True):
    """A tensor by its name in the model. ``norm``: what ``weighted`` would be if all its numbers became 0; ``errors`` and
    ``probes`` by ggml type; ``sensitivity``: what rounding it costs at the relative error at which tensors are compared
    (:data:`~imatrix_runner.mixes.sensitivity.COMMON_ERROR`), in nats. ``costs``: what each type adds to the sum from which the
    mean KLD of a file follows (:mod:`~imatrix_runner.mixes.level_costs`), in nats."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    norm: float
    errors: dict[str, RoundingSums]
    probes: dict[str, ProbeFigures]
    sensitivity: float | None = None
    costs: dict[str, float] = {}


class CostMap(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, and on what: ``model`` and ``imatrix`` as in the journal, the text by name and content, in chunks of
    ``n_ctx`` tokens, with ``engine``. ``background``: what any change of the model adds to the KLD of a file, in nats
    (:mod:`~imatrix_runner.mixes.background`)."""

    version: int = VERSION
    model: str
    imatrix: str
    text: str
    text_sha256: str
    n_ctx: int
    engine: str
    tensors: tuple[TensorCosts, ...]
    background: float = 0.0

    def write(self, path: Path) -> None:
        write_json(path, self)


def read_cost_map(path: Path) -> CostMap:
    """Read a ``mix.json``. Raises :class:`InvalidDataError`."""
    found = read_json(path, CostMap)
    if found.version != VERSION:
        raise InvalidDataError(
            f"{path} was written by another version of imatrix-runner",
            f"cost map version {found.version}, this program knows {VERSION}",
            "Move it away: it is written again with the next mix.",
        )
    return found


def make_cost_map(
    tensors: Sequence[MixTensor],
    errors: Sequence[RoundingError],
    probes: Sequence[tuple[Trial, TrialResult]],
    choosing: CostModel,
    predicting: CostModel,
    *,
    model: str,
    imatrix: str,
    text: str,
    text_sha256: str,
    n_ctx: int,
    engine: str,
) -> CostMap:
    """Put together what was measured of each tensor. ``probes``: trials of one tensor each. ``choosing``: the costs that types
    are chosen by, ``predicting`` those that add up to the mean KLD of a file, in which every token counts alike."""
    sums: dict[str, dict[str, RoundingSums]] = {}
    norms: dict[str, float] = {}
    for error in errors:
        sums.setdefault(error.tensor.name, {})[error.tensor.type] = RoundingSums(error.weighted, error.squared)
        norms[error.tensor.name] = error.norm
    figures: dict[str, dict[str, ProbeFigures]] = {}
    for trial, result in probes:
        (rounded,) = trial.tensors
        figures.setdefault(rounded.name, {})[rounded.type] = _figures(result)
    return CostMap(
        model=model,
        imatrix=imatrix,
        text=text,
        text_sha256=text_sha256,
        n_ctx=n_ctx,
        engine=engine,
        tensors=tuple(
            TensorCosts(
                tensor.original,
                tensor.shape,
                tensor.source_type,
                norms.get(tensor.original, 0.0),
                sums.get(tensor.original, {}),
                figures.get(tensor.original, {}),
                choosing.sensitivity(tensor.original).kld.value,
                {kind: predicting.cost(tensor.rounded(kind)) if tensor.reached else 0.0 for kind in tensor.types},
            )
            for tensor in tensors
        ),
        background=predicting.background.of_file,
    )


def _figures(result: TrialResult) -> ProbeFigures:
    tokens = sum(result.tokens)
    means = np.array(result.kld) / np.array(result.tokens)
    error = float(means.std(ddof=1)) / sqrt(len(means)) if len(means) > 1 else None
    return ProbeFigures(sum(result.kld) / tokens, error, sum(result.same) / tokens, tokens)
