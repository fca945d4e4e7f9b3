"""The file types that this build of llama.cpp offers, as ``llama-quantize --help`` would list them. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from imatrix_runner.toolchain.quant_type import QuantType

_PREFIX = "LLAMA_FTYPE_"

COPY = "COPY"
"""Not a type: copies the tensors unchanged."""

# llama.cpp, tools/quantize/quantize.cpp, QUANT_OPTIONS: name, constant, help; in its order, because of two names with one
# number the first is the canonical one. llama-quantize does not offer every constant (NVFP4, GUESSED).
_OFFERED = (
    ("Q1_0", "MOSTLY_Q1_0", "1.125 bpw quantization"),
    ("Q2_0", "MOSTLY_Q2_0", "2.25 bpw quantization (group 64)"),
    ("Q4_0", "MOSTLY_Q4_0", "4.34G, +0.4685 ppl @ Llama-3-8B"),
    ("Q4_1", "MOSTLY_Q4_1", "4.78G, +0.4511 ppl @ Llama-3-8B"),
    ("MXFP4_MOE", "MOSTLY_MXFP4_MOE", "MXFP4 MoE"),
    ("Q5_0", "MOSTLY_Q5_0", "5.21G, +0.1316 ppl @ Llama-3-8B"),
    ("Q5_1", "MOSTLY_Q5_1", "5.65G, +0.1062 ppl @ Llama-3-8B"),
    ("IQ2_XXS", "MOSTLY_IQ2_XXS", "2.06 bpw quantization"),
    ("IQ2_XS", "MOSTLY_IQ2_XS", "2.31 bpw quantization"),
    ("IQ2_S", "MOSTLY_IQ2_S", "2.5  bpw quantization"),
    ("IQ2_M", "MOSTLY_IQ2_M", "2.7  bpw quantization"),
    ("IQ1_S", "MOSTLY_IQ1_S", "1.56 bpw quantization"),
    ("IQ1_M", "MOSTLY_IQ1_M", "1.75 bpw quantization"),
    ("TQ1_0", "MOSTLY_TQ1_0", "1.69 bpw ternarization"),
    ("TQ2_0", "MOSTLY_TQ2_0", "2.06 bpw ternarization"),
    ("Q2_K", "MOSTLY_Q2_K", "2.96G, +3.5199 ppl @ Llama-3-8B"),
    ("Q2_K_S", "MOSTLY_Q2_K_S", "2.96G, +3.1836 ppl @ Llama-3-8B"),
    ("IQ3_XXS", "MOSTLY_IQ3_XXS", "3.06 bpw quantization"),
    ("IQ3_S", "MOSTLY_IQ3_S", "3.44 bpw quantization"),
    ("IQ3_M", "MOSTLY_IQ3_M", "3.66 bpw quantization mix"),
    ("Q3_K", "MOSTLY_Q3_K_M", "alias for Q3_K_M"),
    ("IQ3_XS", "MOSTLY_IQ3_XS", "3.3 bpw quantization"),
    ("Q3_K_S", "MOSTLY_Q3_K_S", "3.41G, +1.6321 ppl @ Llama-3-8B"),
    ("Q3_K_M", "MOSTLY_Q3_K_M", "3.74G, +0.6569 ppl @ Llama-3-8B"),
    ("Q3_K_L", "MOSTLY_Q3_K_L", "4.03G, +0.5562 ppl @ Llama-3-8B"),
    ("IQ4_NL", "MOSTLY_IQ4_NL", "4.50 bpw non-linear quantization"),
    ("IQ4_XS", "MOSTLY_IQ4_XS", "4.25 bpw non-linear quantization"),
    ("Q4_K", "MOSTLY_Q4_K_M", "alias for Q4_K_M"),
    ("Q4_K_S", "MOSTLY_Q4_K_S", "4.37G, +0.2689 ppl @ Llama-3-8B"),
    ("Q4_K_M", "MOSTLY_Q4_K_M", "4.58G, +0.1754 ppl @ Llama-3-8B"),
    ("Q5_K", "MOSTLY_Q5_K_M", "alias for Q5_K_M"),
    ("Q5_K_S", "MOSTLY_Q5_K_S", "5.21G, +0.1049 ppl @ Llama-3-8B"),
    ("Q5_K_M", "MOSTLY_Q5_K_M", "5.33G, +0.0569 ppl @ Llama-3-8B"),
    ("Q6_K", "MOSTLY_Q6_K", "6.14G, +0.0217 ppl @ Llama-3-8B"),
    ("Q8_0", "MOSTLY_Q8_0", "7.96G, +0.0026 ppl @ Llama-3-8B"),
    ("F16", "MOSTLY_F16", "14.00G, +0.0020 ppl @ Mistral-7B"),
    ("BF16", "MOSTLY_BF16", "14.00G, -0.0050 ppl @ Mistral-7B"),
    ("F32", "ALL_F32", "26.00G              @ 7B"),
)
_ALIAS = "alias for "

# src/llama-model-loader.cpp guesses the file type of a model without one from its tensors' types.
_GUESSED = "GUESSED"
_GUESSES = {"F32": "ALL_F32", **{name: f"MOSTLY_{name}_M" for name in ("Q3_K", "Q4_K", "Q5_K")}}
_LAYER = re.compile(r"blk\.(\d+)")


def ftypes_of(constants: Mapping[str, Any]) -> dict[str, int]:
    """The ``LLAMA_FTYPE_*`` constants among a module's names, without that prefix."""
    return {name[len(_PREFIX) :]: int(value) for name, value in constants.items() if name.startswith(_PREFIX)}


def quant_types(ftypes: Mapping[str, int]) -> tuple[QuantType, ...]:
    """The types that can be made, given the constants (``{"MOSTLY_Q4_K_M": 15, …}``), with llama-quantize's names, order, help.

    A type without a constant is left out: the library is too old for it. A constant that the table does not have is left out
    too, because not every constant is a type that llama.cpp can make.
    """
    known = tuple(
        QuantType(name, ftypes[constant], description, description[len(_ALIAS) :] if description.startswith(_ALIAS) else "")
        for name, constant, description in _OFFERED
        if constant in ftypes
    )
    return (*known, QuantType(COPY, None, "only copy tensors, no quantizing"))


def find_type(types: tuple[QuantType, ...], wanted: str) -> QuantType | None:
    """A type by its name in any case or its number, as llama-quantize takes it; None if there is no such type."""
    named = next((kind for kind in types if kind.name.lower() == wanted.lower()), None)
    if named is None and wanted.isdecimal():
        return next((kind for kind in types if kind.number == int(wanted)), None)
    return named


def guessed_ftype(types: Mapping[str, str], ftypes: Mapping[str, int]) -> int:
    """The file type that llama.cpp assumes for a model without ``general.file_type``: that of its tensors' most frequent type.

    ``types``: tensor name -> ggml type; ``ftypes`` as :func:`ftypes_of` returns them. Of two equally frequent types the one
    that reached the count first wins, in llama.cpp's order of tensors.
    """
    counts: Counter[str] = Counter()
    most = "F32"
    for name in sorted(types, key=_place):
        kind = types[name].upper()
        counts[kind] += 1
        if counts[kind] > counts[most]:
            most = kind
    constant = _GUESSES.get(most, f"MOSTLY_{most}")
    return ftypes.get(constant, ftypes["ALL_F32"]) | ftypes[_GUESSED]


def _place(tensor: str) -> tuple[int, bytes]:
    layer = _LAYER.match(tensor)
    return (int(layer[1]) if layer else -1, tensor.encode())
