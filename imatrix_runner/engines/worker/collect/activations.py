"""Reads activations from ggml tensors and sums their squares, per column and (for mixtures) per expert."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.worker.library import InitParams, Library
from imatrix_runner.engines.worker.tensor_layout import F32, Tensor

Floats = npt.NDArray[np.float32]

Sums = npt.NDArray[np.float64]

Experts = npt.NDArray[np.int32]

# Rows summed in float32 before they are added to a float64 sum: einsum then need not widen them (4x faster), and the rounding
# error of 128 positive terms stays below 8e-6 in the worst case (measured: 3e-7).
_ROWS = 128


class Reader:
    """Views of tensors' values; values in device memory are copied to host memory first."""

    def __init__(self, library: Library) -> None:
        self._is_host = library.ggml("ggml_backend_buffer_is_host")
        self._copy = library.ggml("ggml_backend_tensor_get")
        self._n_bytes = library.ggml("ggml_nbytes")
        self._held = bytearray()

    def on_host(self, tensor: Tensor) -> bool:
        return bool(self._is_host(tensor.buffer))

    def floats(self, pointer: int, tensor: Tensor) -> Floats:
        """float32 [ne3, ne2, ne1, ne0], valid until the next call or until llama.cpp goes on."""
        values: Floats = self._view(pointer, tensor, np.float32, keep=False)
        return values

    def experts(self, pointer: int, tensor: Tensor) -> Experts:
        """int32 [n_tokens, n_used], a copy; the tensor is usually a strided view."""
        ids: Experts = self._view(pointer, tensor, np.int32, keep=True)[0, 0]
        return ids

    def _view(self, pointer: int, tensor: Tensor, kind: type[np.float32 | np.int32], *, keep: bool) -> Any:
        n_bytes = self._n_bytes(pointer)
        (n0, n1, n2, n3), (s0, s1, s2, s3) = tensor.ne, tensor.nb
        if self.on_host(tensor):
            held = (ctypes.c_char * n_bytes).from_address(tensor.data)
        else:
            if len(self._held) < n_bytes:
                self._held = bytearray(n_bytes)
            held = (ctypes.c_char * n_bytes).from_buffer(self._held)
            self._copy(pointer, held, 0, n_bytes)
        view = np.ndarray((n3, n2, n1, n0), kind, held, 0, (s3, s2, s1, s0))
        return view.copy() if keep else view


def is_float(tensor: Tensor) -> bool:
    return bool(tensor.type == F32)


def column_squares(rows: Floats) -> Sums:
    """float64 [n_columns]: Σ x² over float32 ``rows`` [n_rows, n_columns]."""
    total: Sums = np.einsum("ij,ij->j", rows[:_ROWS], rows[:_ROWS]).astype(np.float64)
    for begin in range(_ROWS, len(rows), _ROWS):
        block = rows[begin : begin + _ROWS]
        total += np.einsum("ij,ij->j", block, block)
    return total


def slice_squares(values: Floats) -> Sums:
    """float64 [ne3, ne2, ne0]: Σ x² over the rows of each matrix of ``values`` [ne3, ne2, ne1, ne0]."""
    total = np.empty((*values.shape[:2], values.shape[3]))
    for i3, i2 in np.ndindex(values.shape[:2]):
        total[i3, i2] = column_squares(values[i3, i2])
    return total


def fold(squares: Sums, n3: int, n2: int) -> Sums:
    """float64 [n3 * n2, n_columns]: the sums of ``squares`` [ne3, ne2, n_columns] for each of a weight's ``n2 * n3`` matrices.

    Assigned as in llama-imatrix: activations with more matrices than the weight wrap around (tools/imatrix/imatrix.cpp).
    """
    if squares.shape[0] == squares.shape[1] == n3 == n2 == 1:
        only: Sums = squares[0]
        return only
    total = np.zeros((n3 * n2, squares.shape[2]))
    for i3, i2 in np.ndindex(squares.shape[:2]):
        total[(i3 % n3) * n2 + i2 % n2] += squares[i3, i2]
    return total


def expert_squares(values: Floats, experts: Experts, n_experts: int) -> tuple[Sums, npt.NDArray[np.int64]]:
    """Σ x² [n_experts, n_columns] and tokens [n_experts] of a mixture's weight.

    ``values`` [n_tokens, n_slots, n_columns]: one slot for all of a token's experts, or one for each;
    ``experts`` [n_tokens, n_used]: which expert each slot went to.
    """
    _, n_slots, n_columns = values.shape
    n_used = experts.shape[1]
    total, chosen = np.zeros((n_experts, n_columns)), experts.ravel()
    order = np.argsort(chosen, kind="stable")
    counts = np.bincount(chosen, minlength=n_experts).astype(np.int64)
    tokens, slots = order // n_used, order % n_used % n_slots
    begin = 0
    for expert in np.flatnonzero(counts):
        end = begin + counts[expert]
        total[expert] = column_squares(values[tokens[begin:end], slots[begin:end]])
        begin = end
    return total, counts


_CONTEXT_BYTES = 1 << 20  # a handful of tensors and one small graph, descriptions only

_GRAPH_NODES = 16


@dataclass(frozen=True)
class _Device:
    pointer: int
    backend: int
    allocator: int


class DeviceSums:
    """Reduces tensors on the devices that hold them; one backend per buffer type, created on first use."""

    def __init__(self, library: Library) -> None:
        self._ggml = library.ggml
        self._devices: dict[int, _Device | None] = {}

    def squares(self, tensor: Tensor) -> Sums | None:
        """float64 [ne3, ne2, ne0]: Σ x² over the rows of a float32 tensor; None if the device cannot compute it."""
        device = self._device(tensor.buffer)
        if device is None:
            return None
        ggml = self._ggml
        context = ggml("ggml_init")(InitParams(_CONTEXT_BYTES, None, True))
        try:
            here = ggml("ggml_new_tensor_4d")(context, F32, *tensor.ne)
            mirror = Tensor.from_address(here)
            mirror.nb[:], mirror.data, mirror.buffer = tensor.nb[:], tensor.data, tensor.buffer
            squared = ggml("ggml_sqr")(context, here)
            turned = ggml("ggml_cont")(context, ggml("ggml_transpose")(context, squared))
            summed = ggml("ggml_sum_rows")(context, turned)
            if not all(ggml("ggml_backend_dev_supports_op")(device.pointer, node) for node in (squared, turned, summed)):
                return None
            graph = ggml("ggml_new_graph_custom")(context, _GRAPH_NODES, False)
            ggml("ggml_build_forward_expand")(graph, summed)
            if not ggml("ggml_gallocr_alloc_graph")(device.allocator, graph):
                return None  # no room for one more copy of the tensor
            if ggml("ggml_backend_graph_compute")(device.backend, graph):
                return None
            ne0, _, ne2, ne3 = tensor.ne
            sums = np.empty((ne3, ne2, ne0), np.float32)
            ggml("ggml_backend_tensor_get")(summed, sums.ctypes.data_as(ctypes.c_void_p), 0, sums.nbytes)
            return sums.astype(np.float64)
        finally:
            ggml("ggml_free")(context)

    def close(self) -> None:
        """Free the devices' memory."""
        for device in self._devices.values():
            if device is not None:
                self._ggml("ggml_gallocr_free")(device.allocator)
                self._ggml("ggml_backend_free")(device.backend)
        self._devices.clear()

    def _device(self, buffer: int) -> _Device | None:
        kind = self._ggml("ggml_backend_buffer_get_type")(buffer)
        if kind not in self._devices:
            pointer = self._ggml("ggml_backend_buft_get_device")(kind)
            backend = self._ggml("ggml_backend_dev_init")(pointer, None) if pointer else None
            self._devices[kind] = _Device(pointer, backend, self._ggml("ggml_gallocr_new")(kind)) if backend else None
        return self._devices[kind]
