"""The benefit of an imatrix for a level: what llama.cpp requires, what its code shows, and published measurements. Pure.

The figures are from other models and are shown as such; :mod:`imatrix_runner.evaluate.ab_verdict` measures the user's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Final, Literal

from imatrix_runner.models.ggml_types import IGNORE_WEIGHTS

Need = Literal["required", "strongly useful", "marginal", "none", "unknown"]

PPL_SOURCE: Final = "Mistral-7B, llama.cpp PR 4930"
PPL_ERRORS = MappingProxyType(
    {
        "Q2_K": (18.72, 12.90),
        "Q3_K_S": (6.62, 5.44),
        "Q3_K_M": (3.46, 2.75),
        "Q4_K_S": (1.48, 0.89),
        "Q4_K_M": (1.08, 0.75),
        "Q5_K_S": (0.59, 0.32),
        "Q5_K_M": (0.53, 0.30),
        "Q6_K": (0.18, 0.15),
    }
)
"""Increase of a level's perplexity over its source's, in percent: without and with an imatrix."""

KLD_SOURCE: Final = "Llama-3-8B, llama.cpp PR 6936"
KLDS = MappingProxyType(
    {
        "Q8_0": (0.0014, None),
        "Q6_K": (0.0055, None),
        "Q5_K_M": (0.0108, None),
        "Q5_K_S": (0.0166, None),
        "Q5_1": (0.0180, None),
        "Q5_0": (0.0222, None),
        "Q4_K_M": (0.0313, 0.0282),
        "Q4_K_S": (0.0431, 0.0320),
        "IQ4_NL": (None, 0.0357),
        "IQ4_XS": (None, 0.0363),
        "Q4_1": (0.0717, None),
        "Q4_0": (0.0719, None),
        "Q3_K_L": (0.0872, 0.0731),
        "Q3_K_M": (0.1019, 0.0844),
        "IQ3_M": (None, 0.1025),
        "IQ3_S": (None, 0.1113),
        "IQ3_XS": (None, 0.1387),
        "IQ3_XXS": (None, 0.1836),
        "Q3_K_S": (0.2282, 0.1998),
        "IQ2_M": (None, 0.3260),
        "Q2_K": (0.4451, 0.3322),
        "Q2_K_S": (None, 0.4034),
        "IQ2_S": (None, 0.4392),
        "IQ2_XS": (None, 0.5463),
        "IQ2_XXS": (None, 0.8120),
        "IQ1_M": (None, 1.3931),
        "IQ1_S": (None, 2.2546),
    }
)
"""Mean KLD to the source in nats: without and with an imatrix (of 10 M tokens of wikitext); None where it was not measured.
The table is in llama.cpp's tools/perplexity/README.md."""

REASONS: dict[Need, str] = {
    "required": "llama.cpp refuses to make it without; IQ2_XXS of Mistral-7B made so all the same had a perplexity of 356 "
    "(PR 4897)",
    "strongly useful": "at 4 bits and less it took away a fifth to two fifths of an error of 1 to 19 % (PR 4930)",
    "marginal": "at 5 bits and more the error is small already, 0.2 to 0.6 % without one, of which it took away a sixth to a "
    "half (PR 4930)",
    "none": "the types of its layers do not use it in rounding (ggml-quants.c leaves quant_weights unused)",
    "unknown": "nothing is known about its type",
}
"""Why a level has its need. The tables above hold the figures."""

_BITS = re.compile(r"Q(\d)")
_FEW_BITS = 4
_LEAST_SHARE = 0.05
"""Share of the layers' weights whose type must use importances in rounding for an imatrix to have any benefit."""


@dataclass(frozen=True)
class Benefit:
    """``need``, with published figures for this level, ``(without, with)``: perplexity errors in percent and mean KLDs in
    nats."""

    need: Need
    ppl_error: tuple[float, float] | None = None
    kld: tuple[float | None, float | None] | None = None

    @property
    def reason(self) -> str:
        return REASONS[self.need]


def benefit(level: str, *, needs_imatrix: bool, types: Mapping[str, int]) -> Benefit:
    """``types``: how many weights of the layers' matrices the level gives each type (:func:`computing_types`). A publisher's
    variant (``Q4_K_L``) has the need of its tensors, and no figures, because none are published."""
    return Benefit(_need(types, needs_imatrix=needs_imatrix), PPL_ERRORS.get(level), KLDS.get(level))


def computing_types(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> dict[str, int]:
    """Return the number of weights of each type among the matrices of the layers, from names, shapes and types.

    Embeddings are looked up and by default the output has no imatrix data, so neither counts, however large the vocabulary:
    Q4_K_M of a model of 270 M weights has most of its bytes in Q8_0 embeddings of 262,144 tokens, and still
    gains from an imatrix.
    """
    found: dict[str, int] = {}
    for name, shape, kind in tensors:
        if name.startswith("blk.") and len(shape) > 1:
            found[kind] = found.get(kind, 0) + prod(shape)
    return found


def _need(types: Mapping[str, int], *, needs_imatrix: bool) -> Need:
    if needs_imatrix:
        return "required"
    least = _LEAST_SHARE * sum(types.values())
    weighed = {kind: count for kind, count in types.items() if kind not in IGNORE_WEIGHTS}
    if not weighed or sum(weighed.values()) < least:
        return "none"
    bits = {kind: int(match[1]) for kind in weighed if (match := _BITS.search(kind)) is not None}
    if not bits:
        return "unknown"
    few = sum(count for kind, count in weighed.items() if bits.get(kind, _FEW_BITS + 1) <= _FEW_BITS)
    return "strongly useful" if few >= max(1, least) else "marginal"


def closeness(level: str) -> float | None:
    """Return the published KLD of a level, with an imatrix where there is such a figure; None if there is no figure."""
    without, with_imatrix = KLDS.get(level, (None, None))
    return with_imatrix if with_imatrix is not None else without
