"""Statistics of an imatrix: the figures of ``llama-imatrix --show-statistics``, and expert coverage.

The definitions, and the arithmetic behind the printed digits, are those of llama.cpp ``tools/imatrix/imatrix.cpp``
(``compute_statistics``, ``compute_cossim``, ``show_statistics``). It computes in float32 and adds one value after the other,
so a wide tensor's total is off in the fourth digit, and exact figures would look wrong next to it. So this module does the
same: float32, in the same order, each operation rounded. It uses float64 only where float32 overflows and that tool prints
``inf`` or ``nan``.

Notation: a tensor has columns *j* (per expert *e*, if it has experts); ``sums`` is Σ x² over the tokens, ``counts`` their
number, and ``a = sums / counts`` the mean square of a column. Experts without a token have no ``a``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.imatrix.matrix import Counts, Matrix, MatrixEntry, Sums

ACTIVE_ABOVE = 1e-5
"""A column counts as active when its mean square is more than this (``compute_statistics``, ``threshold``)."""

_BLOCK = re.compile(r"blk\.([0-9]+)\.")

_Real = np.floating[Any]
_Array = npt.NDArray[_Real]
_Kind = type[_Real]


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor's figures; ``a`` is the vector of mean squares described above, with ``elements`` values."""

    name: str
    """The weight's name, as in the file."""
    layer: int | None
    """The number after ``blk``; None outside the blocks."""
    tensor: str
    """The name's part before ``weight`` (``attn_q``)."""
    total: float
    """Σ a, the tool's Σ(Act²): how strong the signal into this weight is. Activation units squared."""
    minimum: float
    """min a."""
    maximum: float
    """max a."""
    mean: float
    """μ = Σ a / N."""
    deviation: float
    """σ = √max(0, Σ a²/N − μ²), of the whole population."""
    active: float
    """Share of a > 1e-5, in 0..1."""
    elements: int
    """N: columns, times the experts that saw a token."""
    entropy: float
    """−Σ p log₂ p with p = a / Σ a, in bits: 0 when one column carries everything, log₂ N when all carry the same."""
    zd: float
    """ZD score: share of a more than one σ above μ, in 0..1 (layer-wise z-score distribution, arXiv:2406.17415 §3.1)."""
    cosine: float
    """Cosine of ``sums`` with those of the same tensor one layer before; 0 where there is none to compare with."""

    # Percentages are rounded to float32 once more, as the tool does before it prints them.
    @property
    def active_percent(self) -> float:
        return _percent(self.active)

    @property
    def entropy_percent(self) -> float:
        """Entropy as a percentage of its maximum, log₂ N. A single column has no distribution: 0 (the tool: nan)."""
        return _percent(self.entropy / math.log2(self.elements)) if self.elements > 1 else 0.0

    @property
    def zd_percent(self) -> float:
        return _percent(self.zd)


@dataclass(frozen=True)
class LayerStatistics:
    """Averages over a layer's tensors, each weighted with its N."""

    layer: int
    tensors: int
    elements: int
    """Σ N."""
    total: float
    """Σ (N · Σ(Act²)) / Σ N."""
    zd: float
    """Σ (N · ZD) / Σ N, in 0..1."""
    cosine: float
    """Σ (N · cosine) / Σ N; a tensor without a predecessor counts as 0."""

    @property
    def zd_percent(self) -> float:
        return _percent(self.zd)


@dataclass(frozen=True)
class ExpertStatistics:
    """How the calibration's tokens fell on one tensor's experts; figures are tokens per expert, over all experts."""

    name: str
    layer: int | None
    tensor: str
    experts: int
    without_tokens: int
    """Experts that no token reached: they are quantised with equal weights for all columns."""
    fewest: int
    median: float
    most: int


@dataclass(frozen=True)
class Statistics:
    """All figures of an imatrix, each part in the order of layer and name."""

    tensors: tuple[TensorStatistics, ...]
    layers: tuple[LayerStatistics, ...]
    experts: tuple[ExpertStatistics, ...]
    without_data: tuple[str, ...]
    """Tensors whose every count is zero; they have no figures."""


def statistics(matrix: Matrix) -> Statistics:
    """Compute the figures of every entry, looking each up once and holding at most two in memory.

    Raises :class:`InvalidDataError` if an entry holds NaN, infinite or negative numbers: none of the figures would mean
    anything.
    """
    tensors: list[TensorStatistics] = []
    experts: list[ExpertStatistics] = []
    without_data: list[str] = []
    for family in _families(matrix.entries):
        previous: tuple[int, Sums] | None = None
        for block, name in family:
            entry = matrix.entries[name]
            _require_numbers(name, entry)
            if entry.counts.size > 1:
                experts.append(_coverage(name, entry.counts))
            if not entry.counts.any():
                without_data.append(name)
                continue
            before = previous[1] if previous is not None and previous[0] == block - 1 else None
            tensors.append(_measure(name, entry, before))
            previous = (block, entry.sums)
    return Statistics(
        tuple(sorted(tensors, key=_by_layer)),
        tuple(_averages(tensors)),
        tuple(sorted(experts, key=_by_layer)),
        tuple(sorted(without_data)),
    )


def locate(name: str) -> tuple[int | None, str]:
    """Return the layer and the tensor in a weight's name: ``blk.3.attn_q.weight`` -> ``(3, "attn_q")``.

    (llama.cpp ``process_tensor_name``.)
    """
    parts = name.split(".")
    layer = next((after for part, after in pairwise(parts) if part == "blk"), "")
    tensor = next((before for before, part in pairwise(parts) if part == "weight"), "")
    return int(layer) if re.fullmatch("[0-9]+", layer) else None, tensor or name


def _by_layer(item: TensorStatistics | ExpertStatistics) -> tuple[float, str]:
    return (math.inf if item.layer is None else item.layer), item.name


def _families(names: Iterable[str]) -> list[list[tuple[int, str]]]:
    """Group names that differ only in the block number, with that number, in its order, so that each needs only the one
    before."""
    families: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in names:
        found = _BLOCK.search(name)
        if found is None:
            families[name, ""] = [(0, name)]
        else:
            families.setdefault((name[: found.start(1)], name[found.end(1) :]), []).append((int(found[1]), name))
    return [sorted(family) for family in families.values()]


def _require_numbers(name: str, entry: MatrixEntry) -> None:
    if not np.isfinite(entry.sums).all() or (entry.sums < 0).any() or (entry.counts < 0).any():
        raise InvalidDataError(
            "This imatrix has no statistics",
            f"{name} holds NaN, infinite or negative values",
            "Make it again, or fetch another: llama-quantize refuses such data or is misled by it.",
        )


def _coverage(name: str, counts: Counts) -> ExpertStatistics:
    layer, tensor = locate(name)
    return ExpertStatistics(
        name,
        layer,
        tensor,
        experts=counts.size,
        without_tokens=int((counts == 0).sum()),
        fewest=int(counts.min()),
        median=float(np.median(counts)),
        most=int(counts.max()),
    )


def _measure(name: str, entry: MatrixEntry, before: Sums | None) -> TensorStatistics:
    layer, tensor = locate(name)
    seen = entry.counts > 0
    sums, counts = entry.sums[seen], entry.counts[seen]
    # A legacy file has one count, of chunks, and llama-imatrix multiplies both sides with its own -c: for a power of two,
    # such as the usual 512, the quotient is the same to the last bit.
    total, least, most, mean, deviation, active, entropy, zd = _finite(
        lambda kind: _figures((sums.astype(kind) / counts.astype(kind)[:, None]).ravel())
    )
    return TensorStatistics(
        name,
        layer,
        tensor,
        total=total,
        minimum=least,
        maximum=most,
        mean=mean,
        deviation=deviation,
        active=active,
        elements=sums.size,
        entropy=entropy,
        zd=zd,
        cosine=_cosine(entry.sums, before),
    )


def _figures(means: _Array) -> tuple[_Real, ...]:
    """Total, least, most, μ, σ, active, entropy, ZD of the mean squares, computed in their own type."""
    kind = means.dtype.type
    n = kind(means.size)
    total = _total(means)
    mean = total / n
    deviation = np.sqrt(np.maximum(kind(0), _total(means * means) / n - mean * mean))
    active = kind(1) - kind((means <= kind(ACTIVE_ABOVE)).sum()) / n
    share = means / total if total > 0 else means[:0]
    share = share[share > 0]
    # Through float64, because numpy's own float32 logarithm (AVX-512) differs from the C library's in one value of a hundred.
    entropy = kind(0) - _total(share * np.log2(share.astype(np.float64)).astype(kind))
    outliers = ((means - mean) / deviation > 1).sum() if deviation > 0 else 0
    return total, means.min(), means.max(), mean, deviation, active, entropy, kind(outliers) / n


def _cosine(current: Sums, before: Sums | None) -> float:
    """0 also where the tool prints garbage: it reads past the end if the layer before is narrower, and says nan for zeros."""
    if before is None or before.shape != current.shape or not before.any() or not current.any():
        return 0.0

    def compute(kind: _Kind) -> tuple[_Real, ...]:
        one, other = current.ravel().astype(kind), before.ravel().astype(kind)
        return (_total(one * other) / (np.sqrt(_total(one * one)) * np.sqrt(_total(other * other))),)

    return _finite(compute)[0]


def _averages(tensors: Iterable[TensorStatistics]) -> Iterator[LayerStatistics]:
    layers: dict[int, list[TensorStatistics]] = {}
    # In the order of the tool's table, since a sum of float32 depends on it.
    for item in sorted(tensors, key=lambda item: (item.tensor, -item.total)):
        if item.layer is not None:
            layers.setdefault(item.layer, []).append(item)
    for layer, items in sorted(layers.items()):
        total, zd, cosine = _finite(partial(_weighted, items))
        yield LayerStatistics(layer, len(items), sum(item.elements for item in items), total, zd, cosine)


def _weighted(items: list[TensorStatistics], kind: _Kind) -> tuple[_Real, ...]:
    weights = np.array([item.elements for item in items], kind)
    elements = kind(sum(item.elements for item in items))
    columns = ([item.total for item in items], [item.zd for item in items], [item.cosine for item in items])
    return tuple(_total(weights * np.array(column, kind)) / elements for column in columns)


def _finite(compute: Callable[[_Kind], tuple[_Real, ...]]) -> tuple[float, ...]:
    """Return ``compute`` in float32, as the tool does, or in float64 where that overflows."""
    with np.errstate(all="ignore"):
        narrow = compute(np.float32)
        return tuple(map(float, narrow if np.isfinite(narrow).all() else compute(np.float64)))


def _total(values: _Array) -> _Real:
    """The sum, one value after the other like ``std::accumulate``; numpy's own ``sum`` adds pairwise."""
    total: _Real = np.add.accumulate(values)[-1] if values.size else values.dtype.type(0)
    return total


def _percent(share: float) -> float:
    return float(np.float32(100 * share))
