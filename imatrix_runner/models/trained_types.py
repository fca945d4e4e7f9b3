"""Detects from the weights whether a model was trained with few distinct values, like ternary and binary models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import from_os_error
from imatrix_runner.models.gguf_file import TensorInfo, read_header, type_id, type_size
from imatrix_runner.models.model import Model

TRAINED_TYPES = {"TQ1_0": 3, "TQ2_0": 3, "Q1_0": 2, "Q2_0": 4}
"""Types for such weights -> number of distinct values in a block (ggml/src/ggml-quants.c). Ordinary weights lose nearly all
information in them."""

_TENSORS, _BLOCKS = 3, 16
"""Number of sampled tensors, and of blocks at the beginning of each."""
_CODES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def holds_few_values(model: Model, type_name: str) -> bool:
    """Whether blocks of the model's weights have no more distinct values than ``type_name`` (of :data:`TRAINED_TYPES`) can
    store.

    False if that cannot be checked: no matrix of a layer is F32, F16 or BF16 with rows of whole blocks.
    """
    number = type_id(type_name)
    size = type_size(number) if number is not None else None
    if size is None:
        return False
    block, most = size[0], TRAINED_TYPES[type_name]
    samples = [blocks for path in model.files for blocks in _samples(path, block)]
    return bool(samples) and all(len(np.unique(row)) <= most for blocks in samples[:_TENSORS] for row in blocks)


def _samples(path: Path, block: int) -> list[npt.NDArray[np.generic]]:
    """The first blocks [n, block] of a few matrices of layers, as stored."""
    header = read_header(path)
    suitable = [tensor for tensor in header.tensors if _suits(tensor, block)]
    middle = len(suitable) // 2
    found = []
    try:
        for tensor in suitable[middle : middle + _TENSORS]:
            count = min(_BLOCKS, tensor.n_elements // block) * block
            at = header.data_offset + tensor.offset
            found.append(np.fromfile(path, _CODES[tensor.type_name], count, offset=at).reshape(-1, block))
    except OSError as error:
        raise from_os_error(error, "reading weights", path) from error
    return found


def _suits(tensor: TensorInfo, block: int) -> bool:
    matrix = tensor.name.startswith("blk.") and len(tensor.shape) > 1 and tensor.shape[0] % block == 0
    return matrix and tensor.type_name in _CODES and "norm" not in tensor.name
