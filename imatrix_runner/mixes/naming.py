"""Names of mixes: a size, and the preset that programs and hubs take the file for. Pure.

The last part of a GGUF's name is what llama.cpp's and the hub's programs read. It must be the name of one of llama.cpp's file
types, agree with ``general.file_type``, and be a name that the hub knows: ``Model-MIX-4.25bpw-IQ4_XS.gguf``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count

from imatrix_runner.errors import ToolchainError

_MOST_DIGITS = 4
_NEAR = 0.5  # bits per weight

# llama.cpp, tools/quantize/README.md (Llama-3.1-8B) and tools/quantize/quantize.cpp; src/llama-quant.cpp for the types: name ->
# type of most tensors, bits per weight. Aliases (Q4_K), which the hub does not know, are left out.
_PRESETS = {
    "Q1_0": ("Q1_0", 1.125),
    "TQ1_0": ("TQ1_0", 1.69),
    "IQ1_S": ("IQ1_S", 2.0042),
    "TQ2_0": ("TQ2_0", 2.06),
    "IQ1_M": ("IQ1_M", 2.1460),
    "Q2_0": ("Q2_0", 2.25),
    "IQ2_XXS": ("IQ2_XXS", 2.3824),
    "IQ2_XS": ("IQ2_XS", 2.5882),
    "IQ2_S": ("IQ2_XS", 2.7403),
    "IQ2_M": ("IQ2_S", 2.9294),
    "Q2_K_S": ("Q2_K", 2.9697),
    "Q2_K": ("Q2_K", 3.1593),
    "IQ3_XXS": ("IQ3_XXS", 3.2548),
    "IQ3_XS": ("IQ3_S", 3.4977),
    "Q3_K_S": ("Q3_K", 3.6429),
    "IQ3_S": ("IQ3_S", 3.6606),
    "IQ3_M": ("IQ3_S", 3.7628),
    "Q3_K_M": ("Q3_K", 3.9960),
    "MXFP4_MOE": ("MXFP4", 4.25),
    "Q3_K_L": ("Q3_K", 4.2979),
    "IQ4_XS": ("IQ4_XS", 4.4597),
    "Q4_0": ("Q4_0", 4.64),
    "Q4_K_S": ("Q4_K", 4.6672),
    "IQ4_NL": ("IQ4_NL", 4.6818),
    "Q4_K_M": ("Q4_K", 4.8944),
    "Q4_1": ("Q4_1", 5.11),
    "Q5_0": ("Q5_0", 5.57),
    "Q5_K_S": ("Q5_K", 5.5704),
    "Q5_K_M": ("Q5_K", 5.7036),
    "Q5_1": ("Q5_1", 6.04),
    "Q6_K": ("Q6_K", 6.5633),
    "Q8_0": ("Q8_0", 8.5008),
    "F16": ("F16", 16.0),
    "BF16": ("BF16", 16.0),
    "F32": ("F32", 32.0),
}


def usual_bits(level: str) -> float | None:
    """Bits per weight of a stock level, as llama.cpp's own tables give them for a model of 8 billion weights; None if they
    do not have it."""
    known = _PRESETS.get(level.upper())
    return known[1] if known is not None else None


def nearest_preset(elements: Mapping[str, int], bits_per_weight: float, offered: Collection[str]) -> str:
    """The file type that describes a mix best. ``elements``: numbers of weights by their ggml type; ``offered``: names of the
    file types that the library in use has.

    Of the presets whose main type is the mix's, the nearest in size, if it is within half a bit per weight; else the nearest of
    those whose main type occurs in the mix; else of all.
    """
    known = [name for name in _PRESETS if name in {each.upper() for each in offered}]
    if not known:
        raise ToolchainError(
            "A mix cannot be named",
            "the llama.cpp in use offers none of its usual file types",
            "Use a released llama.cpp, for example that of 'imatrix-runner tools install'.",
        )
    counts = {kind.upper(): n_elements for kind, n_elements in elements.items() if n_elements}
    main = max(counts, key=lambda kind: counts[kind])

    def distance(name: str) -> float:
        return abs(_PRESETS[name][1] - bits_per_weight)

    of_main = [name for name in known if _PRESETS[name][0] == main and distance(name) <= _NEAR]
    contained = [name for name in known if _PRESETS[name][0] in counts]
    return min(of_main or contained or known, key=distance)


def mix_name(bits_per_weight: float, preset: str, others: Collection[str]) -> str:
    """``MIX-4.25bpw-IQ4_XS``. ``others``: names that mixes of the same model with other recipes have already; a name among them
    gets up to four digits, then a number: ``MIX-4.2512bpw-2-IQ4_XS``."""
    taken = {each.upper() for each in others}
    for digits in range(2, _MOST_DIGITS + 1):
        name = f"MIX-{bits_per_weight:.{digits}f}bpw-{preset}"
        if name.upper() not in taken:
            return name
    numbered = (f"MIX-{bits_per_weight:.{_MOST_DIGITS}f}bpw-{number}-{preset}" for number in count(2))
    return next(name for name in numbered if name.upper() not in taken)
