"""ggml's row functions for many types at once: widen to float32, quantise, validate; what llama-quantize's loop is made of.

Memory is passed by address; whoever calls keeps it alive and large enough. Every call releases the GIL.
Source: src/llama-quant.cpp (``llama_tensor_dequantize_impl``, ``llama_tensor_quantize_impl``) and ggml/include/ggml.h.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.embedded.library import Library
from imatrix_runner.engines.embedded.refusal import Refusal

Floats = npt.NDArray[np.float32]

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64
_TO_FLOAT = ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _I64)
_WIDENERS = {b"f16": "ggml_fp16_to_fp32_row", b"bf16": "ggml_bf16_to_fp32_row"}

PASS_FUNCTIONS = (
    *("ggml_get_type_traits", "ggml_quantize_chunk", "ggml_quantize_init", "ggml_validate_row_data", "gguf_init_from_file"),
    *("gguf_set_kv", "gguf_add_tensor", "gguf_get_meta_data", *_WIDENERS.values()),
)
"""What a pass cannot do without."""


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


def is_wild(numbers: Floats) -> bool:
    """Whether a search over these numbers could overflow: ggml may then give up with an assertion where other code would go on.
    No model that works has such numbers."""
    return max(float(numbers.max(initial=0)), -float(numbers.min(initial=0))) > MOST


def are_wild_weights(weights: Floats) -> bool:
    """The same of weights, which must not be negative either."""
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
        self._ours: dict[tuple[int, bool], Any] = {}
        self._types: dict[str, Type] = {}

    def type(self, name: str) -> Type:
        """A type by its name in any case. Raises :class:`Refusal` for one this library does not have."""
        if not self._types:
            # GGML_TYPE_COUNT is where llama.cpp's own defaults stand for "none given".
            count = self._library.llama.llama_model_quantize_default_params().output_tensor_type
            found = (self._of(number) for number in range(count))
            # Of two with one name the first counts; a number that is no longer a type has no block.
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
            raise Refusal.mismatch(f"its ggml describes types in another way (at {name.decode('utf-8', 'replace') or number})")
        return Type(number, name.decode("utf-8", "replace"), block, size, quantised)

    def _traits(self, number: int) -> _Traits:
        return _Traits.from_address(self._library.ggml("ggml_get_type_traits")(number))

    def can_widen(self, kind: Type) -> bool:
        """Whether llama-quantize converts from this type at all."""
        return kind.name in ("f32", "f16", "bf16") or (kind.is_quantised and bool(self._traits(kind.number).to_float))

    def widen(self, kind: Type, source: int, target: int, count: int) -> None:
        """``count`` elements at ``source`` to float32 at ``target``."""
        function = self._wide.get(kind.number)
        if function is None:
            named = _WIDENERS.get(kind.name.encode())
            function = self._library.ggml(named) if named else _TO_FLOAT(self._traits(kind.number).to_float)
            self._wide[kind.number] = function
        function(source, target, count)

    def quantize(
        self, kind: Type, source: int, target: int, rows: int, n_per_row: int, weights: int | None, *, wild: bool = False
    ) -> None:
        """``rows`` rows of float32; ``weights``: one float32 for every column, or None. ``wild``: they are such that ggml's own
        functions must decide."""
        ours = self._ours.get((kind.number, weights is not None))
        if ours is not None and not wild:
            ours(source, target, rows, n_per_row, weights)
        else:
            self._quantize(kind.number, source, target, 0, rows, n_per_row, weights)

    @property
    def has_own(self) -> bool:
        """Whether any type is quantised by another function than ggml's."""
        return bool(self._ours)

    def replace(self, kind: Type, function: Any, *, weighted: bool) -> None:
        """Quantise to ``kind`` with another function from now on, which gives the same bytes."""
        self._ours[kind.number, weighted] = function

    def valid(self, kind: Type, data: int, n_bytes: int) -> bool:
        """Whether all scales and numbers are finite; why not goes to llama.cpp's log."""
        return bool(self._validate(kind.number, data, n_bytes))

    def needs_weights(self, kind: Type) -> bool:
        """Whether ggml aborts the process when it is to quantise to this type without weights."""
        return bool(self._library.ggml("ggml_quantize_requires_imatrix")(kind.number))

    def prepare(self, kind: Type) -> None:
        """Make the tables of the type, which takes seconds for some; ggml does it once per process, under a lock."""
        self._library.ggml("ggml_quantize_init")(kind.number)
