"""The importance matrix as a value.

For every weight tensor: the sum over calibration tokens of each input column's square, and how many tokens were summed;
one row of sums and one count per expert for MoE tensors. See llama.cpp ``tools/imatrix/README.md``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import InvalidDataError

Sums = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

TOKEN_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
"""The tensors whose misfitting data llama-quantize ignores instead of stopping (src/llama-quant.cpp)."""


@dataclass(frozen=True)
class MatrixEntry:
    """One tensor's data. ``sums``: float64 [n_mat, n_columns], Σ x²; ``counts``: int64 [n_mat], tokens summed.

    ``n_mat`` is the number of experts of a MoE tensor, else 1 (a dense 3-D weight has all its columns in one row).
    """

    sums: Sums
    counts: Counts


class Entries(Mapping[str, MatrixEntry]):
    """Entries that are computed when looked up; their names and shapes are known before."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether the entry exists. Mapping's own method would compute it."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, int]:
        """``(n_mat, n_columns)``."""

    @abstractmethod
    def counts(self, name: str) -> Counts:
        """int64 [n_mat]."""


@dataclass(frozen=True)
class Matrix:
    """A whole imatrix: entries by weight name, tokens per chunk, chunks seen, and the names of the texts.

    ``entries`` may be lazy (:class:`Entries`): look one up once, use it, and drop it. ``chunk_size`` 0 means that the file does
    not state it (legacy): then counts are in chunks, not in tokens; :func:`in_tokens` converts them.
    """

    entries: Mapping[str, MatrixEntry]
    chunk_size: int
    chunk_count: int
    datasets: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, int]:
        """``(n_mat, n_columns)`` of an entry."""
        if isinstance(self.entries, Entries):
            return self.entries.shape(name)
        n_mat, n_columns = self.entries[name].sums.shape
        return n_mat, n_columns

    def counts(self, name: str) -> Counts:
        """int64 [n_mat], the tokens each row of an entry summed."""
        return self.entries.counts(name) if isinstance(self.entries, Entries) else self.entries[name].counts

    def values_per_entry(self, name: str) -> int:
        """Return how many floats llama-quantize will find for ``name``; it expects ne0 * ne2 of the weight."""
        return prod(self.shape(name))


class _Summed(Entries):
    """Sums of the parts' entries, each computed when looked up; a part that lacks an entry adds nothing to it."""

    def __init__(self, parts: Sequence[Matrix], weights: Sequence[int]) -> None:
        self._parts = tuple(zip(parts, weights, strict=True))
        self._names = sorted({name for part in parts for name in part.entries})

    def __getitem__(self, name: str) -> MatrixEntry:
        having = [(part, weight) for part, weight in self._parts if name in part.entries]
        if not having:
            raise KeyError(name)
        # From zero, in order: 0.0 + x is exact, so one part alone comes out as it is.
        sums = np.zeros(self.shape(name))
        for part, weight in having:
            sums += weight * part.entries[name].sums.reshape(sums.shape)
        return MatrixEntry(sums, self.counts(name))

    def __contains__(self, name: object) -> bool:
        return any(name in part.entries for part, _ in self._parts)

    def shape(self, name: str) -> tuple[int, int]:
        return max(part.shape(name) for part, _ in self._parts if name in part.entries)

    def counts(self, name: str) -> Counts:
        n_mat = self.shape(name)[0]
        having = [(part.counts(name), weight) for part, weight in self._parts if name in part.entries]
        total = np.zeros(n_mat, np.int64)
        for counts, weight in having:
            total += weight * counts  # a single count stands for all experts
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def add(parts: Sequence[Matrix], weights: Sequence[int] | None = None) -> Matrix:
    """Return the matrix of all the text the ``parts`` saw: sums and counts are added in float64, in the order given.

    ``weights`` (whole numbers, default all 1) count a part's text several times. The entries are lazy: nothing is read before
    it is used. Raises :class:`InvalidDataError` if the parts come from different models or chunk sizes.
    """
    first = parts[0]
    weights = weights if weights is not None else [1] * len(parts)
    datasets: dict[str, None] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for part in parts:
        if part.chunk_size != first.chunk_size:
            raise _cannot_add(f"chunks of {first.chunk_size} and of {part.chunk_size} tokens")
        datasets.update(dict.fromkeys(part.datasets))
        for name in part.entries:
            shape = part.shape(name)
            if not _addable(shapes.setdefault(name, shape), shape):
                raise _cannot_add(f"{name} has {shapes[name]} values in one and {shape} in another")
            shapes[name] = max(shapes[name], shape)  # the one with counts per expert
    chunks = sum(weight * part.chunk_count for part, weight in zip(parts, weights, strict=True))
    return Matrix(_Summed(parts, weights), first.chunk_size, chunks, tuple(datasets))


def _addable(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether shapes are equal, or have equally many values where one side (a legacy file) has one count for all experts."""
    return one == other or (prod(one) == prod(other) and 1 in (one[0], other[0]))


class _InTokens(Entries):
    """The entries of a legacy matrix, with calls converted to tokens, ``each`` per call."""

    def __init__(self, matrix: Matrix, each: float) -> None:
        self._matrix, self._each = matrix, each

    def __getitem__(self, name: str) -> MatrixEntry:
        return MatrixEntry(self._matrix.entries[name].sums * self._each, self.counts(name))

    def __contains__(self, name: object) -> bool:
        return name in self._matrix.entries

    def shape(self, name: str) -> tuple[int, int]:
        return self._matrix.shape(name)

    def counts(self, name: str) -> Counts:
        counts: Counts = np.rint(self._matrix.counts(name) * self._each).astype(np.int64)
        return counts

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrix.entries)

    def __len__(self) -> int:
        return len(self._matrix.entries)


def as_collected(matrix: Matrix, n_chunks: int, chunk_size: int) -> Matrix:
    """Return a matrix collected from ``n_chunks`` chunks with counts in tokens; one that counts tokens is returned as it is.

    The legacy format counts calls: multiplications of one batch, and a chunk takes one or several. Most weights are multiplied
    once by every token, so the most frequent number of calls stands for all the chunks.
    """
    if matrix.chunk_size or not matrix.entries:
        return matrix
    calls, _ = Counter(int(matrix.counts(name).max()) for name in matrix.entries).most_common(1)[0]
    entries = _InTokens(matrix, n_chunks * chunk_size / max(1, calls))
    return Matrix(entries, chunk_size, n_chunks, matrix.datasets)


def in_tokens(matrix: Matrix, chunk_size: int) -> Matrix:
    """Return a matrix whose counts are tokens: a legacy one (which counts chunks) times ``chunk_size``, others as they are.

    The same factor for sums and counts, as llama-imatrix restores a legacy file; means do not change.
    """
    if matrix.chunk_size:
        return matrix
    return Matrix(_InTokens(matrix, chunk_size), chunk_size, matrix.chunk_count, matrix.datasets)


def held(matrix: Matrix) -> Matrix:
    """Return the same matrix with every entry in memory, independent of its files."""
    entries = {name: matrix.entries[name] for name in matrix.entries}
    return Matrix(entries, matrix.chunk_size, matrix.chunk_count, matrix.datasets)


def _cannot_add(why: str) -> InvalidDataError:
    return InvalidDataError(
        "These imatrices cannot be added", why, "Add only matrices of the same model, made with the same -c."
    )


def problems(matrix: Matrix) -> list[str]:
    """Reasons, as phrases, why the numbers cannot be used at all: NaN, infinite, negative, empty."""
    found: list[str] = []
    if not matrix.entries:
        found.append("it has no entries")
    found += filter(None, (entry_problem(name, entry) for name, entry in matrix.entries.items()))
    return found


def entry_problem(name: str, entry: MatrixEntry) -> str:
    """Return the problem of one entry, as in :func:`problems`; empty if there is none."""
    if not np.isfinite(entry.sums).all():
        return f"{name} holds NaN or infinite values"
    if (entry.sums < 0).any() or (entry.counts < 0).any():
        return f"{name} holds negative values"
    return ""


def misfits(matrix: Matrix, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Reasons why a matrix does not belong to a model with weights of these ``shapes`` (ggml order, ne0 first).

    llama-quantize expects ne0 * ne2 values for a tensor and stops at the first that differs.
    """
    common = [name for name in matrix.entries if name in shapes]
    if not common:
        return ["none of its entries names a tensor of this model"]
    found: list[str] = []
    for name in common:
        shape = (*shapes[name], 1, 1, 1)
        want, have = shape[0] * shape[2], matrix.values_per_entry(name)
        if want != have and name not in TOKEN_EMBEDDINGS:
            found.append(f"{name} has {have} values where the model needs {want}")
    return found
