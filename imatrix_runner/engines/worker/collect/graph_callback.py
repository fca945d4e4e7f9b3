"""The collector of an imatrix: sums the squared inputs of matrix products while llama.cpp computes.

Like llama-imatrix (``tools/imatrix/imatrix.cpp``), the collector asks for every product with a block's weight, and reads its
input. Unlike llama-imatrix, it sums an input that several weights share once, and ends the computation after the last input:
the last product itself, the final norm and the output projection do not change the imatrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.worker.collect.activations import (
    DeviceSums,
    Floats,
    Sums,
    expert_squares,
    fold,
    slice_squares,
)
from imatrix_runner.engines.worker.collect.graph_watch import (
    OUTPUT,
    GraphWatch,
    Product,
    SeenGraph,
    is_collected,
    last_node,
)
from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.nonfinite import NonFiniteInputError
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.tensor_layout import Operations, Tensor


@dataclass
class CollectedEntry:
    """Sums of one weight. ``sums`` float64 [n_mat, n_columns] (a dense 3-D weight: one row for all its matrices), ``counts``
    int64 [n_mat]."""

    sums: Sums
    counts: npt.NDArray[np.int64]


class Collector(GraphWatch):
    """Sums squares while llama.cpp computes."""

    def __init__(self, library: Library, operations: Operations, *, process_output: bool, all_logits: bool) -> None:
        super().__init__(library, operations)
        self._process_output = process_output
        self._device_sums = DeviceSums(library)
        self._may_end_early = not (process_output or all_logits)
        self._inputs: dict[int, Sums] = {}  # those of this graph, by address
        self.entries: dict[str, CollectedEntry] = {}

    def begin(self, *, learn: bool = False) -> None:
        """Prepare for a graph. ``learn``: find the node that makes the last wanted input; nothing is skipped."""
        super().begin(learn=learn)
        self._inputs = {}

    def close(self) -> None:
        """Free the devices' memory."""
        self._device_sums.close()

    def take(self) -> dict[str, CollectedEntry]:
        """Return the sums so far, and start again from zero."""
        entries, self.entries = self.entries, {}
        return entries

    def _wants(self, product: Tensor) -> bool:
        if product.op == self._operations.mul_mat_id:
            return True
        values = Tensor.from_address(product.src[1])
        if not is_collected(values):
            return False
        name = self.weight_name(product.src[0])
        if not (name.startswith("blk.") or (self._process_output and name == OUTPUT)):
            return False
        if product.src[1] not in self._inputs:
            return True
        self._credit(name, product, values)
        return False

    def _take_last_input(self, product: Product, address: int, values: Tensor) -> None:
        squares = fold(self._squares(product.weight, address, values), *product.n_mat)
        self._add(product.weight, squares, self._saw_rows(values, product.n_mat))

    def _take(self, product: Tensor) -> None:
        values, name = Tensor.from_address(product.src[1]), self.weight_name(product.src[0])
        if product.op == self._operations.mul_mat_id:
            self._experts(name, product, values)
            return
        self._inputs[product.src[1]] = self._squares(name, product.src[1], values)
        self._credit(name, product, values)

    def _squares(self, name: str, address: int, values: Tensor) -> Sums:
        """float64 [ne3, ne2, ne0]: summed squares of the input of the weight ``name``. Raises :class:`NonFiniteInputError`."""
        squares = None if self._reader.on_host(values) else self._device_sums.squares(values)
        if squares is None:
            squares = slice_squares(self._reader.floats(address, values))
        if not _is_finite(squares):
            raise NonFiniteInputError(name, first_bad_row(self._reader.floats(address, values)))
        return squares

    def _credit(self, name: str, product: Tensor, values: Tensor) -> None:
        """Add an input's squares to the sums of a weight that reads it."""
        self._note(product)
        weight = Tensor.from_address(product.src[0])
        n_mat = (weight.ne[3], weight.ne[2])
        self._add(name, fold(self._inputs[product.src[1]], *n_mat), self._saw_rows(values, n_mat))

    def _experts(self, name: str, product: Tensor, values: Tensor) -> None:
        if values.ne[3] != 1:
            raise Refusal.failed(f"{name} cannot be collected", "its input has more than 3 dimensions")
        self._note(product)
        experts = self._reader.experts(product.src[2], Tensor.from_address(product.src[2]))
        n_experts = Tensor.from_address(product.src[0]).ne[2]
        squares, counts = expert_squares(self._reader.floats(product.src[1], values)[0], experts, n_experts)
        if not _is_finite(squares):
            raise NonFiniteInputError(name, first_bad_token(self._reader.floats(product.src[1], values)))
        self._add(name, squares, counts)

    def _add(self, name: str, squares: Sums, counts: int | npt.NDArray[np.int64]) -> None:
        """``counts``: one for all matrices of a dense weight, or one for each expert."""
        squares = squares.reshape(1, -1) if isinstance(counts, int) else squares
        entry = self.entries.get(name)
        if entry is None:
            self.entries[name] = CollectedEntry(squares.copy(), np.array(counts, np.int64).reshape(-1))
        elif entry.sums.shape != squares.shape:
            raise Refusal.failed(f"{name} cannot be collected", f"it was {entry.sums.shape} and is now {squares.shape}")
        else:
            entry.sums += squares
            entry.counts += counts

    def _learned(self, graph: SeenGraph) -> None:
        if self._may_end_early:
            self._last = last_node(graph.nodes, graph.products)


def _is_finite(squares: Sums) -> bool:
    # Squares do not cancel out, and many of float32's fit into float64: the sum is finite if all are.
    return math.isfinite(squares.sum())


def first_bad_row(values: Floats) -> int | None:
    """The first token in ``values`` [ne3, ne2, ne1, ne0] with NaN, infinity, or a square that overflows; None if the values are
    not one row per token."""
    if values.shape[:2] != (1, 1):
        return None
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.einsum("ij,ij->i", values[0, 0], values[0, 0]))
    return int(finite.argmin()) if not finite.all() else None


def first_bad_token(values: Floats) -> int:
    """The first token with NaN or infinity in a mixture's input, ``values`` [1, n_tokens, n_slots, n_columns]."""
    return int(np.isfinite(values[0]).all(axis=(1, 2)).argmin())
