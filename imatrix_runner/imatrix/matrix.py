"""The importance matrix as a value.

For every weight tensor: the sum over calibration tokens of each input column's square, and how many tokens were summed;
one row of sums and one count per expert for MoE tensors. See llama.cpp ``tools/imatrix/README.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import InvalidDataError

Sums = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

TOKEN_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
"""The tensors whose misfitting data llama-quantize ignores instead of stopping (src/llama-quant.cpp)."""


@dataclass(frozen=True)
class Entry:
    """One tensor's data. ``sums``: float64 [n_mat, n_columns], Σ x²; ``counts``: int64 [n_mat], tokens summed.

    ``n_mat`` is the number of experts of a MoE tensor, else 1 (a dense 3-D weight has all its columns in one row).
    """

    sums: Sums
    counts: Counts


@dataclass(frozen=True)
class Matrix:
    """A whole imatrix: entries by weight name, tokens per chunk, chunks seen, and the names of the texts."""

    entries: Mapping[str, Entry]
    chunk_size: int
    chunk_count: int
    datasets: tuple[str, ...]

    def values_per_entry(self, name: str) -> int:
        """How many floats llama-quantize will find for ``name``; it wants ne0 * ne2 of the weight."""
        return int(self.entries[name].sums.size)


def add(parts: Sequence[Matrix]) -> Matrix:
    """The matrix of all the text the ``parts`` saw: sums and counts add, in float64 and in the order given.

    Raises :class:`InvalidDataError` if they come from different models or chunk sizes.
    """
    first = parts[0]
    sums: dict[str, Sums] = {}
    counts: dict[str, Counts] = {}
    datasets: dict[str, None] = {}
    for part in parts:
        if part.chunk_size != first.chunk_size:
            raise _cannot_add(f"chunks of {first.chunk_size} and of {part.chunk_size} tokens")
        datasets.update(dict.fromkeys(part.datasets))
        for name, entry in part.entries.items():
            if name not in sums:
                sums[name], counts[name] = entry.sums.copy(), entry.counts.copy()
            elif sums[name].shape != entry.sums.shape:
                raise _cannot_add(f"{name} has {sums[name].shape} values in one and {entry.sums.shape} in another")
            else:
                sums[name] += entry.sums
                counts[name] += entry.counts
    entries = {name: Entry(sums[name], counts[name]) for name in sorted(sums)}
    return Matrix(entries, first.chunk_size, sum(part.chunk_count for part in parts), tuple(datasets))


def _cannot_add(why: str) -> InvalidDataError:
    return InvalidDataError(
        "These imatrices cannot be added", why, "Add only matrices of the same model, made with the same -c."
    )


def problems(matrix: Matrix) -> list[str]:
    """Reasons, as phrases, why the numbers cannot be used at all: NaN, infinite, negative, empty."""
    found: list[str] = []
    if not matrix.entries:
        found.append("it has no entries")
    for name, entry in matrix.entries.items():
        if not np.isfinite(entry.sums).all():
            found.append(f"{name} holds NaN or infinite values")
        elif (entry.sums < 0).any() or (entry.counts < 0).any():
            found.append(f"{name} holds negative values")
    return found


def misfits(matrix: Matrix, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Reasons why a matrix does not belong to a model with weights of these ``shapes`` (ggml order, ne0 first).

    llama-quantize wants ne0 * ne2 values for a tensor and stops at the first that differs.
    """
    common = [name for name in matrix.entries if name in shapes]
    if not common:
        return ["not one of its entries names a tensor of this model"]
    found: list[str] = []
    for name in common:
        shape = (*shapes[name], 1, 1, 1)
        want, have = shape[0] * shape[2], matrix.values_per_entry(name)
        if want != have and name not in TOKEN_EMBEDDINGS:
            found.append(f"{name} has {have} values where the model needs {want}")
    return found
