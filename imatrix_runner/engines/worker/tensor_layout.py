"""``struct ggml_tensor`` as in ggml.h (ggml 0.9 to 0.25), and the check that the loaded library agrees.

The bindings do not have this struct, and ggml has accessors for only a few fields; the collector reads the others from memory.
So every start creates tensors and compares their fields, and refuses a library that differs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from imatrix_runner.engines.worker.library import InitParams, Library
from imatrix_runner.engines.worker.refusal import Refusal

F32, I32 = 0, 26
MAX_SOURCES = 10

_OBJECT_BYTES = 32  # ggml-impl.h, struct ggml_object: what precedes every tensor in a context


class Tensor(ctypes.Structure):
    """ggml.h, ``struct ggml_tensor``. ``ne``: elements per dimension, innermost first; ``nb``: bytes between neighbours."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


@dataclass(frozen=True)
class Operations:
    """The loaded library's numbers of the two operations that multiply by weights."""

    mul_mat: int
    mul_mat_id: int

    @classmethod
    def of(cls, library: Library) -> Operations:
        """Look the operations up by name: their numbers change whenever ggml gets a new one. Raises :class:`Refusal`."""
        names = {library.ggml("ggml_op_name")(number): number for number in range(64)}
        try:
            return cls(names[b"MUL_MAT"], names[b"MUL_MAT_ID"])
        except KeyError as error:
            raise Refusal.mismatch(f"its ggml knows no operation {error}") from error


def check_layout(library: Library) -> None:
    """Create two tensors and their product with the library's own functions, and compare every field with :class:`Tensor`.

    Raises :class:`Refusal` naming the fields that differ.
    """
    ggml = library.ggml
    context = ggml("ggml_init")(InitParams(1 << 20, None, False))
    if not context:
        raise Refusal.failed("ggml cannot allocate a megabyte", "ggml_init returned NULL", "Free some memory and try again.")
    try:
        weight = ggml("ggml_new_tensor_4d")(context, F32, 3, 5, 7, 2)
        values = ggml("ggml_new_tensor_4d")(context, F32, 3, 11, 7, 2)
        ggml("ggml_set_name")(weight, b"layout.weight")
        product = ggml("ggml_mul_mat")(context, weight, values)
        _compare(library, weight, values, product)
    finally:
        ggml("ggml_free")(context)


def _compare(library: Library, weight: int, values: int, product: int) -> None:
    ggml = library.ggml
    one, other, result = (Tensor.from_address(pointer) for pointer in (weight, values, product))
    facts = {
        "size": ggml("ggml_tensor_overhead")() == _OBJECT_BYTES + ctypes.sizeof(Tensor),
        "type": one.type == F32,
        "ne": tuple(one.ne) == (3, 5, 7, 2) and tuple(result.ne) == (5, 11, 7, 2),
        "nb": tuple(one.nb) == (4, 12, 60, 420) and one.nb[3] * one.ne[3] == ggml("ggml_nbytes")(weight),
        "op": one.op == 0 and result.op == Operations.of(library).mul_mat,
        "src": result.src[0] == weight and result.src[1] == values and result.src[2] is None,
        "view_src": one.view_src is None and one.view_offs == 0,
        "data": one.data == ggml("ggml_get_data")(weight) and other.data == ggml("ggml_get_data")(values),
        "name": one.name == ggml("ggml_get_name")(weight) == b"layout.weight",
    }
    wrong = [field for field, right in facts.items() if not right]
    if wrong:
        version = ggml("ggml_version")().decode("utf-8", "replace")
        raise Refusal.mismatch(f"ggml {version} has a different tensor layout (at {', '.join(wrong)})")
