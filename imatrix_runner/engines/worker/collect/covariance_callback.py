"""The collector of covariances: sums x x^T of the inputs of matrix products while llama.cpp computes, each x scaled so that its
mean square is 1 (``quantize/native/gram.c`` says why).

It sees the same products as an imatrix's collector. An input that several weights read (q, k and v; gate and up) is summed
once; which ones do is learned from a graph of a few tokens, and checked in every graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.covariance_jobs import WeightInput, triangle
from imatrix_runner.engines.worker.collect.activations import Experts, Floats, Sums, is_float
from imatrix_runner.engines.worker.collect.gram_kernel import GramKernel, Rows, rows_of
from imatrix_runner.engines.worker.collect.graph_callback import first_bad_row, first_bad_token
from imatrix_runner.engines.worker.collect.graph_watch import GraphWatch, Product, SeenGraph, is_collected, last_node
from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.nonfinite import NonFiniteInputError
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.tensor_layout import Operations, Tensor


@dataclass(frozen=True)
class InputSums:
    """Sums of one input: ``sums`` float64 [matrices, triangle(columns)] of x x^T of scaled x, ``counts`` int64 [matrices] of
    tokens."""

    input: WeightInput
    sums: Sums
    counts: npt.NDArray[np.int64]

    @classmethod
    def zero(cls, wanted: WeightInput) -> InputSums:
        shape = (wanted.matrices, triangle(wanted.columns))
        return cls(wanted, np.zeros(shape), np.zeros(wanted.matrices, np.int64))


class CovarianceWatch(GraphWatch):
    """Sums while llama.cpp computes, the inputs that :meth:`select` names. ``weights``: those whose inputs may be selected;
    :meth:`inputs` are known after a graph was learned."""

    def __init__(self, library: Library, operations: Operations, weights: Iterable[str], kernel: GramKernel) -> None:
        super().__init__(library, operations)
        self._weights = frozenset(weights)
        self._kernel = kernel
        self._learnt = SeenGraph()
        self._selected: dict[str, InputSums] = {}  # by the first weight that reads the input
        self._firsts: dict[str, str] = {}  # weight -> the first one that reads the same input
        self._read: dict[str, set[int]] = defaultdict(set)  # weight -> addresses of its inputs in this graph

    def begin(self, *, learn: bool = False) -> None:
        super().begin(learn=learn)
        self._read.clear()

    def check(self, n_tokens: int) -> None:
        """Also raises :class:`Refusal` if weights no longer read the same inputs as in the graph that was learned."""
        super().check(n_tokens)
        for name, first in self._firsts.items():
            if not self._read[name] <= self._read[first]:
                raise Refusal.failed(f"The input of {name} cannot be collected", f"it is not always that of {first}")

    def inputs(self) -> tuple[WeightInput, ...]:
        """The inputs in the order of computation, each with all weights that read it. A weight that is used twice in a graph
        reads the inputs of both products."""
        reading: dict[str, list[Product]] = defaultdict(list)
        for product in self._learnt.products:
            reading[product.weight].append(product)
        readers: dict[object, list[str]] = defaultdict(list)
        for name, products in reading.items():
            one = products[0]
            key = (one.n_mat, one.columns, frozenset((product.address, product.experts) for product in products), len(products))
            readers[key].append(name)
        return tuple(
            WeightInput(tuple(names), one.columns, one.n_mat[0] * one.n_mat[1])
            for names in readers.values()
            for one in (reading[names[0]][0],)
        )

    def select(self, selected: Iterable[InputSums]) -> None:
        """Sum these inputs from now on, and end each graph after the last of them."""
        self._selected = {each.input.weights[0]: each for each in selected}
        self._firsts = {name: first for first, each in self._selected.items() for name in each.input.weights}
        products = [product for product in self._learnt.products if product.weight in self._selected]
        self._last = last_node(self._learnt.nodes, products)

    def _learned(self, graph: SeenGraph) -> None:
        self._learnt = graph

    def _wants(self, product: Tensor) -> bool:
        name = self.weight_name(product.src[0])
        if name not in self._weights:
            return False
        weight, values = Tensor.from_address(product.src[0]), Tensor.from_address(product.src[1])
        if product.op == self._operations.mul_mat:
            if not is_collected(values):
                return False
            self._saw_rows(values, (weight.ne[3], weight.ne[2]))
        elif not is_float(values) or values.ne[3] != 1:
            return False
        self._note(product)
        self._read[name].add(product.src[1])
        return name in self._selected and not self._learning

    def _take(self, product: Tensor) -> None:
        name, values = self.weight_name(product.src[0]), Tensor.from_address(product.src[1])
        if product.op == self._operations.mul_mat_id:
            self._add_experts(name, product, values)
            return
        weight = Tensor.from_address(product.src[0])
        self._add(name, product.src[1], values, (weight.ne[3], weight.ne[2]))

    def _take_last_input(self, product: Product, address: int, values: Tensor) -> None:
        self._saw_rows(values, product.n_mat)
        self._read[product.weight].add(address)
        self._add(product.weight, address, values, product.n_mat)

    def _add(self, name: str, address: int, values: Tensor, n_mat: tuple[int, int]) -> None:
        """Add a dense weight's input. ggml multiplies matrix i of a weight with consecutive matrices of an input that has more
        of them (``ggml/src/ggml-cpu/ggml-cpu.c``, ``ggml_compute_forward_mul_mat``: ``i02 = i12 / r2``)."""
        floats = _contiguous_rows(self._reader.floats(address, values))
        base, at = rows_of(floats)
        factors = [size // mat for size, mat in zip(floats.shape[:2], n_mat, strict=True)]
        rows: dict[int, list[npt.NDArray[np.int64]]] = defaultdict(list)
        for i3, i2 in np.ndindex(floats.shape[:2]):
            rows[i3 // factors[0] * n_mat[1] + i2 // factors[1]].append(at[i3, i2])
        self._add_rows(name, base, {matrix: np.concatenate(some) for matrix, some in rows.items()})
        if not self._is_finite(name, rows):
            raise NonFiniteInputError(name, first_bad_row(floats))

    def _add_experts(self, name: str, product: Tensor, values: Tensor) -> None:
        """Add the input of a mixture's weight, by expert."""
        experts = self._reader.experts(product.src[2], Tensor.from_address(product.src[2]))
        floats = _contiguous_rows(self._reader.floats(product.src[1], values))
        base, at = rows_of(floats)
        rows = dict(_by_expert(at[0], experts))
        self._add_rows(name, base, rows)
        if not self._is_finite(name, rows):
            raise NonFiniteInputError(name, first_bad_token(floats))

    def _add_rows(self, name: str, base: int, rows: dict[int, npt.NDArray[np.int64]]) -> None:
        into = self._selected[name]
        if max(rows, default=0) >= into.input.matrices:
            raise Refusal.failed(f"The input of {name} cannot be collected", "it has more matrices than in the first graph")
        self._kernel.add([Rows(base, at, into.sums[matrix]) for matrix, at in rows.items()], into.input.columns)
        for matrix, at in rows.items():
            into.counts[matrix] += len(at)

    def _is_finite(self, name: str, matrices: Iterable[int]) -> bool:
        """Whether the sums are finite: all are if those of squares, on the diagonal, are."""
        into = self._selected[name]
        n = into.input.columns
        row = np.arange(n, dtype=np.int64)
        diagonal = row * n - row * (row - 1) // 2
        return all(bool(np.isfinite(into.sums[matrix][diagonal]).all()) for matrix in matrices)


def _contiguous_rows(values: Floats) -> Floats:
    return values if values.strides[-1] == values.itemsize else np.ascontiguousarray(values)


def _by_expert(at: npt.NDArray[np.int64], experts: Experts) -> Iterable[tuple[int, npt.NDArray[np.int64]]]:
    """Yield each expert and the offsets of its rows, tokens in order.

    ``at`` [n_tokens, n_slots]: each row's offset, one slot for all of a token's experts or one for each;
    ``experts`` [n_tokens, n_used]: which expert each slot went to.
    """
    n_used, n_slots = experts.shape[1], at.shape[1]
    chosen = experts.ravel()
    order = np.argsort(chosen, kind="stable")
    offsets = at[order // n_used, order % n_used % n_slots]
    counts = np.bincount(chosen)
    begin = 0
    for expert in np.flatnonzero(counts).tolist():
        end = begin + int(counts[expert])
        yield expert, np.ascontiguousarray(offsets[begin:end])
        begin = end
