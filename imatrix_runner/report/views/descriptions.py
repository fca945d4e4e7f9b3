"""Advice on which level to take, in a sentence each: from this model's measurements if there are any, else from what llama.cpp
documents about the level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from imatrix_runner.engines.measures import Divergence
from imatrix_runner.evaluate.recommendations import NEAR_SOURCE, USABLE, Pick, Why
from imatrix_runner.report.document import ReportLevel, ReportMix, ReportRounding
from imatrix_runner.report.views.wording import percent, share_of_stock

PICKED: Mapping[Why, str] = {
    "quality": "Quality",
    "balanced": "Balance",
    "small": "Small size",
    "target": "The target",
    "speed": "Speed",
}
"""Label of each reason for a recommendation."""

LLAMA_3_8B: Mapping[str, float] = {
    "Q8_0": 0.0026,
    "Q6_K": 0.0217,
    "Q5_K_M": 0.0569,
    "Q5_K_S": 0.1049,
    "Q5_1": 0.1062,
    "Q5_0": 0.1316,
    "Q4_K_M": 0.1754,
    "Q4_K_S": 0.2689,
    "Q4_1": 0.4511,
    "Q4_0": 0.4685,
    "Q3_K_L": 0.5562,
    "Q3_K_M": 0.6569,
    "Q3_K_S": 1.6321,
    "Q2_K_S": 3.1836,
    "Q2_K": 3.5199,
}
"""By how much a level raised Llama-3-8B's perplexity: QUANT_OPTIONS of llama.cpp's tools/quantize/quantize.cpp."""

# Sizes and comparisons: the same table. Default: --hf-repo in llama.cpp's common/arg.cpp. TQ: pull request 8151.
_NATURE: Mapping[str, str] = {
    "Q8_0": "Almost indistinguishable from the source, and the largest.",
    "Q6_K": "Very close to the source.",
    "Q5_K_M": "Close to the source.",
    "Q5_K_S": "Close to the source, a little smaller than Q5_K_M.",
    "Q5_1": "Older format; Q5_K_S is smaller and as close.",
    "Q5_0": "Older format; Q5_K_S is as small and closer.",
    "Q4_K_M": "llama.cpp's default: a good first try.",
    "Q4_K_S": "A little smaller and less close than Q4_K_M.",
    "Q4_1": "Older format; Q4_K_M is smaller and closer.",
    "Q4_0": "Older format; Q4_K_S is as small and closer.",
    "IQ4_NL": "About as large as Q4_K_S, on a grid that is finer around zero.",
    "IQ4_XS": "For where Q4_K_S just does not fit.",
    "Q3_K_L": "For where 4 bits do not fit.",
    "Q3_K_M": "For where 4 bits do not fit.",
    "Q3_K_S": "For where nothing larger fits: a clear loss.",
    "Q2_K": "A last resort.",
    "Q2_K_S": "A last resort.",
    "TQ1_0": "Only for models trained with ternary weights.",
    "TQ2_0": "Only for models trained with ternary weights.",
    "MXFP4_MOE": "Only for models whose experts were published in MXFP4.",
}
_NATURE_BY_BITS = {"IQ3": "For where 4 bits do not fit.", "IQ2": "A last resort.", "IQ1": "The smallest, and the last resort."}
ROUNDED = {
    "stock": "llama-quantize's numbers",
    "refined": "numbers from a refined search of scales",
    "feedback": "numbers rounded with error feedback",
}
"""In words, by kind."""

# As in engines/levels.py: publishers' names for a base level with two kinds of tensors at 8 bits.
_VARIANTS = ("Q6_K_L", "Q5_K_L", "Q4_K_L", "Q3_K_XL", "Q2_K_L")


def describe(levels: Sequence[ReportLevel], picks: Sequence[Pick] = ()) -> dict[str, str]:
    """Advice by level: whom it suits, what it is made of, and its fallbacks. Plain text; may be empty."""
    picked = {pick.level: PICKED[pick.why] for pick in picks}
    return {level.name: " ".join(_sentences(level, levels, picked.get(level.name, ""))) for level in levels}


def _sentences(level: ReportLevel, levels: Sequence[ReportLevel], picked: str) -> list[str]:
    found = [f"Recommended for {picked.lower()}."] if picked else []
    if level.measured is not None and not picked:
        found.append(_measured(level, level.measured, levels))
    if level.mix is not None:
        found.append(_mix(level.mix))
        if level.rounding is not None:
            found.append(f"{ROUNDED[level.rounding.kind].capitalize()}.")
    elif level.rounding is not None and level.rounding.ratio is not None:
        found.append(f"{level.rounding.stock} with {ROUNDED[level.rounding.kind]}: {_gain(level.rounding)}.")
    elif level.name in _VARIANTS:
        found.append(f"{level.ftype} with token embeddings and output weights in Q8_0.")
    elif level.measured is None and (nature := nature_of(level)):
        found.append(nature)
    if level.fallbacks:
        n, share = level.fallbacks, level.fallback_share
        tensors = "1 tensor has" if n == 1 else f"{n} tensors have"
        found.append(
            f"{tensors} another type ({percent(share)} of the weights): the rows do not divide into this one's blocks."
        )
    return found


def _mix(mix: ReportMix) -> str:
    """How the types of a mix were chosen, and what that gained."""
    if mix.ratio is None:
        return "Types by measured sensitivity."
    return f"Types by measured sensitivity: {_gain(mix)}."


def _gain(compared: ReportMix | ReportRounding) -> str:
    return f"{share_of_stock(compared)}'s KLD on the calibration text"


def nature_of(level: ReportLevel) -> str:
    """General advice on a level of this type; empty if the type is unknown."""
    base = level.ftype.upper()
    nature = _NATURE.get(base) or _NATURE_BY_BITS.get(base[:3], "")
    listed = LLAMA_3_8B.get(level.name.upper())
    return f"{nature} {listed:+.2g} perplexity on Llama-3-8B." if listed is not None else nature


def _measured(level: ReportLevel, measured: Divergence, levels: Sequence[ReportLevel]) -> str:
    rivals = [
        (other, other.measured)
        for other in levels
        if other.measured is not None and _no_worse(other, level, measured, other.measured)
    ]
    if rivals:
        best, of_best = min(rivals, key=lambda rival: rival[1].kld.value)
        size = "smaller" if best.n_bytes < level.n_bytes else "as small"
        closer = "closer to" if of_best.kld.value + _noise(of_best, measured) < measured.kld.value else "as close to"
        return f"{best.name} is {size} and {closer} the source."
    if measured.kld.value <= NEAR_SOURCE:
        return "Near the source, if there is room for it."
    if measured.same_top.value >= USABLE:
        return "A fair trade of size for closeness."
    return f"For where nothing larger fits: {percent(1 - measured.same_top.value, 0)} of the time another token is likeliest."


def _no_worse(other: ReportLevel, level: ReportLevel, measured: Divergence, of_other: Divergence) -> bool:
    """Whether ``other`` is no larger and no farther from the source, within two standard errors."""
    if other.n_bytes == level.n_bytes:
        return of_other.kld.value < measured.kld.value
    return other.n_bytes < level.n_bytes and of_other.kld.value <= measured.kld.value + _noise(of_other, measured)


def _noise(one: Divergence, other: Divergence) -> float:
    """Two standard errors of the difference of two mean KLDs (an upper bound: both were measured on the same tokens)."""
    return 2 * math.hypot(one.kld.error, other.kld.error)
