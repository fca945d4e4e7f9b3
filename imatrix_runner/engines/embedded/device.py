"""Sums of squares where the activations are: on a GPU they are reduced there, and only one number per column comes back.

A small ggml graph of our own (square, transpose, sum) on a backend of the device that holds the tensor. What the device
cannot do (an unusual layout, an operation its backend lacks) is copied and summed on the host.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from imatrix_runner.engines.embedded.activations import Sums
from imatrix_runner.engines.embedded.layout import F32, Tensor
from imatrix_runner.engines.embedded.library import InitParams, Library

_CONTEXT_BYTES = 1 << 20  # a handful of tensors and one small graph, descriptions only
_GRAPH_NODES = 16


@dataclass(frozen=True)
class _Device:
    pointer: int
    backend: int
    allocator: int


class DeviceSums:
    """Reduces tensors in the memory of the devices that hold them; one backend per kind of buffer, made when first met."""

    def __init__(self, library: Library) -> None:
        self._ggml = library.ggml
        self._devices: dict[int, _Device | None] = {}

    def squares(self, tensor: Tensor) -> Sums | None:
        """float64 [ne3, ne2, ne0]: Σ x² over the rows of a float32 tensor; None where the device cannot do it."""
        device = self._device(tensor.buffer)
        if device is None:
            return None
        ggml = self._ggml
        context = ggml("ggml_init")(InitParams(_CONTEXT_BYTES, None, True))
        try:
            here = ggml("ggml_new_tensor_4d")(context, F32, *tensor.ne)
            twin = Tensor.from_address(here)
            twin.nb[:], twin.data, twin.buffer = tensor.nb[:], tensor.data, tensor.buffer
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
        """Give the devices' memory back."""
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
