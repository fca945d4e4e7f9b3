"""The job that collects covariances of weights' inputs, and what it takes: groups of inputs, memory, disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.engines.jobs import ChunkRange, CollectOptions, Native

SAVE_SECONDS = 300.0


@dataclass(frozen=True)
class CovarianceJob:
    """Collect the covariances of the inputs of ``weights`` over ``ranges`` of chunks into ``folder``
    (:mod:`~imatrix_runner.engines.files.covariance_file`).

    The text is computed once for each group of inputs whose sums fit into ``memory_bytes`` (:func:`grouped`). Finished files
    and unfinished sums with the same ``fingerprint`` in ``folder`` are continued exactly; files with another one are removed.
    Unfinished sums are saved at a stop, and every ``save_seconds`` where that costs little.
    """

    step: str
    model: Path
    text: Path
    ranges: tuple[ChunkRange, ...]
    folder: Path
    options: CollectOptions
    weights: tuple[str, ...]
    fingerprint: str
    memory_bytes: int
    log: Path | None
    save_seconds: float = SAVE_SECONDS
    native: Native | None = None


@dataclass(frozen=True)
class WeightInput:
    """An input that ``weights`` are multiplied with, ``columns`` numbers a token. A weight with several matrices (``matrices``:
    experts, or the slices of a 3-D tensor) has a covariance for each."""

    weights: tuple[str, ...]
    columns: int
    matrices: int = 1

    @property
    def elements(self) -> int:
        """Numbers in the upper triangles of all matrices."""
        return self.matrices * triangle(self.columns)

    @property
    def sum_bytes(self) -> int:
        """Memory for its sums, in float64."""
        return 8 * self.elements

    @property
    def file_bytes(self) -> int:
        """About the size of its file, which holds float32."""
        return 4 * self.elements


def triangle(columns: int) -> int:
    """Elements in the upper triangle of a square matrix, with its diagonal."""
    return columns * (columns + 1) // 2


def grouped(inputs: Sequence[WeightInput], memory_bytes: int) -> Iterator[tuple[WeightInput, ...]]:
    """Cut inputs, which are in the order of computation, into consecutive groups whose sums fit into ``memory_bytes``. An input
    that does not fit is a group of its own."""
    group: list[WeightInput] = []
    for each in inputs:
        if group and sum(one.sum_bytes for one in (*group, each)) > memory_bytes:
            yield tuple(group)
            group = []
        group.append(each)
    if group:
        yield tuple(group)
