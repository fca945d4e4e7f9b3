"""The ggml tensor types: numbers, names and block sizes."""

from __future__ import annotations

from functools import cache
from math import prod

# ggml/include/ggml.h, ggml/src/ggml-common.h: name -> id, elements and bytes of a block. Other types are looked up in the gguf
# package, which takes a tenth of a second to import.
_TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q8_1": (9, 32, 40),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "Q8_K": (15, 256, 292),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36),
    "Q1_0": (41, 128, 18),
    "Q2_0": (42, 64, 18),
}
_BY_ID = {number: (name, block, size) for name, (number, block, size) in _TYPES.items()}
_PLAIN = frozenset(("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"))

# ggml-quants.c: quantising to these types ignores the imatrix, so they need none.
IGNORE_WEIGHTS = frozenset(("F32", "F16", "BF16", "Q8_0", "Q1_0", "Q2_0", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0"))


@cache
def _of_gguf() -> dict[str, tuple[int, int, int]]:
    """All types of the installed gguf package, which may include newer ones."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return {kind.name: (int(kind), *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}


def _by_id(number: int) -> tuple[str, int, int] | None:
    """Name, elements per block and bytes per block of a type; None if it is unknown."""
    if number in _BY_ID:
        return _BY_ID[number]
    return next(((name, block, size) for name, (found, block, size) in _of_gguf().items() if found == number), None)


def type_size(number: int) -> tuple[int, int] | None:
    """``(elements, bytes)`` of one block of a ggml type; None if the type is unknown."""
    known = _by_id(number)
    return (known[1], known[2]) if known else None


def type_id(name: str) -> int | None:
    """The ggml type with this name, in any case (``q4_K``, ``BF16``); None if unknown."""
    known = _TYPES.get(name.upper()) or _of_gguf().get(name.upper())
    return known[0] if known else None


def is_plain(name: str) -> bool:
    """Whether a type stores one number per element, instead of blocks that share scales."""
    return name in _PLAIN


def type_name(number: int) -> str:
    """The name of a type (``Q4_K``, ``BF16``); ``TYPE_<number>`` if it is unknown."""
    known = _by_id(number)
    return known[0] if known else f"TYPE_{number}"


def tensor_bytes(shape: tuple[int, ...], number: int) -> int | None:
    """Size in bytes of a tensor, unpadded; None for an unknown type or if a row does not divide into blocks."""
    size = type_size(number)
    if size is None or (shape and shape[0] % size[0]):
        return None
    return prod(shape) // size[0] * size[1]
