"""The weights of a loaded model: found in a computed graph, compared with the model's file, and overwritten."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.worker.batching import MicroBatch
from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.llama_context import open_context
from imatrix_runner.engines.worker.quantize.gguf_headers import SourceHeader
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.tensor_layout import Tensor

_TOKENS = 8
"""Tokens of the graph that is looked through: with more, a device may compute with copies of weights that lie in RAM."""

_NO_OPERATION = 0  # ggml.h, GGML_OP_NONE

_READ_ONLY, _BY_ROWS = "_Mapped", "_Split"
"""How the names of buffer types end whose tensors cannot be written, or not in parts (ggml-backend.cpp, ggml-cuda.cu)."""


@dataclass(frozen=True)
class LoadedWeights:
    """Weights by name, each with the addresses of its ggml tensors: a device may have a second one of tied embeddings."""

    library: Library
    places: Mapping[str, tuple[int, ...]]

    @classmethod
    def find(
        cls, library: Library, model: Any, source: SourceHeader, options: CollectOptions, names: Iterable[str]
    ) -> LoadedWeights:
        """The weights ``names`` of a loaded ``model``. Raises :class:`Refusal` for one that cannot be overwritten."""
        found = _Watcher(library, frozenset(names))
        _compute(library, model, source.files[0], options, found)
        for name, addresses in found.places.items():
            if not addresses:
                copied = name in found.copies
                raise not_writable(name, f"llama.cpp {'computes with a copy of it' if copied else 'does not compute with it'}")
            for address in addresses:
                _require_writable(library, source, name, address)
        return cls(library, {name: tuple(addresses) for name, addresses in found.places.items()})

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Overwrite a part of a weight."""
        for address in self.places[name]:
            self.library.ggml("ggml_backend_tensor_set")(address, data, offset, len(data))

    def holds(self, name: str, offset: int, data: bytes) -> bool:
        """Whether a part of a weight has these bytes."""
        held = ctypes.create_string_buffer(len(data))
        for address in self.places[name]:
            self.library.ggml("ggml_backend_tensor_get")(address, held, offset, len(data))
            if held.raw != data:
                return False
        return True


class _Watcher:
    """An evaluation callback that looks at the sources of every node of a graph, and wants no result."""

    def __init__(self, library: Library, names: frozenset[str]) -> None:
        self.places: dict[str, list[int]] = {name: [] for name in names}
        self.copies: set[str] = set()
        self.error: BaseException | None = None
        self._seen: set[int] = set()
        # llama.cpp keeps this pointer: it must live as long as the context.
        self.callback = library.llama.ggml_backend_sched_eval_callback(self._evaluate)

    def _evaluate(self, pointer: int, _ask: bool, _data: object) -> bool:
        try:
            self._look(Tensor.from_address(pointer))
        except BaseException as error:  # noqa: BLE001 - an exception must not cross llama.cpp
            self.error = self.error or error
        return False

    def _look(self, node: Tensor) -> None:
        for address in filter(None, node.src):
            weight = Tensor.from_address(address)
            root = weight.view_src or address
            if root in self._seen:
                continue
            weight = Tensor.from_address(root)
            name = weight.name.decode("utf-8", "replace")
            if "#" in name:
                self.copies.add(name.split("#")[1])  # CUDA0#blk.0.attn_k.weight#0
            elif name in self.places and weight.op == _NO_OPERATION:
                self._seen.add(root)
                self.places[name].append(root)


def _compute(library: Library, model: Any, path: Path, options: CollectOptions, watcher: _Watcher) -> None:
    few = replace(options, n_ctx=_TOKENS, n_batch=_TOKENS, n_ubatch=_TOKENS)
    with open_context(library, model, path, few, watcher.callback) as context:
        ubatch = MicroBatch(1, 0, _TOKENS)
        tokens = np.arange(_TOKENS, dtype=np.int32)[np.newaxis] % context.n_vocab
        context.compute(tokens, ubatch)
    if watcher.error is not None:
        raise watcher.error


def _require_writable(library: Library, source: SourceHeader, name: str, address: int) -> None:
    weight, tensor = Tensor.from_address(address), source.tensors[name]
    if not weight.buffer:
        raise not_writable(name, "it has no buffer")
    if weight.type != tensor.kind.number or library.ggml("ggml_nbytes")(address) != tensor.n_bytes:
        raise not_writable(name, "llama.cpp holds it in another form than the file")
    kind = library.ggml("ggml_backend_buffer_get_type")(weight.buffer)
    buffer = library.ggml("ggml_backend_buft_name")(kind).decode("utf-8", "replace")
    if buffer.endswith((_READ_ONLY, _BY_ROWS)):
        raise not_writable(name, f"its buffer, {buffer}, cannot be written in parts")


def not_writable(name: str, why: str) -> Refusal:
    """The error for a weight that cannot be overwritten."""
    return Refusal.invalid(
        "A tensor cannot be rounded in the loaded model", f"{name}: {why}", "Leave the tensor out, and leave out -sm row."
    )
