"""Finds NaN and infinity in a model's weights, without llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.gguf_file import TensorInfo, read_header
from imatrix_runner.models.gguf_names import shard_names

# ggml type -> its storage word and the bits of its exponent, which are all set only in NaN and infinity.
_EXPONENTS = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
_SLAB = 1 << 24


def non_finite_tensor(model: Path) -> str:
    """The name of the first tensor of a GGUF (of all its shards) that contains NaN or infinity; empty if there is none.

    Only floating-point tensors are checked: block formats store their values as integers and scales.
    """
    return next((name for path in shard_names(model) for name in _in_file(model.with_name(path))), "")


def non_finite_error(model: Path, seen: str, tensor: str) -> InvalidDataError:
    """The error for a model whose results are NaN or infinite. ``seen``: where, such as ``its logits in chunk 3``; ``tensor``:
    a tensor that contains such numbers, empty if none was found."""
    why = f"{seen} are NaN or infinite" + (f": its tensor {tensor} contains such numbers" if tensor else "")
    todo = "The file is damaged, or overflows (F16 sooner than BF16): download or create it again, or choose another type."
    return InvalidDataError(f"{model.name} produced NaN or infinite numbers", why, todo)


def _in_file(path: Path) -> Iterator[str]:
    header = read_header(path)
    for tensor in header.tensors:
        if tensor.type_name in _EXPONENTS and not _is_finite(path, header.data_offset + tensor.offset, tensor):
            yield tensor.name


def _is_finite(path: Path, at: int, tensor: TensorInfo) -> bool:
    words, exponent = _EXPONENTS[tensor.type_name]
    kind = np.dtype(words)
    for first in range(0, tensor.n_elements, _SLAB):
        count = min(_SLAB, tensor.n_elements - first)
        numbers = np.fromfile(path, kind, count, offset=at + first * kind.itemsize)
        if ((numbers & kind.type(exponent)) == exponent).any():
            return False
    return True
