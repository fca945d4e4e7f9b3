"""The evaluation callback: sees products with a model's weights, and their inputs, while llama.cpp computes.

llama.cpp asks for every node whether its result is wanted, computes up to it, and passes it to the callback. Which products are
collected follows ``tools/imatrix/imatrix.cpp``.
"""

from __future__ import annotations

import ctypes
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from imatrix_runner.engines.worker.collect.activations import Reader, is_float
from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.tensor_layout import Operations, Tensor

OUTPUT = "output.weight"
_FEWEST_ROWS = 16  # imatrix.cpp: products with fewer are not collected
_OP = Tensor.op.offset


@dataclass(frozen=True)
class Product:
    """A product with a weight: node number ``at``, the address of its input, that of the experts' numbers (0 for a dense
    weight), the weight's numbers of matrices (ne3, ne2) and of columns."""

    weight: str
    at: int
    address: int
    experts: int
    n_mat: tuple[int, int]
    columns: int

    @property
    def dense(self) -> bool:
        return not self.experts


@dataclass(frozen=True)
class LastNode:
    """Where the computation may end: after node number ``at``, named ``node``, which is the last product or (``is_input``)
    makes the last product's input."""

    at: int
    node: bytes
    product: Product
    is_input: bool


@dataclass
class SeenGraph:
    """One computed graph: the number of nodes asked for, the numbers of tokens seen, and (while learning) every node's address
    and name and every wanted product."""

    asked: int = 0
    ended: bool = False
    tokens: set[int] = field(default_factory=set)
    nodes: list[tuple[int, bytes]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)


class GraphWatch(ABC):
    """Watches graphs. Call :meth:`begin` before every decode and :meth:`check` after it."""

    def __init__(self, library: Library, operations: Operations) -> None:
        self._operations = operations
        self._reader = Reader(library)
        self._names: dict[int, str] = {}
        self._last: LastNode | None = None
        self._learning = False
        self._graph = SeenGraph()
        self._error: BaseException | None = None
        self.seconds = 0.0  # spent in the callback
        # llama.cpp keeps this pointer: it must live as long as the context.
        self.callback = library.llama.ggml_backend_sched_eval_callback(self._evaluate)

    def begin(self, *, learn: bool = False) -> None:
        """Prepare for a graph. ``learn``: note all nodes and products; nothing is skipped."""
        self._graph, self._learning = SeenGraph(), learn

    def check(self, n_tokens: int) -> None:
        """Raise the callback's error, if any: exceptions cannot pass through llama.cpp. Also raises :class:`Refusal` if
        llama.cpp did not compute all ``n_tokens`` in one graph, because inputs are identified by address within a graph."""
        if self._error is not None:
            raise self._error
        if self._graph.tokens and n_tokens not in self._graph.tokens:
            met = f"it computed {sorted(self._graph.tokens)} of {n_tokens} tokens at once"
            raise Refusal.failed("llama.cpp did not compute the batch as expected", met, "Use --engine binaries.")
        if self._learning:
            self._learned(self._graph)
            self._learning = False

    @abstractmethod
    def _wants(self, product: Tensor) -> bool:
        """Whether the result of a product is needed now."""

    @abstractmethod
    def _take(self, product: Tensor) -> None:
        """Handle a computed product that was wanted."""

    @abstractmethod
    def _take_last_input(self, product: Product, address: int, values: Tensor) -> None:
        """Handle the input of the last product, which is not computed itself."""

    @abstractmethod
    def _learned(self, graph: SeenGraph) -> None:
        """Handle a graph that was computed to learn its nodes and products."""

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
        this = self._graph
        at, this.asked = this.asked, this.asked + 1
        if self._learning:
            this.nodes.append((pointer, Tensor.from_address(pointer).name))
        elif self._last is not None:
            if this.ended:
                return False
            if at == self._last.at and self._last.is_input and self._is_wanted_input(Tensor.from_address(pointer)):
                return True
        op = ctypes.c_int.from_address(pointer + _OP).value
        if op not in (self._operations.mul_mat, self._operations.mul_mat_id):
            return False
        return self._wants(Tensor.from_address(pointer))

    def _is_wanted_input(self, node: Tensor) -> bool:
        return self._last is not None and node.name == self._last.node and is_collected(node)

    def _look(self, pointer: int) -> bool:
        """Handle a computed node. Returns false to end this part of the graph."""
        node, last, this = Tensor.from_address(pointer), self._last, self._graph
        is_last = last is not None and not self._learning and this.asked == last.at + 1 and node.name == last.node
        if last is not None and is_last and last.is_input:
            self._take_last_input(last.product, pointer, node)
        else:
            self._take(node)
        this.ended = is_last
        return not is_last and self._error is None

    def _note(self, product: Tensor) -> None:
        """While learning, remember a wanted product; it is the node that was asked for last."""
        if not self._learning:
            return
        weight, by_expert = Tensor.from_address(product.src[0]), product.op == self._operations.mul_mat_id
        ids = product.src[2] if by_expert else 0
        n_mat = (1, weight.ne[2]) if by_expert else (weight.ne[3], weight.ne[2])
        name, at = self.weight_name(product.src[0]), self._graph.asked - 1
        self._graph.products.append(Product(name, at, product.src[1], ids, n_mat, weight.ne[0]))

    def _saw_rows(self, values: Tensor, n_mat: tuple[int, int]) -> int:
        """Number of tokens that one matrix of a dense weight was multiplied with."""
        _, n1, n2, n3 = values.ne
        rows: int = n1 * n2 * n3 // (n_mat[0] * n_mat[1])
        self._graph.tokens.add(rows)
        return rows

    def weight_name(self, address: int) -> str:
        """A weight's name, without the backends' decoration: ``CUDA0#blk.0.attn_k.weight#0``."""
        known = self._names.get(address)
        if known is None:
            name = Tensor.from_address(address).name.decode("utf-8", "replace")
            known = name.split("#")[1] if "#" in name else name
            if known.startswith("blk.") and known.endswith(".weight"):
                self._names[address] = known  # weights keep their addresses; those of other tensors are reused
        return known


def last_node(nodes: Sequence[tuple[int, bytes]], products: Sequence[Product]) -> LastNode | None:
    """Find where a graph of ``nodes`` may end if only ``products`` (in order) matter: at the node that makes the last product's
    input, if no other product comes after it, else at the last product. None if that node's name is not unique, by which a
    graph that differs is detected; such a graph is computed completely."""
    if not products:
        return None
    *others, last = products
    names = Counter(name for _, name in nodes)
    makers = [at for at, (address, _) in enumerate(nodes) if address == last.address]
    if last.dense and makers and all(product.at < makers[0] for product in others):
        at, is_input = makers[0], True
    else:
        at, is_input = last.at, False
    return LastNode(at, nodes[at][1], last, is_input) if names[nodes[at][1]] == 1 else None


def is_collected(values: Tensor) -> bool:
    """Whether llama-imatrix collects a product with these inputs."""
    return bool(values.ne[1] >= _FEWEST_ROWS and is_float(values))
