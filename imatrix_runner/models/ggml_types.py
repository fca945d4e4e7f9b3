"""The ggml tensor types: numbers, names and block sizes, from the gguf package plus what is newer than it."""

from __future__ import annotations

from functools import cache
from math import prod

# Types newer than the newest gguf package (ggml/include/ggml.h, ggml/src/ggml-common.h): name -> id, block, bytes.
_NEWER_TYPES = {"Q2_0": (42, 64, 18)}
_PLAIN = frozenset(("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"))

# ggml-quants.c: these are rounded without a look at the weights, so lacking them costs nothing.
IGNORE_WEIGHTS = frozenset(("F32", "F16", "BF16", "Q8_0", "Q1_0", "Q2_0", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0"))


@cache
def _types() -> dict[str, tuple[int, int, int]]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return {**{kind.name: (int(kind), *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}, **_NEWER_TYPES}


@cache
def _types_by_id() -> dict[int, tuple[str, int, int]]:
    return {number: (name, block, size) for name, (number, block, size) in _types().items()}


def type_size(number: int) -> tuple[int, int] | None:
    """``(elements, bytes)`` of one block of a ggml type; None if the type is unknown."""
    known = _types_by_id().get(number)
    return (known[1], known[2]) if known else None


def type_id(name: str) -> int | None:
    """The ggml type with this name, in any case (``q4_K``, ``BF16``); None if unknown."""
    known = _types().get(name.upper())
    return known[0] if known else None


def is_plain(name: str) -> bool:
    """Whether a type stores one number per element, not blocks that share scales."""
    return name in _PLAIN


def type_name(number: int) -> str:
    """``Q4_K``, ``BF16``; a type unknown to us is called ``TYPE_<number>``."""
    known = _types_by_id().get(number)
    return known[0] if known else f"TYPE_{number}"


def tensor_bytes(shape: tuple[int, ...], number: int) -> int | None:
    """Bytes a tensor of this shape and type takes, unpadded; None for an unknown type or a row that is no whole blocks."""
    size = type_size(number)
    if size is None or (shape and shape[0] % size[0]):
        return None
    return prod(shape) // size[0] * size[1]
