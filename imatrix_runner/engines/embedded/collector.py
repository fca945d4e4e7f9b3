"""The evaluation callback: which products are looked at while llama.cpp computes, and what is summed of them.

llama.cpp asks of every node whether its result is wanted, computes up to it, and then shows it. As llama-imatrix
(``tools/imatrix/imatrix.cpp``) we want every product with a block's weight, and look at what it is multiplied with. Unlike
it, an input that several weights share is summed once, and computing ends when the last input is there: the last product
itself, the final norm and the output projection change nothing in the matrix.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.embedded.activations import Floats, Reader, Sums, expert_squares, fold, is_float, slice_squares
from imatrix_runner.engines.embedded.device import DeviceSums
from imatrix_runner.engines.embedded.layout import Operations, Tensor
from imatrix_runner.engines.embedded.library import Library
from imatrix_runner.engines.embedded.nonfinite import NonFiniteInputError
from imatrix_runner.engines.embedded.refusal import Refusal

OUTPUT = "output.weight"
_FEWEST_ROWS = 16  # imatrix.cpp: products with fewer are not collected
_OP = Tensor.op.offset


@dataclass
class Entry:
    """What one weight has seen. ``sums`` float64 [n_mat, n_columns] (a dense 3-D weight: one row for all its matrices),
    ``counts`` int64 [n_mat]."""

    sums: Sums
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Product:
    """A product with a weight: node number ``at``, the address of its input, how many matrices (ne3, ne2) the weight has."""

    weight: str
    at: int
    address: int
    n_mat: tuple[int, int]
    dense: bool


@dataclass(frozen=True)
class _Last:
    """Where computing may end: after node number ``at`` called ``node``, which is the last product or (``is_input``) makes the
    last product's input."""

    at: int
    node: bytes
    product: _Product
    is_input: bool


@dataclass
class _Pass:
    """One computed graph: how many nodes were asked for, the inputs summed so far by their address, the numbers of tokens
    met, and (while learning) every node's address and name and every wanted product."""

    asked: int = 0
    ended: bool = False
    inputs: dict[int, Sums] = field(default_factory=dict)
    tokens: set[int] = field(default_factory=set)
    nodes: list[tuple[int, bytes]] = field(default_factory=list)
    products: list[_Product] = field(default_factory=list)


class Collector:
    """Sums while llama.cpp computes. Call :meth:`begin` before every decode and :meth:`check` after it."""

    def __init__(self, library: Library, operations: Operations, *, process_output: bool, all_logits: bool) -> None:
        self._operations = operations
        self._process_output = process_output
        self._reader = Reader(library)
        self._device_sums = DeviceSums(library)
        self._names: dict[int, str] = {}
        self._may_end_early = not (process_output or all_logits)
        self._last: _Last | None = None
        self._learning = False
        self._pass = _Pass()
        self._error: BaseException | None = None
        self.entries: dict[str, Entry] = {}
        self.seconds = 0.0  # spent in the callback
        # llama.cpp keeps this pointer: it must live as long as the context.
        self.callback = library.llama.ggml_backend_sched_eval_callback(self._evaluate)

    def begin(self, *, learn: bool = False) -> None:
        """A graph will be computed. ``learn``: find out where the last wanted input is made; nothing is skipped."""
        self._pass, self._learning = _Pass(), learn

    def check(self, n_tokens: int) -> None:
        """Raise what went wrong inside the callback, where nothing can be raised; or if llama.cpp did not compute its
        ``n_tokens`` at once, because inputs are told apart by address within one graph."""
        if self._error is not None:
            raise self._error
        if self._pass.tokens and n_tokens not in self._pass.tokens:
            met = f"it computed {sorted(self._pass.tokens)} of {n_tokens} tokens at once"
            raise Refusal.failed("llama.cpp did not compute the batch as expected", met, "Use --engine binaries.")
        if self._learning:
            self._learn()
            self._learning = False

    def close(self) -> None:
        """Give back what was set up on devices."""
        self._device_sums.close()

    def take(self) -> dict[str, Entry]:
        """The sums so far; the next begin at zero."""
        entries, self.entries = self.entries, {}
        return entries

    def _evaluate(self, pointer: int, ask: bool, _data: object) -> bool:
        began = time.perf_counter()
        try:
            return self._ask(pointer) if ask else self._look(pointer)
        except BaseException as error:  # noqa: BLE001 - an exception must not cross llama.cpp; check() raises it
            self._error = self._error or error
            return False
        finally:
            self.seconds += time.perf_counter() - began

    def _ask(self, pointer: int) -> bool:
        this = self._pass
        at, this.asked = this.asked, this.asked + 1
        if self._learning:
            this.nodes.append((pointer, Tensor.from_address(pointer).name))
        elif self._last is not None:
            if this.ended:
                return False
            if at == self._last.at and self._last.is_input and self._is_wanted_input(Tensor.from_address(pointer)):
                return True
        op = ctypes.c_int.from_address(pointer + _OP).value
        if op == self._operations.mul_mat_id:
            return True
        if op != self._operations.mul_mat:
            return False
        product = Tensor.from_address(pointer)
        values = Tensor.from_address(product.src[1])
        if not _is_collected(values):
            return False
        name = self._weight(product.src[0])
        if not (name.startswith("blk.") or (self._process_output and name == OUTPUT)):
            return False
        if product.src[1] not in this.inputs:
            return True
        self._credit(name, Tensor.from_address(product.src[0]), product.src[1], values)
        return False

    def _is_wanted_input(self, node: Tensor) -> bool:
        return self._last is not None and node.name == self._last.node and _is_collected(node)

    def _look(self, pointer: int) -> bool:
        """llama.cpp shows a node it has computed; false ends this part of the graph."""
        node, last, this = Tensor.from_address(pointer), self._last, self._pass
        is_last = last is not None and not self._learning and this.asked == last.at + 1 and node.name == last.node
        if last is not None and is_last and last.is_input:
            squares = fold(self._squares(last.product.weight, pointer, node), *last.product.n_mat)
            self._add(last.product.weight, squares, self._rows(node, last.product.n_mat))
        else:
            self._take_product(node)
        this.ended = is_last
        return not is_last and self._error is None

    def _take_product(self, product: Tensor) -> None:
        weight, values = Tensor.from_address(product.src[0]), Tensor.from_address(product.src[1])
        name = self._weight(product.src[0])
        if product.op == self._operations.mul_mat_id:
            self._experts(name, weight, product, values)
            return
        self._pass.inputs[product.src[1]] = self._squares(name, product.src[1], values)
        self._credit(name, weight, product.src[1], values)

    def _squares(self, name: str, address: int, values: Tensor) -> Sums:
        """float64 [ne3, ne2, ne0] of the input of the weight called ``name``"""
        squares = None if self._reader.on_host(values) else self._device_sums.squares(values)
        if squares is None:
            squares = slice_squares(self._reader.floats(address, values))
        if not _is_finite(squares):
            raise NonFiniteInputError(name, _first_bad_row(self._reader.floats(address, values)))
        return squares

    def _credit(self, name: str, weight: Tensor, address: int, values: Tensor) -> None:
        """Add an input's squares to a weight that reads it."""
        n_mat = (weight.ne[3], weight.ne[2])
        self._note(name, address, n_mat, dense=True)
        self._add(name, fold(self._pass.inputs[address], *n_mat), self._rows(values, n_mat))

    def _experts(self, name: str, weight: Tensor, product: Tensor, values: Tensor) -> None:
        if values.ne[3] != 1:
            raise Refusal.failed(f"{name} cannot be collected", "its input has more than 3 dimensions")
        self._note(name, product.src[1], (1, weight.ne[2]), dense=False)
        experts = self._reader.experts(product.src[2], Tensor.from_address(product.src[2]))
        squares, counts = expert_squares(self._reader.floats(product.src[1], values)[0], experts, weight.ne[2])
        if not _is_finite(squares):
            finite = np.isfinite(self._reader.floats(product.src[1], values)[0]).all(axis=(1, 2))
            raise NonFiniteInputError(name, int(finite.argmin()))
        self._add(name, squares, counts)

    def _note(self, name: str, address: int, n_mat: tuple[int, int], *, dense: bool) -> None:
        if self._learning:
            self._pass.products.append(_Product(name, self._pass.asked - 1, address, n_mat, dense))

    def _rows(self, values: Tensor, n_mat: tuple[int, int]) -> int:
        """Tokens that one matrix of a dense weight has met."""
        _, n1, n2, n3 = values.ne
        rows: int = n1 * n2 * n3 // (n_mat[0] * n_mat[1])
        self._pass.tokens.add(rows)
        return rows

    def _add(self, name: str, squares: Sums, counts: int | npt.NDArray[np.int64]) -> None:
        """``counts``: one for all matrices of a dense weight, or one for each expert."""
        squares = squares.reshape(1, -1) if isinstance(counts, int) else squares
        entry = self.entries.get(name)
        if entry is None:
            self.entries[name] = Entry(squares.copy(), np.array(counts, np.int64).reshape(-1))
        elif entry.sums.shape != squares.shape:
            raise Refusal.failed(f"{name} cannot be collected", f"it was {entry.sums.shape} and is now {squares.shape}")
        else:
            entry.sums += squares
            entry.counts += counts

    def _weight(self, address: int) -> str:
        """A weight's name, without what backends put around it: ``CUDA0#blk.0.attn_k.weight#0``."""
        known = self._names.get(address)
        if known is None:
            name = Tensor.from_address(address).name.decode("utf-8", "replace")
            known = name.split("#")[1] if "#" in name else name
            if known.startswith("blk.") and known.endswith(".weight"):
                self._names[address] = known  # weights stay where they are; other tensors' addresses are used again
        return known

    def _learn(self) -> None:
        """Find where computing may end: at the node that makes the last product's input, if no other product comes after it,
        else at the last product. Only a node with a name of its own counts, so that a graph that differs is noticed: then
        everything is computed."""
        products, nodes = self._pass.products, self._pass.nodes
        if not self._may_end_early or not products:
            return
        *others, last = products
        names = Counter(name for _, name in nodes)
        makers = [at for at, (address, _) in enumerate(nodes) if address == last.address]
        if last.dense and makers and all(product.at < makers[0] for product in others):
            at, is_input = makers[0], True
        else:
            at, is_input = last.at, False
        if names[nodes[at][1]] == 1:
            self._last = _Last(at, nodes[at][1], last, is_input)


def _is_collected(values: Tensor) -> bool:
    return bool(values.ne[1] >= _FEWEST_ROWS and is_float(values))


def _is_finite(squares: Sums) -> bool:
    # Squares do not cancel out, and float32's fit into float64 many times: the sum is finite if all are.
    return math.isfinite(squares.sum())


def _first_bad_row(values: Floats) -> int | None:
    """The first token with NaN or infinity (or a square that is) of ``values`` [ne3, ne2, ne1, ne0]; None where they are not
    one row for each token."""
    if values.shape[:2] != (1, 1):
        return None
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.einsum("ij,ij->i", values[0, 0], values[0, 0]))
    return int(finite.argmin()) if not finite.all() else None
