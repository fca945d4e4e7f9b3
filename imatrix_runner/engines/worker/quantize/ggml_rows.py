"""ggml's row functions, of which llama-quantize's loop consists: widen to float32, quantise, validate.

Memory is passed by address; the caller keeps it alive and large enough. Every call releases the GIL.
Source: src/llama-quant.cpp (``llama_tensor_dequantize_impl``, ``llama_tensor_quantize_impl``) and ggml/include/ggml.h.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.refusal import Refusal

Floats = npt.NDArray[np.float32]

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64
_TO_FLOAT = ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _I64)
_WIDENERS = {b"f16": "ggml_fp16_to_fp32_row", b"bf16": "ggml_bf16_to_fp32_row"}

PASS_FUNCTIONS = (
    *("ggml_get_type_traits", "ggml_quantize_chunk", "ggml_quantize_init", "ggml_validate_row_data", "gguf_init_from_file"),
    *("gguf_set_kv", "gguf_add_tensor", "gguf_get_meta_data", *_WIDENERS.values()),
)
"""Functions that a pass requires."""


class _Traits(ctypes.Structure):
    """ggml.h, ``struct ggml_type_traits``."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", _I64),
        ("blck_size_interleave", _I64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _POINTER),
        ("from_float_ref", _POINTER),
    )


MOST, MOST_WEIGHT = 1e8, 1e12


def is_extreme(numbers: Floats) -> bool:
    """Whether a search over these numbers could overflow: ggml may then fail an assertion where the native kernels would not.
    No working model has such numbers."""
    return max(float(numbers.max(initial=0)), -float(numbers.min(initial=0))) > MOST


def are_extreme_weights(weights: Floats) -> bool:
    """The same for weights, which must not be negative either."""
    return not 0 <= float(weights.min(initial=0)) <= float(weights.max(initial=0)) <= MOST_WEIGHT


@dataclass(frozen=True)
class Type:
    """One ggml type: ``block`` elements take ``size`` bytes."""

    number: int
    name: str
    block: int
    size: int
    is_quantised: bool

    def row_bytes(self, n_per_row: int) -> int:
        return n_per_row // self.block * self.size


class Kernels:
    """The loaded library's row functions."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._quantize = library.ggml("ggml_quantize_chunk")
        self._validate = library.ggml("ggml_validate_row_data")
        self._wide: dict[int, Any] = {}
        self._native: dict[tuple[int, bool], Any] = {}
        self._types: dict[str, Type] = {}

    def type(self, name: str) -> Type:
        """A type by its name in any case. Raises :class:`Refusal` if this library does not have it."""
        if not self._types:
            # llama.cpp's default for "no type given" is GGML_TYPE_COUNT.
            count = self._library.llama.llama_model_quantize_default_params().output_tensor_type
            found = (self._of(number) for number in range(count))
            # Of two types with one name the first is used; numbers of removed types have block size 0.
            self._types = {kind.name.lower(): kind for kind in reversed([kind for kind in found if kind.block])}
        try:
            return self._types[name.lower()]
        except KeyError:
            raise Refusal.mismatch(f"its ggml knows no type {name}") from None

    def _of(self, number: int) -> Type:
        ggml = self._library.ggml
        traits = self._traits(number)
        name, block = ggml("ggml_type_name")(number) or b"", ggml("ggml_blck_size")(number)
        size, quantised = ggml("ggml_type_size")(number), ggml("ggml_is_quantized")(number)
        if (traits.type_name or b"", traits.blck_size, traits.type_size, traits.is_quantized) != (name, block, size, quantised):
            raise Refusal.mismatch(f"its ggml describes types differently (at {name.decode('utf-8', 'replace') or number})")
        return Type(number, name.decode("utf-8", "replace"), block, size, quantised)

    def _traits(self, number: int) -> _Traits:
        return _Traits.from_address(self._library.ggml("ggml_get_type_traits")(number))

    def can_widen(self, kind: Type) -> bool:
        """Whether llama-quantize can convert from this type."""
        return kind.name in ("f32", "f16", "bf16") or (kind.is_quantised and bool(self._traits(kind.number).to_float))

    def widen(self, kind: Type, source: int, target: int, count: int) -> None:
        """Convert ``count`` elements at ``source`` to float32 at ``target``."""
        function = self._wide.get(kind.number)
        if function is None:
            named = _WIDENERS.get(kind.name.encode())
            function = self._library.ggml(named) if named else _TO_FLOAT(self._traits(kind.number).to_float)
            self._wide[kind.number] = function
        function(source, target, count)

    def quantize(
        self, kind: Type, source: int, target: int, rows: int, n_per_row: int, weights: int | None, *, extreme: bool = False
    ) -> None:
        """Quantise ``rows`` rows of float32. ``weights``: one float32 for every column, or None. ``extreme``: numbers or
        weights are so large that ggml's own function must be used."""
        native = self._native.get((kind.number, weights is not None))
        if native is not None and not extreme:
            native(source, target, rows, n_per_row, weights)
        else:
            self._quantize(kind.number, source, target, 0, rows, n_per_row, weights)

    @property
    def has_native(self) -> bool:
        """Whether any type is quantised by a native kernel."""
        return bool(self._native)

    def replace(self, kind: Type, function: Any, *, weighted: bool) -> None:
        """From now on quantise to ``kind`` with ``function``, which gives the same bytes."""
        self._native[kind.number, weighted] = function

    def search(self, kind: Type) -> Any:
        """The C function ``quantize_TYPE(rows, out, n_rows, n_per_row, weights)`` for calls with weights: the native kernel
        if one is in use, else ggml's own."""
        native = self._native.get((kind.number, True))
        if native is not None:
            return native
        function = self._library.symbol(f"quantize_{kind.name}")
        function.argtypes, function.restype = (_POINTER, _POINTER, _I64, _I64, _POINTER), ctypes.c_size_t
        return function

    def dequantiser(self, kind: Type) -> int:
        """The address of ggml's C function ``(blocks, numbers, n_elements)`` that widens a quantised type to float32."""
        return int(self._traits(kind.number).to_float or 0)

    def valid(self, kind: Type, data: int, n_bytes: int) -> bool:
        """Whether all scales and numbers are finite; ggml prints the reason if not."""
        return bool(self._validate(kind.number, data, n_bytes))

    def needs_weights(self, kind: Type) -> bool:
        """Whether ggml aborts the process if asked to quantise to this type without weights."""
        return bool(self._library.ggml("ggml_quantize_requires_imatrix")(kind.number))

    def prepare(self, kind: Type) -> None:
        """Build the type's tables, which takes seconds for some types; ggml does it once per process, under a lock."""
        self._library.ggml("ggml_quantize_init")(kind.number)
